"""A checksum of a tensor's bytes that is the same on CPUs and GPUs. It detects damage in transport, not tampering.

Take the bytes as little-endian 64-bit words in rows of 512 (4 KiB; the end padded with zeros). With r_i the sum of row
i, modulo 2^64:

    (sum_i r_i,  sum_i (i + 1) * r_i)

The first sum detects any single changed word, the second also rows that were swapped or moved. A permutation within a
row is not detected. Cost: one read of the tensor at memory speed; no temporaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Tensors = Sequence[tuple[str, torch.Tensor]]  # a bucket of weights, by name
Sums = Mapping[str, tuple[int, int]]  # name -> checksum on the rank that owns the tensor

_ROW_WORDS = 512
_ROW_BYTES = 8 * _ROW_WORDS


def checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """The two sums, each in [-2^63, 2^63) (int64 that wraps). Any dtype and device; makes a non-contiguous tensor
    contiguous first.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // _ROW_BYTES * _ROW_BYTES
    parts = [raw[:whole]]
    if whole < raw.numel():
        parts.append(torch.nn.functional.pad(raw[whole:], (0, _ROW_BYTES - (raw.numel() - whole))))
    # A view as wider words needs its start aligned to them, which the middle of a buffer may not be.
    rows = [part.clone() if part.storage_offset() % 8 or part.data_ptr() % 8 else part for part in parts]
    sums_R = torch.cat([part.view(torch.int64).view(-1, _ROW_WORDS).sum(1) for part in rows])
    places_R = torch.arange(1, len(sums_R) + 1, device=tensor.device)
    return int(sums_R.sum().item()), int((places_R * sums_R).sum().item())
