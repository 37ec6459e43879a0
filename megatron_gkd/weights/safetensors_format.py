"""The safetensors format of a file: its header, read and written. The data is the caller's.

8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, without gaps
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from megatron_gkd.config.json_file import parse_json, whole_number
from megatron_gkd.errors import CheckpointError

FLOATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES: Final = FLOATS | {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
MOST_TENSORS: Final = 250_000  # of a file or an index; the largest mixtures of experts have 100,000
_MAX_HEADER_BYTES: Final = 50 * 10**6
_MOST_BYTES: Final = 2**62
_MOST_DIMENSIONS: Final = 8


class Entry(NamedTuple):
    """A tensor in a file."""

    file: str  # name
    dtype: str
    shape: tuple[int, ...]
    start: int  # of the data, in bytes from the beginning of the file


class TensorSpec(NamedTuple):
    """A tensor that will be written or sent: known on every rank before any data moves."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(target: Path, shown: Path) -> dict[str, Entry]:
    """The tensors of a file, by name. The header is checked against the file's size, so that a partial copy is
    detected.

    `shown` is the file's path in its directory, for errors; `target` is the same file with links resolved. Raises
    CheckpointError.
    """
    size = target.stat().st_size
    with open(target, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{shown} is damaged or truncated: no safetensors header ({size} bytes)")
        text = stream.read(length)
    try:
        header = parse_json(text)
        del text
        if not isinstance(header, dict):
            raise TypeError(f"it is a {type(header).__name__}")
        header.pop("__metadata__", None)
        if len(header) > MOST_TENSORS:
            raise ValueError(f"it lists {len(header)} tensors, and no model has more than {MOST_TENSORS}")
        spans = [(name, *_read_entry(entry)) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{shown} has a damaged header: {error!r}") from error
    entries, position = {}, 0
    for name, dtype, shape, start, stop in sorted(spans, key=lambda span: span[3:]):
        if start != position or stop < start:
            raise CheckpointError(f"{shown} has a damaged header: {name} is at {start} to {stop}, not {position}")
        position = stop
        item = DTYPES[dtype].itemsize if dtype in DTYPES else None
        if item is not None and stop - start != math.prod(shape) * item:
            raise CheckpointError(f"{shown}: {name} has {stop - start} bytes, its shape needs another number")
        entries[name] = Entry(shown.name, dtype, shape, 8 + length + start)
    needed = 8 + length + position
    if size != needed:
        raise CheckpointError(f"{shown} is damaged or truncated: {size} bytes, its header says {needed}")
    return entries


def _read_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of a tensor in a header. Raises KeyError, TypeError or ValueError."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (type(dtype) is str and type(shape) is list and type(offsets) is list and len(offsets) == 2):
        raise TypeError("a tensor has a dtype, a shape and two offsets")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    for number in (*shape, *offsets):
        whole_number(number, _MOST_BYTES)
    return dtype, tuple(shape), offsets[0], offsets[1]


def write_header(
    specs: Sequence[TensorSpec], *, alignment: int = 8, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes before the data of these tensors, padded with blanks so that the data begins at a multiple of
    `alignment`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for spec in specs:
        assert spec.name not in header, f"{spec.name} is in the file twice"
        offsets = [position, position + spec.num_bytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
