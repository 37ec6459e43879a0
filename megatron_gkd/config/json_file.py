"""Reads JSON from untrusted files: whatever is wrong with one is a ValueError of one line.

Python's reader can fail in other ways: nesting beyond its stack, bytes that are not UTF-8, a file without end. Callers
check the values; `whole_number` accepts integers alone (not True, 1.0, "1" or 10**400).
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from megatron_gkd.errors import GKDError

MOST_BYTES: Final = 64 * 10**6
_SHOWN: Final = 60


def read_json(path: str | Path, *, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a file. Raises OSError if it cannot be opened, ValueError if it is not JSON."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        if found.st_size > most_bytes:
            raise ValueError(f"it has {found.st_size} bytes, and at most {most_bytes} are read")
        return parse_json(file.read())


def read_object(path: Path, damaged: type[GKDError]) -> dict[str, Any] | None:
    """The object in a file that a run wrote; None if there is no file. Raises `damaged`, with the path."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise damaged(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise damaged(f"{path} is damaged: it is not an object")
    return found


def parse_json(content: bytes) -> Any:
    """The value in bytes. Raises ValueError."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def whole_number(value: Any, most: int, least: int = 0) -> int:
    """The value, if it is an integer in [least, most]. Raises ValueError for everything else."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is not a whole number from {least} to {most}")
    return value


def shown(value: Any) -> str:
    """Short text of a value of any type and size, for a message."""
    if type(value) is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
