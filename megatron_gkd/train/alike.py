"""Facts that must be the same on every rank, for `together.require_same`: a difference between two nodes is an error
before a weight is read, instead of a wrong student.

    start_facts   every flag, this package's code, the packages that affect numbers, the files of models and data
    row_facts     the tokenised rows

Files are compared by content, not by date: small ones whole; data beyond 64 MiB by the beginning, the end and 4 KiB
every 16 MiB; weights by `fingerprint(..., ends_only=True)`. A change in the middle of a large tensor is detected by the
comparison of the replicas (replicas.py), one within a large data file by that of the rows.

Nothing here raises: that a file cannot be read is a fact too. If it is so on all ranks, its reader raises the error.
"""

from __future__ import annotations

import hashlib
import platform as python_platform
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import megatron_gkd
from megatron_gkd.config import environment
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.schema import show
from megatron_gkd.config.servers import LocalTeacher
from megatron_gkd.data.dataset import Rows
from megatron_gkd.errors import GKDError
from megatron_gkd.weights.fingerprint import fingerprint
from megatron_gkd.weights.hf_files import INDEX_FILE, has_safetensors, side_files

# Flags that may differ: what a rank prints.
FREE: Final = frozenset({"log_level"})
# Packages that make numbers, or text into numbers.
PACKAGES: Final = (
    *("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "jinja2", "pyarrow"),
    *("sentencepiece", "tiktoken", "triton", "transformer-engine", "flash-attn", "vllm"),
)
_WHOLE_BYTES: Final = 64 * 2**20
_STRIDE_BYTES: Final = 16 * 2**20
_PIECE_BYTES: Final = 4096
_SHOWN_DIGITS: Final = 12  # of a hash: for people, and enough to tell files apart


def start_facts(config: RunConfig, given: RunConfig) -> dict[str, str]:
    """This rank's facts before any work. Args: given: with names on hubs where `config` has local files."""
    facts = {f"--{name}": show(value) for name, value in given.to_flat().items() if name not in FREE}
    facts |= program_facts()
    if config.teacher.teacher_nodes is not None:
        facts["LOCAL_WORLD_SIZE (ranks of a node, which --teacher_nodes counts)"] = show(
            environment.number("LOCAL_WORLD_SIZE")
        )
    teacher, load = config.teacher.teacher_model, config.checkpoint.load
    facts |= model_facts("--model", config.model.model)
    if teacher is not None:
        facts |= model_facts("--teacher_model", teacher, weights=isinstance(config.teacher.kind, LocalTeacher))
    if load is not None and has_safetensors(Path(load)):
        facts |= model_facts("--load", load)
    facts |= {f"--external_plugins {path}": _content(Path(path)) for path in config.data.external_plugins}
    for flag in ("dataset", "eval_dataset"):
        for path, text in zip(config.get(flag), given.get(flag), strict=True):
            facts |= {f"--{flag} {name if path == text else text}": value for name, value in _data(Path(path))}
    return facts


def row_facts(rows: Rows | None, eval_rows: Rows | None) -> dict[str, str]:
    """Facts about the rows that this rank tokenised."""
    named = {"--dataset": rows, "--eval_dataset": eval_rows}
    return {
        f"{flag}, tokenised,": f"{len(found)} rows ({found.fingerprint()})"
        for flag, found in named.items()
        if found is not None
    }


@cache
def program_facts() -> Mapping[str, str]:
    """Versions of the packages, and a hash of this package's own sources."""
    facts = {"the version of Python": python_platform.python_version()}
    for name in PACKAGES:
        try:
            facts[f"the version of {name}"] = version(name)
        except PackageNotFoundError:
            facts[f"the version of {name}"] = "none"
    root, digest = Path(megatron_gkd.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"\n{file.relative_to(root)}\n".encode() + file.read_bytes())
    facts["the code of megatron_gkd"] = f"{megatron_gkd.__version__} ({digest.hexdigest()[:_SHOWN_DIGITS]})"
    return facts


def model_facts(flag: str, path: str, *, weights: bool = True) -> dict[str, str]:
    """The files of a Hugging Face directory that a run reads."""
    facts = {}
    if weights:
        try:
            facts[f"{flag}, its weights,"] = fingerprint(path, ends_only=True)[:_SHOWN_DIGITS]
        except (GKDError, OSError) as error:
            facts[f"{flag}, its weights,"] = f"unreadable ({' '.join(str(error).split())[:200]})"
    found = side_files(Path(path)) if Path(path).is_dir() else []
    names = [name for name in (*found, INDEX_FILE) if not name.startswith(("LICENSE", "NOTICE"))]
    return facts | {f"{flag}/{name}": _content(Path(path) / name) for name in names if (Path(path) / name).is_file()}


def _data(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".arrow"))
        yield from ((f"{path}/{file.name}", _content(file)) for file in files)
    else:
        yield str(path), _content(path)


def _content(path: Path) -> str:
    """Size and hash, or why it cannot be read."""
    try:
        size, digest = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
            else:
                for start in (*range(0, size - _PIECE_BYTES, _STRIDE_BYTES), size - _PIECE_BYTES):
                    file.seek(start)
                    digest.update(file.read(_PIECE_BYTES))
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    return f"{size} bytes ({digest.hexdigest()[:_SHOWN_DIGITS]})"
