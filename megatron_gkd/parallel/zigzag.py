"""How a sequence is cut over context-parallel ranks: megatron-core's zigzag split, as spans. Pure Python.

A sequence of S tokens is cut into 2 * cp chunks of S / (2 cp); rank r holds chunks r and 2 * cp - 1 - r, in that order.
In causal attention a late chunk costs more than an early one: so every rank has the same work. The ranks of a pack cut
each of its sequences so, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Span = tuple[int, int]  # [first, end)


def held_spans(length: int, size: int, rank: int) -> list[Span]:
    """What context-parallel rank `rank` of `size` holds of a sequence; with one rank all of it.

    `length` is a multiple of 2 * size (of anything for one rank).
    """
    if size == 1:
        return [(0, length)]
    assert length % (2 * size) == 0, f"{length} tokens cannot be cut into {2 * size} chunks"
    chunk = length // (2 * size)
    return [(number * chunk, (number + 1) * chunk) for number in (rank, 2 * size - 1 - rank)]


def held_spans_of_pack(lengths: Sequence[int], size: int, rank: int) -> Iterator[Span]:
    """The same for sequences that lie end to end: spans of the whole row, in the order in which the rank holds them."""
    start = 0
    for length in lengths:
        yield from ((start + first, start + end) for first, end in held_spans(length, size, rank))
        start += length
