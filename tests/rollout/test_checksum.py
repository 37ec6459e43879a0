"""The checksum against its formula in Python integers, and the damage that it finds."""

from __future__ import annotations

import struct

import pytest
import torch

from megatron_gkd.rollout.checksum import checksum


def by_formula(tensor: torch.Tensor) -> tuple[int, int]:
    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    words = [word for (word,) in struct.iter_unpack("<i", raw + bytes(-len(raw) % 4))]
    sums = (sum(words), sum((i + 1) * word for i, word in enumerate(words)))
    plain, placed = ((value + 2**63) % 2**64 - 2**63 for value in sums)
    return plain, placed


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 1000, 2**16 - 1, 2**16, 2**16 + 1, 200_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_the_formula(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = (100 * torch.randn(size, generator=generator)).to(dtype)
    assert checksum(tensor) == by_formula(tensor)


def test_layout_in_memory_does_not_matter() -> None:
    tensor = torch.randn(30, 41)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()) != checksum(tensor)
    unaligned = torch.arange(101, dtype=torch.uint8)[1:].view(torch.bfloat16)
    assert checksum(unaligned) == by_formula(unaligned)


def test_what_it_finds() -> None:
    tensor = torch.randn(300_000)
    sums = checksum(tensor)
    bit = tensor.clone()
    bit.view(torch.int32)[250_000] ^= 1
    assert checksum(bit) != sums
    swapped = tensor.clone()
    swapped[3], swapped[200_000] = tensor[200_000], tensor[3]
    assert checksum(swapped)[0] == sums[0]
    assert checksum(swapped)[1] != sums[1], "only the second sum sees words that changed places"
    assert checksum(tensor.roll(1)) != sums
