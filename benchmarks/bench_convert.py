"""Loading, exporting and converting a model against a plain read, write and copy of the same files.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_convert --json benchmarks/results/convert_cpu.json
    python -m benchmarks.bench_convert --quick                    # seconds; says only that everything runs

One process, one thread, no GPU. A random Llama checkpoint in bfloat16 (16 layers, hidden 1024, 0.6 GB) is written to a
temporary directory (--dir; by default where TMPDIR says), then the methods run in turn, round by round, so that a
change of the machine's load meets all of them:

    read          plain: the files into memory that exists already, as a model's parameters do
    load          weights/load.py: the files into the parameters of a megatron-core model
    write         plain: as many bytes from memory into files of the same sizes, flushed to the disk
    export        weights/export.py, save_hf: the model's parameters into Hugging Face files, flushed to the disk
    copy          plain: the files read and written, a megabyte at a time, flushed to the disk
    to_megatron   convert --to megatron
    to_hf         convert --to hf

What is read lies in the kernel's page cache, for every method: the first, unmeasured round sees to that. What is
written is deleted between the calls. `of_plain` is the median wall time of the plain method (read for load, write for
export, copy for both conversions) over that of the method: 1 is as fast, the goal is 0.7. `of_plain_cpu` is the same
of CPU seconds (system time included), which other processes disturb less and in which waiting for the disk does not
count.

Peak memory comes from a call of its own: resident memory of the process that belongs to no file, over what there was
before, sampled each millisecond. `bound_bytes` is what the method promises at most for weights; the interpreter's own
(plans, metadata) comes on top.

At the end the exported and the converted files are compared with the source, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Seconds, environment, on_one_rank, quantiles, timed

PIECE = 2**20
CPU = torch.device("cpu")
PLAIN = {"load": "read", "export": "write", "to_megatron": "copy", "to_hf": "copy"}
TABLE = ("method", "GB/s", "p20", "p80", "cpu s", "of plain", "of plain, cpu", "peak MB", "bound MB")


class Method(NamedTuple):
    """`run` takes a path that does not exist yet, to write to."""

    run: Callable[[Path], object]
    bound_bytes: int | None = None


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return on_one_rank(measure, table, options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: a test that everything runs")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each method (5)")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (16)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 128 (1024)")
    parser.add_argument("--dir", help="directory for the files, on the disk to be measured")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.layers, options.hidden = 2, 2, 128
    return options


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report: environment, case, rows."""
    source = root / "source"
    make_model(source, options.layers, options.hidden)
    files = sorted(source.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    actions = methods(source, files, root)
    report: dict[str, Any] = {
        "environment": environment(CPU),
        "case": {"layers": options.layers, "hidden": options.hidden, "dtype": "bfloat16", "bytes": num_bytes},
        "rows": [],
    }
    peaks = {}
    for name, method in actions.items():
        method.run(root / f"{name}-first")  # warms the page cache, and imports
        shutil.rmtree(root / f"{name}-first", ignore_errors=True)
        out = root / name
        peaks[name] = peak_bytes(lambda method=method, out=out: method.run(out))
        if name in ("export", "to_hf"):
            check_equal(source, out)
        if name != "to_megatron":  # to_hf reads it, in every round
            shutil.rmtree(out, ignore_errors=True)
    seconds: dict[str, list[Seconds]] = {name: [] for name in actions}
    for _ in range(options.rounds):
        for name, method in actions.items():
            out = root / f"{name}-measured"
            seconds[name].append(timed(lambda method=method, out=out: method.run(out), CPU))
            shutil.rmtree(out, ignore_errors=True)
    report["load_average_1min_at_end"] = round(os.getloadavg()[0], 1)
    for name, method in actions.items():
        wall, cpu = (quantiles([s[clock] for s in seconds[name]]) for clock in (0, 1))
        row = {
            "method": name, "rounds": options.rounds, "wall_s": wall, "cpu_s": cpu,
            "gb_per_s": quantiles([num_bytes / s.wall_s / 1e9 for s in seconds[name]]),
            "peak_bytes": peaks[name], "bound_bytes": method.bound_bytes,
        }  # fmt: skip
        if name in PLAIN:
            plain = next(row for row in report["rows"] if row["method"] == PLAIN[name])
            row["of_plain"] = plain["wall_s"]["median"] / wall["median"]
            row["of_plain_cpu"] = plain["cpu_s"]["median"] / cpu["median"]
        report["rows"].append(row)
    return report


def methods(source: Path, files: list[Path], root: Path) -> dict[str, Method]:
    """Name -> what is measured; to_hf reads what the first call of to_megatron wrote."""
    from megatron_gkd.architecture import read_architecture
    from megatron_gkd.commands.convert import BUCKET_BYTES, ConvertConfig, memory_bound_bytes, run_convert
    from megatron_gkd.model.build import build_model
    from megatron_gkd.model.options import ModelOptions
    from megatron_gkd.parallel.groups import build_groups
    from megatron_gkd.parallel.layout import Layout
    from megatron_gkd.weights.export import save_hf
    from megatron_gkd.weights.hf_files import PIECE_BYTES, HFCheckpoint
    from megatron_gkd.weights.load import load_hf_weights

    arch = read_architecture(source)
    groups = build_groups(Layout())
    chunks = build_model(arch, Layout(), groups, ModelOptions.on("cpu"), dtype="bf16")
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()  # its memory exists from here on
    memory = [torch.zeros(file.stat().st_size, dtype=torch.uint8).numpy().data for file in files]

    def load(_: Path) -> None:
        with HFCheckpoint(source) as checkpoint:
            load_hf_weights(chunks, checkpoint, arch, tp_rank=0, tp_size=1)

    def export(out: Path) -> None:
        save_hf(chunks, arch, groups, source_dir=source, out_dir=out, bucket_bytes=BUCKET_BYTES)

    def convert(to: Any, model: Path, out: Path) -> None:
        run_convert(ConvertConfig(to=to, model=str(model), save=str(out)))

    return {
        "read": Method(lambda _: plain_read(files, memory)),
        "load": Method(load, PIECE_BYTES),
        "write": Method(lambda out: plain_write(out, memory)),
        "export": Method(export, memory_bound_bytes(arch, 2, to="hf")),
        "copy": Method(lambda out: plain_copy(files, out)),
        "to_megatron": Method(lambda out: convert("megatron", source, out), memory_bound_bytes(arch, 2, to="megatron")),
        "to_hf": Method(lambda out: convert("hf", root / "to_megatron", out), memory_bound_bytes(arch, 2, to="hf")),
    }


def make_model(path: Path, layers: int, hidden: int) -> None:
    """A random checkpoint in bfloat16, by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=32 * hidden,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def plain_read(files: list[Path], memory: list[memoryview]) -> None:
    for file, target in zip(files, memory, strict=True):
        with open(file, "rb", buffering=0) as stream:
            done = 0
            while done < len(target):
                done += stream.readinto(target[done:])


def plain_write(out: Path, memory: list[memoryview]) -> None:
    out.mkdir()
    for number, data in enumerate(memory):
        with open(out / str(number), "wb", buffering=0) as stream:
            done = 0
            while done < len(data):
                done += stream.write(data[done:])
            os.fsync(stream.fileno())


def plain_copy(files: list[Path], out: Path) -> None:
    out.mkdir()
    buffer = bytearray(PIECE)
    view = memoryview(buffer)
    for file in files:
        with open(file, "rb", buffering=0) as source, open(out / file.name, "wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(view[:count])
            os.fsync(target.fileno())


def check_equal(source: Path, out: Path) -> None:
    """Refuse to measure what does not write the same model."""
    from megatron_gkd.weights.hf_files import HFCheckpoint

    with HFCheckpoint(source) as before, HFCheckpoint(out) as after:
        assert sorted(before.names()) == sorted(after.names())
        for name in before.names():
            assert torch.equal(before.read(name), after.read(name)), name


def peak_bytes(action: Callable[[], object]) -> int:
    """Most anonymous memory added during a call (torch's profiler would not see numpy's or the library's)."""

    def anonymous_bytes() -> int:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    action()
    done.set()
    thread.join()
    return max(peak - before, 0)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(TABLE) + " |", "|" + "---|" * len(TABLE)]
    for row in rows:
        rate = row["gb_per_s"]
        cells = [
            row["method"], f"{rate['median']:.2f}", f"{rate['p20']:.2f}", f"{rate['p80']:.2f}",
            f"{row['cpu_s']['median']:.2f}",
            f"{row['of_plain']:.2f}" if "of_plain" in row else "",
            f"{row['of_plain_cpu']:.2f}" if "of_plain_cpu" in row else "",
            f"{row['peak_bytes'] / 1e6:.0f}", f"{row['bound_bytes'] / 1e6:.0f}" if row["bound_bytes"] else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
