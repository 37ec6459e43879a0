"""The order of rows: reproducible, resumable, each row once an epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.sampler import row_indices
from megatron_gkd.errors import ConfigError, DataError


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 9), st.integers(1, 30), st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_any_split_into_calls_gives_the_same_stream(seed, size, calls, shuffle):
    whole = row_indices(seed, 0, sum(calls), size, shuffle)
    done, pieces = 0, []
    for number in calls:
        pieces += row_indices(seed, done, number, size, shuffle)
        done += number
    assert pieces == whole
    for start in range(0, len(whole) - size + 1, size):
        assert sorted(whole[start : start + size]) == list(range(size))


def test_order_is_reproducible():
    """Part of the format of a run: a resumed run must go on in this order."""
    assert row_indices(1234, 5, 12, 8) == [0, 4, 1, 6, 5, 1, 2, 3, 7, 0, 4, 0]


def test_epochs_and_seeds_differ():
    assert row_indices(0, 0, 100, 100) != row_indices(0, 100, 100, 100) != row_indices(1, 0, 100, 100)
    assert row_indices(0, 100, 100, 100, shuffle=False) == list(range(100))


def test_every_permutation_is_equally_likely():
    counts = Counter(tuple(row_indices(7, epoch * 4, 4, 4)) for epoch in range(4800))
    assert len(counts) == 24
    assert all(abs(count - 200) < 5 * 200**0.5 for count in counts.values())


def test_sampler_refuses():
    with pytest.raises(DataError, match="no usable row"):
        row_indices(0, 0, 1, 0)
    with pytest.raises(ConfigError, match="consumed_samples is -1"):
        row_indices(0, -1, 1, 5)
