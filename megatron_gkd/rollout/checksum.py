"""A checksum of a tensor's bytes that CPUs and GPUs compute alike, made to find damage in transport, not malice.

With the bytes as little-endian 32-bit words w_0 .. w_{n-1} (padded with zeros), modulo 2^64:

    (sum_i w_i,  sum_i (i + 1) * w_i)

The first finds any single changed word; the second also words that changed places or moved. Cost: one read of the
tensor; temporaries are bounded by a chunk.
"""

from __future__ import annotations

import torch

_CHUNK_WORDS = 2**20


def checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """The two sums, each in [-2^63, 2^63) (int64 that wraps). Any dtype and device; makes a non-contiguous tensor
    contiguous first.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    plain = torch.zeros((), dtype=torch.int64, device=tensor.device)
    placed = torch.zeros((), dtype=torch.int64, device=tensor.device)
    whole = raw.numel() // 4 * 4
    if raw.data_ptr() % 4:
        raw = raw.clone()
    words = raw[:whole].view(torch.int32)
    tail = raw[whole:]
    if tail.numel():
        words_tail = torch.nn.functional.pad(tail, (0, 4 - tail.numel())).view(torch.int32)
    place = torch.arange(1, min(_CHUNK_WORDS, max(words.numel(), 1)) + 1, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64)
        chunk_sum = chunk.sum()
        plain += chunk_sum
        placed += (chunk * place[: chunk.numel()]).sum() + start * chunk_sum
    if tail.numel():
        last = words_tail.to(torch.int64).sum()
        plain += last
        placed += (words.numel() + 1) * last
    return int(plain.item()), int(placed.item())
