"""Which rows a step sees: a pure function of (seed, samples consumed so far), so that one number resumes it.

The stream of rows is epoch 0, epoch 1, ...; an epoch is a permutation of all rows, drawn from (seed, epoch) alone.
Sample number g of the run (counted from 0 over all steps) is element g mod D of epoch g div D, where D is the size of
the data set. Hence, for every split of the stream into calls, the same rows in the same order, and each row exactly
once in an epoch. A global batch may span two epochs.

Several data sets with weights: the stream goes in blocks of `MIX_BLOCK` elements. After n blocks set k has been given
floor(n B W_k) - floor(n B W_{k-1}) elements, W_k being the sum of the first k weights (they sum to 1): its share, to
less than one element, from the first block on. Within a block the sets come in a random order drawn from (seed,
block). Element n of a set is element n mod D_k of epoch n div D_k of that set, whose permutation is drawn from (seed,
set, epoch). So every split into calls gives the same rows, and each row of a set comes once in an epoch of that set.

The permutation is Fisher-Yates over `random.Random(...).random()`, the one method whose stream the standard library
promises to keep.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from itertools import accumulate, pairwise

from megatron_gkd.errors import ConfigError, DataError

MIX_BLOCK = 1000


def row_indices(
    seed: int, consumed_samples: int, num_samples: int, dataset_size: int, shuffle: bool = True
) -> list[int]:
    """Rows of the samples `consumed_samples .. consumed_samples + num_samples - 1` of the run.

    With `shuffle=False` every epoch is in file order.
    """
    if dataset_size < 1:
        raise DataError("the data set has no usable row")
    _check_position(consumed_samples, num_samples)
    return [
        _row(seed, sample, dataset_size, shuffle, None)
        for sample in range(consumed_samples, consumed_samples + num_samples)
    ]


def mixed_row_indices(
    seed: int,
    consumed_samples: int,
    num_samples: int,
    dataset_sizes: Sequence[int],
    weights: Sequence[float],
    shuffle: bool = True,
) -> list[int]:
    """The same for several data sets with weights; the rows of set k are numbered on from those of set k - 1.

    With `shuffle=False` the rows of each set come in file order; the sets still alternate at random.
    """
    check_weights(weights, len(dataset_sizes))
    if min(dataset_sizes) < 1:
        raise DataError(f"data set {list(dataset_sizes).index(0) + 1} has no usable row, and a weight is given to it")
    _check_position(consumed_samples, num_samples)
    first_rows = list(accumulate(dataset_sizes, initial=0))
    indices = []
    for sample in range(consumed_samples, consumed_samples + num_samples):
        block, element = divmod(sample, MIX_BLOCK)
        number, place = _mixed_block(seed, block, tuple(weights))[element]
        indices.append(first_rows[number] + _row(seed, place, dataset_sizes[number], shuffle, number))
    return indices


def check_weights(weights: Sequence[float], num_sets: int) -> None:
    """Raises ConfigError unless there is one usable weight a data set."""
    if len(weights) != num_sets:
        raise ConfigError(
            f"--dataset_weights has {len(weights)} values and --dataset {num_sets}; give one weight per data set"
        )
    if not all(0 < weight < math.inf and weight * MIX_BLOCK >= sum(weights) for weight in weights):
        raise ConfigError(
            f"--dataset_weights {' '.join(map(str, weights))}: each must be positive and at least a thousandth of "
            "their sum; give a data set more, or leave it out"
        )


def _check_position(consumed_samples: int, num_samples: int) -> None:
    if consumed_samples < 0 or num_samples < 0:
        raise ConfigError(
            f"consumed_samples is {consumed_samples} and num_samples {num_samples}; neither may be negative"
        )


@lru_cache(maxsize=2)
def _mixed_block(seed: int, block: int, weights: tuple[float, ...]) -> list[tuple[int, int]]:
    """(data set, element of the data set's own stream) of each element of a block."""
    given = _given(weights, block * MIX_BLOCK)
    counts = [after - before for before, after in zip(given, _given(weights, (block + 1) * MIX_BLOCK), strict=True)]
    # A share of a block is at least 1, so it is never negative in spite of the two floors.
    order = _permutation(f"{seed},mix,{block}", MIX_BLOCK)
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    block_of: list[tuple[int, int]] = []
    for element in order:
        number = numbers[element]
        block_of.append((number, given[number]))
        given[number] += 1
    return block_of


def _given(weights: Sequence[float], num_elements: int) -> list[int]:
    """How many of the first elements each set has been given, at a border between blocks. Sums to `num_elements`."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.7, not the nearest binary fraction
    limits = [int(num_elements * part / sum(exact)) for part in accumulate(exact)]
    return [above - below for below, above in pairwise([0, *limits])]


def _row(seed: int, element: int, size: int, shuffle: bool, number: int | None) -> int:
    """The row at an element of the stream of one data set, or (None) of all of them as one."""
    epoch, place = divmod(element, size)
    if not shuffle:
        return place
    part = "" if number is None else f"set {number},"
    return _permutations(number)(f"{seed},{part}{epoch}", size)[place]


def _permutation(key: str, size: int) -> array[int]:
    digest = hashlib.blake2b(key.encode(), digest_size=16, person=b"gkd.rows").digest()
    generator = random.Random(int.from_bytes(digest, "little"))
    rows = array("q", range(size))
    for last in range(size - 1, 0, -1):
        other = int(generator.random() * (last + 1))
        rows[last], rows[other] = rows[other], rows[last]
    return rows


@cache
def _permutations(number: int | None) -> Callable[[str, int], array[int]]:
    """With a memory per data set: a batch spans few epochs, and shuffling a million rows takes a part of a second."""
    del number
    return lru_cache(maxsize=2)(_permutation)
