"""The directory of a run's checkpoints: names, durable writing, manifest, removal. No torch, no ranks.

    SAVE/checkpoints/step_00000010/     complete: it has a `manifest.json`, which is written last, and was renamed whole
    SAVE/checkpoints/latest             the name of the newest one, for readers; written after the rename
    SAVE/checkpoints/.writing_step_*    being written, or left by an interrupted save
    SAVE/checkpoints/.deleting_step_*   being deleted, or left by an interrupted deletion
    SAVE/checkpoints/.replaced_step_*   from a continuation that was abandoned by resuming from an earlier step

The manifest lists every other file of the checkpoint with its size and SHA-256 (1.4 GB/s per core; a CRC is twice as
fast, but files of an old and a new state may have the same). It detects damage, not tampering: who can write the files
can write the manifest.

Hidden names are never taken for checkpoints. All functions are local to one machine's view.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from megatron_gkd.config.json_file import read_json, shown, whole_number
from megatron_gkd.errors import CheckpointError

MANIFEST: Final = "manifest.json"
LATEST: Final = "latest"
_PIECE_BYTES: Final = 2**22
_CUT_WRITES: Final = ("unexpected pos", "PytorchStreamWriter failed", "No space left", "Disk quota exceeded")
_PROBE: Final = ".probe_"
_UNFINISHED: Final = (".writing_*", ".deleting_*")


class Entry(NamedTuple):
    """What the manifest says of a file."""

    num_bytes: int
    sha256: str


# ---- names ----------------------------------------------------------------------------------------------------------


def checkpoint_path(root: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return root / f"step_{step:08d}"


def writing_path(root: Path, step: int) -> Path:
    """The directory in which it is written."""
    return root / f".writing_step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(root: Path) -> list[Path]:
    """Directories `step_N`, oldest first."""
    return sorted((d for d in root.glob("step_*") if d.name[5:].isdigit() and d.is_dir()), key=step_of)


def complete_checkpoints(root: Path) -> list[Path]:
    """Those that hold a manifest, oldest first."""
    return [d for d in checkpoints(root) if (d / MANIFEST).is_file()]


# ---- durable writing ------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write beside it, flush to disk, rename, flush the directory: the file has either the old content or the new
    one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def check_writable(directory: Path) -> None:
    """Write to the directory, or where it would be created, and leave nothing. Raises CheckpointError if that fails,
    before work is lost."""
    try:
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=_PROBE) as probe:
            probe.write(b"probe")
            probe.flush()
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error.strerror or error}), so no checkpoint could be saved: give another "
            "--save, or make it writable"
        ) from error


def describe_failure(error: BaseException, directory: Path, needed_bytes: int = 0) -> str:
    """An error of a save as one line, with advice. `needed_bytes`: what this rank has to write."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if not _is_of_a_full_disk(error):
        return text
    room = ""
    with contextlib.suppress(OSError):
        room = f", {shutil.disk_usage(directory).free / 1e9:.1f} GB are free there"
    needed = f", and this rank's part of the checkpoint needs {needed_bytes / 1e9:.1f} GB" if needed_bytes else ""
    return f"the disk is full, or a quota is used up ({text}){room}{needed}: make room, or give --save_total_limit"


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """torch's writer reports only the position of a truncated write, without its cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _CUT_WRITES):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- manifest -------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> Entry:
    """The size and checksum of a file."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            num_bytes += len(piece)
    return Entry(num_bytes, digest.hexdigest())


def write_manifest(checkpoint: Path, entries: Mapping[str, Entry]) -> None:
    """List the checkpoint's files; makes it complete."""
    files = {name: {"bytes": e.num_bytes, "sha256": e.sha256} for name, e in sorted(entries.items())}
    write_durably(checkpoint / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Entry]:
    """Raises CheckpointError for a missing or damaged one."""
    path = checkpoint / MANIFEST
    try:
        content: Any = read_json(path)
        if content["version"] != 1:
            raise ValueError(f"version {shown(content['version'])}, this program reads version 1")
        entries = {
            str(n): Entry(whole_number(e["bytes"], 2**62), str(e["sha256"])) for n, e in content["files"].items()
        }
        for name in entries:
            if name in ("", ".", "..") or "/" in name or not name.isprintable():
                raise ValueError(f"it names {shown(name)}, which is not a file in the directory")
        return entries
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({type(error).__name__}: {error})") from error


def find_damage(checkpoint: Path, entries: Mapping[str, Entry], *, read: bool) -> str | None:
    """The first file that differs from the manifest, in words; `read`: compare contents, not only sizes."""
    for name, entry in entries.items():
        path = checkpoint / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != entry.num_bytes:
                return f"{path} has {num_bytes} bytes, its manifest says {entry.num_bytes}"
            if read and hash_file(path) != entry:
                return f"{path} has changed since it was written (its SHA-256 is not the manifest's)"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
    return None


def shares(entries: Mapping[str, Entry], num_parts: int) -> list[dict[str, Entry]]:
    """The entries in `num_parts` parts of about equal bytes: largest first, each to the smallest part."""
    parts: list[dict[str, Entry]] = [{} for _ in range(num_parts)]
    sizes = [0] * num_parts
    for name, entry in sorted(entries.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        smallest = sizes.index(min(sizes))
        parts[smallest][name] = entry
        sizes[smallest] += entry.num_bytes
    return parts


# ---- publishing and removal -----------------------------------------------------------------------------------------


def publish(written: Path, final: Path) -> None:
    """Make a checkpoint whose files and manifest are on disk the newest one. Raises CheckpointError if one of that step
    exists: this run set its own aside when it began, so it is another run's, and stays."""
    sync(written)
    if final.exists():
        raise CheckpointError(
            f"{final} is there already, and this run did not write it: another run saves to the same directory; end "
            "one of them, and give each a --save of its own"
        )
    written.rename(final)
    sync(final.parent)
    write_durably(final.parent / LATEST, final.name)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete; if interrupted, nothing is left that looks complete."""
    hidden = checkpoint.with_name(f".deleting_{checkpoint.name.lstrip('.')}")
    checkpoint.rename(hidden)
    sync(hidden.parent)
    shutil.rmtree(hidden)


def keep_newest(root: Path, keep: int | None) -> None:
    """Delete all complete checkpoints except the `keep` newest, and those that were set aside; None: nothing.

    To be called when the newest one is on disk; at least that one stays.
    """
    if keep is None:
        return
    assert keep >= 1
    for old in [*complete_checkpoints(root)[:-keep], *root.glob(".replaced_*")]:
        remove_checkpoint(old)


def remove_unfinished(root: Path) -> None:
    """Delete what interrupted saves, deletions and probes left."""
    for probe in root.glob(f"{_PROBE}*"):
        probe.unlink()
    for pattern in _UNFINISHED:
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover)


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Hide every checkpoint of a later step, complete or not: they belong to an abandoned continuation, or are damaged.
    Returns their new paths."""
    return [_set_aside(checkpoint) for checkpoint in checkpoints(root) if step_of(checkpoint) > step]


def _set_aside(checkpoint: Path) -> Path:
    names = {path.name for path in checkpoint.parent.glob(".replaced_*")}
    number = next(n for n in range(len(names) + 1) if f".replaced_{checkpoint.name}_{n}" not in names)
    hidden = checkpoint.with_name(f".replaced_{checkpoint.name}_{number}")
    checkpoint.rename(hidden)
    return hidden
