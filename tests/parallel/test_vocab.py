"""Vocabulary shards: the valid ranges partition the vocabulary in every layout; sizes that do not fit are refused by
name.

Does not cover: cutting a checkpoint's head (weights).
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.errors import ShapeError
from megatron_gkd.parallel.vocab import vocab_shard


@given(vocab=st.integers(1, 300), tp=st.integers(1, 8), multiple=st.integers(1, 16), extra_units=st.integers(0, 2))
def test_valid_ranges_partition_the_vocabulary(vocab, tp, multiple, extra_units):
    unit = tp * multiple
    padded = (-(-vocab // unit) + extra_units) * unit
    shards = [vocab_shard(padded // tp, rank=r, tp_size=tp, vocab_size=vocab) for r in range(tp)]
    ids = [i for s in shards for i in range(s.start, s.start + s.num_valid)]
    assert ids == list(range(vocab))
    assert {s.max_columns for s in shards} == {padded // tp}
    assert [s.start for s in shards] == [padded // tp * r for r in range(tp)]


@given(vocab=st.integers(1, 300), tp=st.integers(1, 8))
def test_a_shorter_last_shard_is_understood(vocab, tp):
    width = -(-vocab // tp)
    widths = [width] * (tp - 1) + [vocab - width * (tp - 1)]
    if widths[-1] < 1:
        return  # the last rank would hold nothing: such a layout needs padding
    shards = [vocab_shard(w, rank=r, tp_size=tp, vocab_size=vocab) for r, w in enumerate(widths)]
    assert [i for s in shards for i in range(s.start, s.start + s.num_valid)] == list(range(vocab))
    assert {s.max_columns for s in shards} == {width}


def test_no_vocab_size_means_no_padding():
    shard = vocab_shard(10, rank=1, tp_size=3)
    assert (shard.start, shard.num_valid, shard.vocab_size) == (10, 10, 30)


def test_a_rank_may_hold_padding_only():
    shard = vocab_shard(8, rank=3, tp_size=4, vocab_size=17)
    assert (shard.start, shard.num_valid) == (24, 0)


def test_too_few_columns_are_refused():
    with pytest.raises(ShapeError, match=r"vocab_size=40 was given with 10 columns on each of 2 .* \(20 in all\)"):
        vocab_shard(10, rank=0, tp_size=2, vocab_size=40)
    with pytest.raises(ShapeError, match="vocab_size=11"):
        vocab_shard(10, rank=0, tp_size=1, vocab_size=11)


@pytest.mark.parametrize("sizes", [dict(num_columns=0), dict(vocab_size=0), dict(rank=2), dict(rank=-1)])
def test_impossible_sizes_are_refused(sizes):
    given_sizes = dict(num_columns=4, rank=0, tp_size=2, vocab_size=8) | sizes
    with pytest.raises(ShapeError, match="was given"):
        vocab_shard(given_sizes.pop("num_columns"), **given_sizes)
