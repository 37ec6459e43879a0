"""Collation: padded and packed forms carry the same samples, the same loss tokens and nothing else.

Not covered: that a model gives padded and packed samples the same hidden states (tests/model).
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.collate import collate
from megatron_gkd.errors import DataError
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.records import SOURCES, LossShare, Sample

PAD = 7  # also a token of the samples: padding is told apart by place, never by value
IDS = st.lists(st.integers(0, 12), min_size=1, max_size=9)


@st.composite
def sample_lists(draw, min_size=1):
    samples = []
    for position in draw(st.lists(st.integers(0, 99), unique=True, min_size=min_size, max_size=6)):
        prompt, completion = draw(IDS), draw(st.one_of(st.just([]), IDS))
        if len(prompt) + len(completion) > 1:
            samples.append(Sample(position, position, tuple(prompt), tuple(completion), "dataset"))
    return samples


def check_loss_tokens(batch, samples):
    """Every loss position holds the token before its label, in completion order."""
    assert batch.positions == tuple(s.position for s in samples)
    assert batch.lengths == tuple(s.num_loss_tokens for s in samples)
    flat_tokens, flat_positions = batch.tokens.flatten(), batch.position_ids.flatten()
    for index, s in enumerate(samples):
        mine = batch.loss_sample == index
        assert tuple(batch.labels[mine].tolist()) == s.completion_ids
        inputs = flat_tokens[batch.loss_index[mine]].tolist()
        assert inputs == [s.prompt_ids[-1], *s.completion_ids[:-1]][: len(s.completion_ids)]
        places = flat_positions[batch.loss_index[mine]].tolist()
        assert places == list(range(len(s.prompt_ids) - 1, len(s.prompt_ids) - 1 + len(s.completion_ids)))
    assert batch.loss_sample.tolist() == sorted(batch.loss_sample.tolist())
    assert {batch.tokens.dtype, batch.position_ids.dtype, batch.loss_index.dtype, batch.labels.dtype} == {torch.int64}


# ---- which loss tokens a rank holds ----------------------------------------------------------------------------------


def split_over(rank, num_ranks, sample):
    """A share of a sequence that is cut into 2 R pieces, rank r being fed pieces r and 2 R - 1 - r (so that causal
    attention costs all ranks alike)."""
    size = -(-sample.num_inputs // (2 * num_ranks))
    pieces = (rank, 2 * num_ranks - 1 - rank)
    return LossShare.of(sample, [(piece * size, (piece + 1) * size) for piece in pieces])


@given(sample_lists(), st.integers(1, 3))
def test_the_shares_of_all_ranks_are_each_loss_token_exactly_once(samples, num_ranks):
    for sample in samples:
        shares = [split_over(rank, num_ranks, sample) for rank in range(num_ranks)]
        assert sorted(token for share in shares for token in share.tokens) == list(range(sample.num_loss_tokens))
        assert sum(share.num_tokens for share in shares) == sample.num_loss_tokens
        assert all(len(share.spans) <= 2 for share in shares)
        assert LossShare.of(sample).tokens == list(range(sample.num_loss_tokens))


def test_tokens_that_the_model_did_not_write_are_inputs_and_no_loss_tokens():
    mask = (True, False, False, True, True)
    sample = Sample(0, 0, (5, 6), (1, 2, 3, 4, 7), "student", 0, completion_mask=mask, logprobs=(-1, -2, -3, -4, -5))
    batch = collate([sample])
    assert batch.tokens.tolist() == [[5, 6, 1, 2, 3, 4]]
    assert (batch.loss_index.tolist(), batch.labels.tolist()) == ([1, 4, 5], [1, 4, 7])
    assert batch.logprobs.tolist() == [-1, -4, -5]
    assert batch.lengths == (sample.num_loss_tokens,) == (3,)
    assert sample.for_teacher.num_loss_tokens == 3
    assert [LossShare.of(sample, [fed]).spans for fed in ((0, 3), (3, 6))] == [((0, 1),), ((3, 5),)]


@pytest.mark.parametrize("packing", [False, True])
def test_select_loss_tokens_honours_a_share(packing):
    """The two ranks' rows together are the rows of a rank that holds all; labels, lengths and samples go with them."""
    sizes = [(3, 6), (1, 4), (5, 0), (2, 1)]
    samples = [Sample(n, n, (n,) * p, tuple(range(20 * n, 20 * n + c)), "dataset") for n, (p, c) in enumerate(sizes)]
    whole = collate(samples, packing=packing)
    hidden = torch.arange(whole.tokens.numel()).view(whole.tokens.shape).T[..., None]  # [S, B, 1]
    found = []
    for rank in range(2):
        mine = collate(samples, packing=packing, share_of=lambda sample, rank=rank: split_over(rank, 2, sample))
        rows = select_loss_tokens(hidden, mine)
        assert len(rows) == sum(mine.lengths) == len(mine.labels) == len(mine.loss_sample) < sum(whole.lengths)
        assert mine.lengths == tuple(split_over(rank, 2, sample).num_tokens for sample in samples)
        found += zip(rows[:, 0].tolist(), mine.labels.tolist(), mine.loss_sample.tolist(), strict=True)
    rows = select_loss_tokens(hidden, whole)
    assert sorted(found) == list(
        zip(rows[:, 0].tolist(), whole.labels.tolist(), whole.loss_sample.tolist(), strict=True)
    )


