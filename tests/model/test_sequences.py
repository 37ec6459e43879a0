"""The parts of a step's sequences that context-parallel ranks are fed: together they are the whole, each token once.

Pure: lengths, shares, and collation. What a model makes of the parts: tests/train/test_step_exact.py.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.collate import MicroBatch, collate
from megatron_gkd.data.cut import cut
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.model.sequences import Sequences, loss_shares
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.zigzag import held_spans
from megatron_gkd.records import LossShare, MicroBatchPlan, Sample
from megatron_gkd.train.batches import Collator

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=6)
SHARES = st.builds(
    lambda borders: LossShare(tuple(zip(borders[::2], borders[1::2], strict=False))),
    st.lists(st.integers(0, 30), unique=True, max_size=6).map(sorted),
)


@given(SHARES, SHARES)
def test_shares_as_sets_of_tokens(one: LossShare, other: LossShare):
    both = one & other
    assert both.tokens == sorted(set(one.tokens) & set(other.tokens))
    assert [other.tokens[place] for place in both.within(other).tokens] == both.tokens


@pytest.mark.parametrize(("size", "spans"), [(1, [[(0, 8)]]), (2, [[(0, 2), (6, 8)], [(2, 4), (4, 6)]])])
def test_the_zigzag(size: int, spans: list[list[tuple[int, int]]]):
    assert [held_spans(8, size, rank) for rank in range(size)] == spans


def test_a_length_that_cannot_be_cut_is_a_fault():
    with pytest.raises(AssertionError, match="6 tokens cannot be cut into 4 chunks"):
        held_spans(6, 2, 0)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Sample], MicroBatchPlan, Layout, bool]:
    """Samples (some shorter than CP, some without a completion), one replica's micro-batches, a layout, a form."""
    samples = []
    for prompt, completion in draw(LENGTHS):
        ids = tuple(range(100 * len(samples), 100 * len(samples) + prompt + max(completion, prompt == 1)))
        samples.append(Sample(len(samples), len(samples), ids[:prompt], ids[prompt:], "dataset"))
    tensor = draw(st.integers(1, 3))
    layout = Layout(
        tensor=tensor,
        context=draw(st.integers(1, 4)),
        pipeline=2,
        virtual_pipeline=draw(st.sampled_from([None, 2])),
        sequence_parallel=tensor > 1 and draw(st.booleans()),
    )
    border = draw(st.integers(0, len(samples)))
    plan = ((tuple(range(border)), tuple(range(border, len(samples)))),)
    return samples, plan, layout, draw(st.booleans())


@settings(deadline=None)
@given(steps())
def test_the_parts_are_the_whole_each_token_once(step: tuple[list[Sample], MicroBatchPlan, Layout, bool]):
    samples, plan, layout, packing = step
    shares = loss_shares(samples, plan, layout, packing=packing)
    collators = [Collator(samples, plan, layout, packing=packing, cp_rank=r, pad_id=-1) for r in range(layout.context)]
    for positions in plan[0]:
        parts = [collator(positions) for collator in collators]
        fed = Counter(token for part in parts for token in part.tokens.flatten().tolist() if token >= 0)
        inputs = [i for p in positions for i in (samples[p].prompt_ids + samples[p].completion_ids)[:-1]]
        assert fed == Counter(inputs)
        labels = [label for p in positions for label in samples[p].completion_ids]
        assert sorted(label for part in parts for label in part.labels.tolist()) == labels
        for rank, part in enumerate(parts):
            assert part.shares == tuple(shares[p][rank] for p in positions)
            rows = select_loss_tokens(part.tokens.T[..., None], part)[:, 0]
            assert torch.equal(rows + 1, part.labels), "each label stands behind the token that it is predicted from"
            check_length(part, layout, packing)
        assert sum(part.counts_samples for part in parts) == 1
    if layout.virtual_pipeline:
        assert len({tuple(collators[0](positions).tokens.shape[1:]) for positions in plan[0]}) == 1


def check_length(part: MicroBatch, layout: Layout, packing: bool) -> None:
    local = part.tokens.shape[1]
    assert local % (layout.tensor if layout.sequence_parallel else 1) == 0
    assert layout.context == 1 or local % 2 == 0
    if packing:
        assert part.cu_seqlens is not None
        borders = part.cu_seqlens.tolist()
        assert borders[-1] == local * layout.context
        segments = [end - first for first, end in pairwise(borders)]
        assert part.max_seqlen == max(segments)
        if layout.context > 1:
            assert all(length % (2 * layout.context) == 0 for length in segments)


@pytest.mark.parametrize("packing", [False, True])
def test_no_more_padding_than_the_layout_asks_for(packing: bool):
    samples = [Sample(i, i, (1,) * 3, (2,) * n, "dataset") for i, n in enumerate((5, 2))]  # 7 and 4 inputs
    for layout in (Layout(), Layout(context=2), Layout(context=3, tensor=4, sequence_parallel=True)):
        sequences = Sequences(samples, (((0, 1),),), layout, packing=packing)
        multiple = layout.context * math.lcm(1 if layout.context == 1 else 2, 4 if layout.sequence_parallel else 1)
        each = [n + -n % (1 if layout.context == 1 else 2 * layout.context) for n in (7, 4)]
        longest = 7 + -7 % multiple
        assert sequences.lengths((0, 1)) == (each if packing else [longest] * 2)
        assert sequences.row_multiple == multiple


def test_a_rank_must_say_which_part_it_wants():
    with pytest.raises(AssertionError, match="its own part"):
        Collator([], (((),),), Layout(context=2), packing=False)


def test_the_loss_tokens_of_another_rank_are_a_fault():
    """The share of rank 0 with the tokens of rank 1."""
    sample = Sample(0, 0, (1,), (2, 3, 4, 5), "dataset")
    options: dict[str, Any] = dict(share_of=lambda sample: LossShare(((0, 1), (3, 4))))
    assert cut(collate([sample], **options), 2, 0).labels.tolist() == [2, 5]
    with pytest.raises(AssertionError, match="another rank"):
        cut(collate([sample], **options), 2, 1)
