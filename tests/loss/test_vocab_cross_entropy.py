"""Our cross entropy against the dense truth, and megatron-core's own, which overwrites its input (fault 14).

Does not cover: label smoothing (not offered), CUDA.
"""

import inspect

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, ShapeError
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd
from tests.support.losses import (
    FLOAT32_LIMIT,
    LIMIT,
    columns,
    count_collectives,
    gradient_error,
    record_saved,
    relative_error,
    worst,
)
from tests.support.ranks import one_rank_group, run_ranks, tp_group

LIMIT = LIMIT | {torch.bfloat16: 4e-3}  # bfloat16: the gradient's own rounding


def _against_truth(dtype):
    group = tp_group(dist.get_world_size())
    logits = (torch.randn(11, 64, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(0, 61, (11,))
    labels[[2, 7]] = -100
    labels[:2] = torch.tensor([0, 32])  # local token 0 of a shard
    weight = torch.randn(11)
    shard = columns(logits, group)
    shard[:, max(61 - group.rank() * shard.shape[1], 0) :] = torch.nan  # padding holds anything
    before = shard.clone()
    shard.requires_grad_()
    with count_collectives() as forward, record_saved() as saved:
        value = vocab_parallel_cross_entropy(shard, labels, tp_group=group, vocab_size=61)
    with count_collectives() as backward:
        value.backward(weight.to(value.dtype))
    assert torch.equal(shard.detach().nan_to_num(7.0), before.nan_to_num(7.0)), "the input was overwritten"
    assert len(forward) == (group.size() > 1)
    assert len(backward) == 0
    assert [x.data_ptr() for x in saved if x.dim() == 2] == [shard.data_ptr()], "no copy of the logits is kept"
    truth_grad = ref.cross_entropy_grad(logits, labels, vocab_size=61) * weight.double().unsqueeze(1)
    return [
        ("value", relative_error(value, ref.cross_entropy(logits, labels, vocab_size=61))),
        ("grad", gradient_error(shard.grad, truth_grad, group)),
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", LIMIT)
def test_value_and_gradient(dtype, world):
    error, name = worst(run_ranks(_against_truth, dtype, world=world))
    assert error <= LIMIT[dtype], name


def _gradcheck():
    group, labels = one_rank_group(), torch.tensor([0, 4, -1])
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, labels, tp_group=group, vocab_size=5), logits)


def test_gradcheck():
    run_ranks(_gradcheck, world=1)


def _megatron_then_divergence():
    """Divergence after cross entropy on the same float32 logits: (with megatron-core's, with ours), relative errors."""
    from megatron.core.tensor_parallel import cross_entropy as theirs

    group = tp_group(2)
    student, teacher = torch.randn(8, 32), torch.randn(8, 32)
    labels = torch.randint(0, 32, (8,))
    truth = ref.generalized_jsd(student, teacher, beta=0.5)
    errors = []
    patched = {
        "get_tensor_model_parallel_group": lambda: group,
        "get_tensor_model_parallel_rank": group.rank,
        "get_tensor_model_parallel_world_size": group.size,
    }
    kept = {name: getattr(theirs, name) for name in patched if hasattr(theirs, name)}
    takes_group = "tp_group" in inspect.signature(theirs.vocab_parallel_cross_entropy).parameters
    try:
        for name in kept:
            setattr(theirs, name, patched[name])
        for ours in (False, True):
            shard = columns(student, group)
            if ours:
                value = vocab_parallel_cross_entropy(shard, labels, tp_group=group)
            else:
                # megatron-core's shape is [S, B, V/tp]; its arithmetic is right, what it does to its input is the
                # fault.
                extra = {"tp_group": group} if takes_group else {}
                value = theirs.vocab_parallel_cross_entropy(shard.unsqueeze(1), labels.unsqueeze(1), **extra).squeeze(1)
            assert relative_error(value, ref.cross_entropy(student, labels)) < FLOAT32_LIMIT
            divergence = vocab_parallel_jsd(shard, columns(teacher, group), beta=0.5, tp_group=group)
            errors.append(relative_error(divergence, truth))
    finally:
        for name, original in kept.items():
            setattr(theirs, name, original)
    return errors


def test_pitfall_14_cross_entropy_leaves_the_logits_to_the_divergence():
    for with_megatron, with_ours in run_ranks(_megatron_then_divergence, world=2):
        assert with_megatron > 0.01, "megatron-core no longer overwrites its input: this warning can go"
        assert with_ours < FLOAT32_LIMIT


def _edge_cases():
    group = tp_group(2)
    empty = torch.zeros(0, 16, requires_grad=True)
    with count_collectives() as counter:
        vocab_parallel_cross_entropy(empty, torch.zeros(0, dtype=torch.int64), tp_group=group).sum().backward()
    ignored = torch.randn(3, 16, requires_grad=True)
    value = vocab_parallel_cross_entropy(ignored, torch.full((3,), -100), tp_group=group)
    value.sum().backward()
    big = (1e4 * torch.randn(4, 16).sign()).requires_grad_()
    extreme = vocab_parallel_cross_entropy(big, torch.tensor([0, 5, 16, 31]), tp_group=group)
    extreme.sum().backward()
    finite = bool(torch.isfinite(extreme).all() and torch.isfinite(big.grad).all())
    return len(counter), tuple(empty.grad.shape), value.abs().max().item(), ignored.grad.abs().max().item(), finite


def test_pitfall_15_no_tokens_and_no_labels():
    assert run_ranks(_edge_cases, world=2) == [(1, (0, 16), 0.0, 0.0, True)] * 2


def _messages():
    group, x, ids = one_rank_group(), torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    messages = []
    for call in (
        lambda: vocab_parallel_cross_entropy(x, ids, tp_group=None),
        lambda: vocab_parallel_cross_entropy(x, ids[:3], tp_group=group),
        lambda: vocab_parallel_cross_entropy(x, ids + 8, tp_group=group),
        lambda: vocab_parallel_cross_entropy(x, ids.float(), tp_group=group),
    ):
        with pytest.raises((ConfigError, ShapeError)) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_bad_input_is_refused():
    (messages,) = run_ranks(_messages, world=1)
    assert "tp_group=None was given" in messages[0]
    assert "labels [3] was given, [4] is needed" in messages[1]
    assert "labels up to 8 was given, ids below the vocabulary size 8" in messages[2]
    assert "integer token ids are needed" in messages[3]