def test_a_micro_batch_knows_where_its_samples_come_from():
    samples = [Sample(9 - n, n, (1,), (2,), source) for n, source in enumerate((*SOURCES, "dataset"))]
    assert collate(samples).sample_source.tolist() == [0, 1, 2, 2]
    assert collate([]).sample_source.shape == (0,)


# ---- forms -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(sample_lists(), st.integers(1, 8))
def test_pitfall_10_padded_tokens_are_exactly_the_samples_ids(samples, multiple):
    batch = collate(samples, pad_to_multiple_of=multiple, pad_id=PAD)
    longest = max((s.num_inputs for s in samples), default=1)
    assert batch.tokens.shape == batch.position_ids.shape == (max(1, len(samples)), -(-longest // multiple) * multiple)
    for row, places, s in zip(batch.tokens.tolist(), batch.position_ids.tolist(), samples, strict=bool(samples)):
        assert tuple(row[: s.num_inputs]) == (s.prompt_ids + s.completion_ids)[:-1]
        assert set(row[s.num_inputs :]) <= {PAD}
        assert places == list(range(len(row)))
    assert batch.cu_seqlens is None
    assert batch.max_seqlen is None
    check_loss_tokens(batch, samples)


@settings(deadline=None, max_examples=150)
@given(sample_lists(), st.integers(1, 8))
def test_pitfall_10_packed_tokens_are_exactly_the_samples_ids(samples, multiple):
    batch = collate(samples, pad_to_multiple_of=multiple, packing=True, pad_id=PAD)
    used = sum(s.num_inputs for s in samples)
    assert batch.tokens.shape == batch.position_ids.shape == (1, max(-(-used // multiple), 1) * multiple)
    borders = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == batch.tokens.shape[1]
    assert len(borders) - 1 == len(samples) + (batch.tokens.shape[1] > used)
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(borders))
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        segment = batch.tokens[0, start:end].tolist()
        assert segment == list(
            (samples[i].prompt_ids + samples[i].completion_ids)[:-1] if i < len(samples) else [PAD] * (end - start)
        )
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
    check_loss_tokens(batch, samples)


@pytest.mark.parametrize("packing", [False, True])
def test_pitfall_15_micro_batch_without_loss_tokens_collates(packing):
    batch = collate(
        [Sample(4, 0, (1, 2, 3), (), "student", 0), Sample(5, 1, (1, 2), (), "student", 0)], packing=packing
    )
    assert batch.lengths == (0, 0)
    assert batch.loss_index.shape == batch.labels.shape == batch.loss_sample.shape == (0,)
    assert batch.tokens.numel() > 0
    assert batch.loss_index.dtype == batch.labels.dtype == torch.int64
    # what a model computes from it keeps its graph, so a backward does the same collectives as on any other rank
    hidden = torch.zeros(batch.tokens.numel(), 3, requires_grad=True)
    hidden[batch.loss_index].sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("packing", [False, True])
def test_pitfall_15_micro_batch_without_samples_collates(packing):
    batch = collate([], packing=packing, pad_to_multiple_of=4, pad_id=PAD)
    assert batch.tokens.tolist() == [[PAD] * 4]
    assert batch.positions == batch.lengths == ()
    assert batch.labels.shape == (0,)
    if packing:
        assert batch.cu_seqlens.tolist() == [0, 4]


def test_pitfall_16_a_sample_twice_is_refused():
    sample = Sample(3, 0, (1, 2), (3,), "dataset")
    with pytest.raises(DataError, match="not distinct"):
        collate([sample, sample])


def test_nothing_to_feed_is_refused():
    with pytest.raises(DataError, match=r"sample 3 \(row 8\) has 1 prompt and 0 completion tokens"):
        collate([Sample(3, 8, (1,), (), "student", 0)])


def test_one_prompt_token_and_one_completion_token():
    batch = collate([Sample(0, 0, (5,), (6,), "dataset")])
    assert batch.tokens.tolist() == [[5]]
    assert batch.loss_index.tolist() == [0]
    assert batch.labels.tolist() == [6]


@pytest.mark.parametrize("packing", [False, True])
def test_the_teachers_batch_has_the_same_loss_tokens_after_its_own_prompt(packing):
    samples = [
        Sample(0, 0, (1, 2), (5, 6, 7), "dataset", teacher_prompt_ids=(9, 9, 9, 4)),
        Sample(1, 1, (1, 2, 3), (8,), "dataset"),
        Sample(2, 2, (1, 2, 3, 4), (6, 6), "dataset", teacher_prompt_ids=(3,)),
    ]
    student = collate(samples, packing=packing)
    teacher = collate([sample.for_teacher for sample in samples], packing=packing)
    for name in ("labels", "loss_sample"):
        assert torch.equal(getattr(student, name), getattr(teacher, name))
    assert student.lengths == teacher.lengths
    assert student.positions == teacher.positions
    fed = teacher.tokens.flatten()[teacher.loss_index]
    assert fed.tolist() == [4, 5, 6, 3, 3, 6], "the last prompt token, then the completion without its last token"
    assert student.tokens.flatten()[student.loss_index].tolist() == [2, 5, 6, 3, 4, 6]
