"""The order of rows: reproducible, resumable, each row once an epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.order import MIX_BLOCK, mixed_row_indices, row_indices
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


# --- several data sets with weights


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.1, 0.3, 0.7, 1.0, 2.5, 10])), min_size=1, max_size=4),
    st.lists(st.integers(0, 700), max_size=5),
    st.booleans(),
)
def test_any_split_of_a_mixture_gives_the_same_stream(seed, sets, calls, shuffle):
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    whole = mixed_row_indices(seed, 0, sum(calls), sizes, weights, shuffle)
    done, pieces = 0, []
    for number in calls:
        pieces += mixed_row_indices(seed, done, number, sizes, weights, shuffle)
        done += number
    assert pieces == whole
    first = 0
    for size in sizes:  # each row of a set once in every epoch of that set
        of_set = [row - first for row in whole if first <= row < first + size]
        for start in range(0, len(of_set) - size + 1, size):
            epoch = of_set[start : start + size]
            assert epoch == list(range(size)) if not shuffle else sorted(epoch) == list(range(size))
        first += size


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 999), min_size=1, max_size=6), st.integers(1, 5))
def test_shares_are_exact_at_every_border_of_a_block(weights, blocks):
    num = blocks * MIX_BLOCK
    if min(weights) * MIX_BLOCK < sum(weights):
        with pytest.raises(ConfigError, match="at least a thousandth"):
            mixed_row_indices(0, 0, num, [1] * len(weights), weights)
        return
    counts = Counter(mixed_row_indices(0, 0, num, [1] * len(weights), weights))
    for number, weight in enumerate(weights):
        assert abs(counts[number] - num * weight / sum(weights)) < 1
    assert sum(counts.values()) == num


def test_a_mixture_far_into_a_run_is_as_cheap_as_at_its_start():
    near = mixed_row_indices(3, 10**12, 16, [5, 1000], [0.7, 0.3])
    assert near == mixed_row_indices(3, 10**12 - 40, 56, [5, 1000], [0.7, 0.3])[40:]


def test_order_of_a_mixture_is_reproducible():
    """Part of the format of a run, as above."""
    order = [3, 6, 9, 0, 8, 10, 6, 5, 4, 7, 10, 8, 9, 3, 3, 4]
    assert mixed_row_indices(1234, 5, 16, [3, 8], [0.25, 0.75]) == order
    assert mixed_row_indices(1235, 5, 16, [3, 8], [0.25, 0.75]) != order
    assert mixed_row_indices(1234, 5, 16, [3, 8], [0.5, 1.5]) == order  # only the proportions count


def test_sets_of_one_size_have_orders_of_their_own():
    rows = mixed_row_indices(0, 0, 4000, [50, 50], [1, 1])
    first, second = [row for row in rows if row < 50][:50], [row - 50 for row in rows if row >= 50][:50]
    assert first != second


def test_mixture_refuses():
    for weights, text in (
        ([1.0], "has 1 values and --dataset 2"),
        ([1.0, 0.0], "must be positive"),
        ([1.0, float("nan")], "must be positive"),
        ([1.0, 0.0001], "at least a thousandth"),
    ):
        with pytest.raises(ConfigError, match=text):
            mixed_row_indices(0, 0, 1, [5, 5], weights)
    with pytest.raises(DataError, match="data set 2 has no usable row"):
        mixed_row_indices(0, 0, 1, [5, 0], [1, 1])
