"""Tokenised rows in a file: written by one process, mapped by all that use them, so that a node has them once.

    KEY.safetensors    the arrays of a RowDataset, under the names of `RowArrays`; the key: row_key.py
      __metadata__     "rows": JSON of the tags, the account and the fingerprint; "checksum" of that and of the arrays

A file appears whole or not at all, and is never changed afterwards: it is written under another name, flushed to the
disk, and linked to its own (`os.link`, which never replaces). Of two writers the second finds the file of the first. A
damaged file is taken away by who finds it, and made again. Nobody but the owner can read a file, since rows may be
private.

Places are stored as numbers of files and lines, so a data set that was moved keeps its copy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_gkd.data.policy import RowSummary
from megatron_gkd.data.rows import RowArrays, RowDataset

_TYPES: dict[str, str] = {"I64": "<i8", "I32": "<i4", "I8": "i1"}
_DTYPES = {  # the widest first: so each array is aligned to its own width
    **dict.fromkeys(("borders", "places", "teacher_borders", "picture_borders"), "I64"),
    **dict.fromkeys(("tokens", "teacher_tokens", "tag_index"), "I32"),
    **dict.fromkeys(("prompt_only", "pictures"), "I8"),
}
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none
_ABANDONED_S = 24 * 3600.0  # an unfinished file of that age has no writer any more


class DamagedRowsError(Exception):
    """The file is not what was written: caught by whoever can make it again."""


def write_rows(path: Path, rows: RowDataset, paths: Sequence[str]) -> None:
    """Put the rows there, unless a file is there already. Raises OSError where it cannot be written."""
    described = _describe(rows, paths)
    header: dict[str, Any] = {"__metadata__": {"rows": described, "checksum": _checksum(described, rows.arrays)}}
    end = 0
    for name, numbers in _parts(rows.arrays):
        header[name] = {"dtype": _DTYPES[name], "shape": [len(numbers)], "data_offsets": [end, end + numbers.nbytes]}
        end += numbers.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of their width
    unfinished = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.unfinished")
    _remove_abandoned(path.parent)
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, numbers in _parts(rows.arrays):
                file.write(numbers.data)
            file.flush()
            os.fsync(file.fileno())
        _publish(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_rows(path: Path, paths: Sequence[str], *, verify: bool) -> RowDataset:
    """Map the rows of a file: they are read from the disk when they are used.

    Args:
        paths: of the data sets, for the places of the rows.
        verify: read all of it once and compare the checksum; else the size and the header alone.

    Raises FileNotFoundError, OSError, or DamagedRowsError for a file that is not as it was written.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= size - 8:
            raise DamagedRowsError("its header is cut short")
        try:
            header = json.loads(file.read(length))
            metadata, offsets = header["__metadata__"], {name: header[name]["data_offsets"] for name in _DTYPES}
            described, checksum = metadata["rows"], metadata["checksum"]
            about, wanted = json.loads(described), 8 + length + max(end for _, end in offsets.values())
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedRowsError(f"its header cannot be read ({error!r})") from error
        if size != wanted:
            raise DamagedRowsError(f"it has {size} bytes, and {wanted} were written")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = RowArrays(**{name: _mapped(mapped, 8 + length, name, offsets[name]) for name in RowArrays._fields})
    if verify and _checksum(described, arrays) != checksum:
        raise DamagedRowsError("its checksum is wrong")
    summary = RowSummary(**about["summary"])
    for reason, (file_number, text) in about["first_dropped"].items():
        summary.first_dropped[reason] = f"{paths[file_number]}:{text}"
    for kind, (file_number, text) in about["first_suspicious"].items():
        summary.first_suspicious[kind] = f"{paths[file_number]}:{text}"
    return RowDataset(paths, arrays, about["tags"], summary, digest=about["fingerprint"])


def _describe(rows: RowDataset, paths: Sequence[str]) -> str:
    """JSON of what is not in the arrays."""
    summary = asdict(rows.summary)
    places = {
        first: {key: _split_place(text, paths) for key, text in summary.pop(first).items()}
        for first in ("first_dropped", "first_suspicious")
    }
    return json.dumps({"summary": summary, **places, "tags": rows.tags, "fingerprint": rows.unweighted})


def _split_place(text: str, paths: Sequence[str]) -> tuple[int, str]:
    """`path:17: what is wrong` as (number of the file, `17: what is wrong`)."""
    number = max((n for n, path in enumerate(paths) if text.startswith(f"{path}:")), key=lambda n: len(paths[n]))
    return number, text[len(paths[number]) + 1 :]


def _parts(arrays: RowArrays) -> list[tuple[str, npt.NDArray[Any]]]:
    return [(name, np.ascontiguousarray(getattr(arrays, name), _TYPES[_DTYPES[name]])) for name in _DTYPES]


def _checksum(described: str, arrays: RowArrays) -> str:
    digest = hashlib.blake2b(described.encode(), digest_size=16, person=b"gkd.rowfile")
    for name, numbers in _parts(arrays):
        digest.update(f"\n{name} {len(numbers)}\n".encode())
        digest.update(numbers.data)
    return digest.hexdigest()


def _mapped(mapped: mmap.mmap, start: int, name: str, offsets: Sequence[int]) -> npt.NDArray[Any]:
    try:
        first, end = offsets
        dtype = np.dtype(_TYPES[_DTYPES[name]])
        return np.frombuffer(mapped, dtype, (end - first) // dtype.itemsize, start + first)
    except (ValueError, TypeError) as error:
        raise DamagedRowsError(f"its header misplaces {name} ({error})") from error


def _publish(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)
    except FileExistsError:  # another process was first, with the same rows
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        unfinished.rename(path)


def _remove_abandoned(directory: Path) -> None:
    """What processes left that were killed while they wrote."""
    for path in directory.glob(".*.unfinished"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
