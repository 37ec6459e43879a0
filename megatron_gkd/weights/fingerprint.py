"""A fingerprint of a Hugging Face model directory, which differs between models and does not read all of the weights.

It covers config.json byte for byte; the name, dtype and shape of every tensor; and of its data the first and the last
piece (4 KiB, or one row if that is more) and one piece every 16 MiB between them. That is about a thousandth of the
bytes: some 150 MB for a 70B model in bf16. The split into files, and their names and dates, do not matter.

With `ends_only` it covers only the first and the last piece of each tensor, for a comparison on every rank at each
start.

It detects training, merging and conversion, which change whole tensors. It can miss an edit of a few rows in the middle
of a large tensor, such as one token's embedding.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch

from megatron_gkd.weights.hf_files import HFCheckpoint

_PIECE_BYTES = 4096
_STRIDE_BYTES = 16 * 2**20


def fingerprint(path: str | Path, *, ends_only: bool = False) -> str:
    """The fingerprint of a model directory. Raises CheckpointError for weights that HFCheckpoint refuses."""
    digest = hashlib.blake2b(digest_size=16, person=b"gkd.model")
    digest.update((Path(path) / "config.json").read_bytes())
    with HFCheckpoint(path) as checkpoint:
        for name in sorted(checkpoint.names()):
            shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
            digest.update(f"\n{name} {dtype} {shape}\n".encode())
            for first, last in _pieces(shape, dtype.itemsize, ends_only):
                rows = checkpoint.read(name, (first, last))
                digest.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pieces(shape: tuple[int, ...], item_bytes: int, ends_only: bool) -> list[tuple[int, int]]:
    """Spans of rows: the first, the last and (unless `ends_only`) those between; all rows of a small tensor."""
    num_rows = shape[0] if shape else 0
    row_bytes = math.prod(shape[1:]) * item_bytes
    if num_rows * row_bytes == 0:
        return []
    length = min(num_rows, max(1, _PIECE_BYTES // row_bytes))
    stride = num_rows if ends_only else max(length, _STRIDE_BYTES // row_bytes)
    firsts = [*range(0, num_rows - length, stride), num_rows - length]
    return [(first, first + length) for first in firsts]
