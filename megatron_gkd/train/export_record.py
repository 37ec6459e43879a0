"""SAVE/export.json: identifies the student in SAVE/hf.

    {"step": 1000, "dtype": "fp32", "fingerprint": "...", "files": {"config.json": 731, ...},
     "trained": {"forward_kl": 1.7078, ...}, "exported": {"forward_kl": 1.7078, ...}}

For a student with adapters, "adapter" holds the fingerprint and the files of SAVE/adapter; the other two describe the
merged weights and exist only with --merge_lora.

The record distinguishes a run's own export, which is replaced when the run is continued, from a directory that was put
there or changed, which is refused. Without held-out rows there are no "trained" and "exported" (exporting.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from megatron_gkd.config.json_file import read_object
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import CheckpointError, GKDError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import all_true, on_first
from megatron_gkd.platform import new_group
from megatron_gkd.train.auto_resume import resumes_itself
from megatron_gkd.weights.fingerprint import fingerprint
from megatron_gkd.weights.peft_files import WEIGHTS_FILE

logger = get_logger(__name__)

RECORD: Final = "export.json"
LONGEST_WRITE: Final = timedelta(days=1)  # a rank that dies is noticed at once, by its connection
SEEN_S: Final = 90.0  # a shared file system may show a renamed directory that late


def exports_at_end(config: RunConfig, *, done_steps: int, train_iters: int) -> bool:
    """Whether this start will export; not if a run that resumes itself has already trained and exported everything. The
    same on all ranks of WORLD, which call it together; the first one looks.

    Raises CheckpointError if steps are left to do and SAVE/hf is not this run's own.
    """
    if not (config.checkpoint.save_hf and resumes_itself(config)):
        return config.checkpoint.save_hf
    run_dir, names = Path(config.checkpoint.save), config.exports
    return not on_first(lambda: _is_exported(run_dir, names, done_steps, train_iters))


def _is_exported(run_dir: Path, names: Sequence[str], done_steps: int, train_iters: int) -> bool:
    exported = run_dir / names[0]
    if not exported.exists():
        return False
    record = read_record(run_dir)
    exported_at = done_steps if record is None else record.get("step")
    if done_steps < train_iters or exported_at != done_steps:
        check_replaceable(run_dir, names)
        return False
    logger.info("nothing left to do: %d steps done, %s is written", done_steps, exported)
    return True


def check_replaceable(run_dir: Path, names: Sequence[str] = ("hf",)) -> None:
    """Raise CheckpointError if one of the directories exists and is not, file for file, what this run exported."""
    for name in names:
        _check_own(run_dir, name)


def _check_own(run_dir: Path, name: str) -> None:
    exported = run_dir / name
    if not (exported.exists() or exported.is_symlink()):
        return
    try:
        record = read_record(run_dir) or {}
        found = record if name == "hf" else record.get(name) or {}
        own = bool(found) and describe(exported) == {key: found.get(key) for key in ("fingerprint", "files")}
    except (GKDError, OSError):
        own = False
    if not own:
        raise CheckpointError(
            f"{exported} exists and is not overwritten: it is not, or no longer, what this run has exported "
            f"({RECORD}); move it away, give another --save, or leave the export out with --save_hf false"
        )


def describe(out_dir: Path) -> dict[str, Any]:
    """What identifies an export: the fingerprint of its weights, and the sizes of its files."""
    files = {str(path.relative_to(out_dir)): path.stat().st_size for path in out_dir.rglob("*") if path.is_file()}
    weights = out_dir / WEIGHTS_FILE  # of an adapter
    if weights.is_file():
        with open(weights, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        found = fingerprint(out_dir, ends_only=True)
    return {"fingerprint": found, "files": dict(sorted(files.items()))}


def write_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    written = run_dir / f".{RECORD}"
    written.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    written.replace(run_dir / RECORD)


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """None if no export was recorded. Raises CheckpointError for a damaged record."""
    return read_object(run_dir / RECORD, CheckpointError)


def is_seen_by_all(out_dir: Path) -> bool:
    """Wait until the export is written, then until every rank sees it. False, with a warning, if one does not.

    Communication: a barrier over WORLD in its own gloo group, which may last as long as the writing; one object
    broadcast from rank 0, one all-reduce of an int32.
    """
    if dist.get_world_size() == 1:
        return True
    dist.barrier(new_group(range(dist.get_world_size()), backend="gloo", timeout=LONGEST_WRITE))
    written = on_first(lambda: describe(out_dir))
    end = time.monotonic() + SEEN_S
    seen = _sees(out_dir, written)
    while not seen and time.monotonic() < end:
        time.sleep(1)
        seen = _sees(out_dir, written)
    if all_true(seen):
        return True
    if dist.get_rank() == 0 or not seen:
        logger.warning("%s is written, and was NOT MEASURED: not every rank sees it after %.0f s", out_dir, SEEN_S)
    return False


def _sees(out_dir: Path, written: Mapping[str, Any]) -> bool:
    try:
        return describe(out_dir) == written
    except (GKDError, OSError):
        return False
