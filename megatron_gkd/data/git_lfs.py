"""Git LFS pointers: what a clone without Git LFS leaves in place of large files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from megatron_gkd.errors import CheckpointError

_BEGINNING: Final = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(file: Path) -> None:
    """Raise CheckpointError if the file is a pointer; a file that cannot be read is ignored."""
    try:
        with open(file, "rb") as stream:
            beginning = stream.read(len(_BEGINNING))
    except OSError:
        return
    if beginning == _BEGINNING:
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file that it points to: fetch it with `git lfs pull`, or download "
            "the model again"
        )
