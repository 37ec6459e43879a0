"""Directories that are either finished or absent: what the quick start's scripts share.

A script describes what it is about to write in a small dictionary (the source: package, checksums, seed, counts,
licence). `building` gives it a working directory and, when the script is done, writes the dictionary into SOURCE.json
and renames the directory into place. So a directory with the same SOURCE.json holds finished work (`is_prepared`), an
interrupted script leaves nothing that could be taken for it, and a directory with other content is never overwritten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_gkd.errors import CheckpointError

NOTE = "SOURCE.json"


def read_note(directory: Path) -> dict[str, Any] | None:
    """The source that `directory` was written from; None where it does not say."""
    note = directory / NOTE
    if not note.is_file():
        return None
    source: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return source


def is_prepared(out: Path, source: Mapping[str, Any]) -> bool:
    """`out` was finished from this very source."""
    return read_note(out) == source


@contextmanager
def building(out: Path, source: Mapping[str, Any]) -> Iterator[Path]:
    """A working directory beside `out`, renamed to `out` if the body succeeds. Refuses an `out` that exists."""
    if out.exists():
        raise CheckpointError(
            f"{out} exists and was written otherwise than asked for now; delete it or choose another --out"
        )
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)  # of an interrupted call
    work.mkdir(parents=True)
    yield work
    (work / NOTE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    work.rename(out)
