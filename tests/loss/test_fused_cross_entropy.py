"""The cross entropy straight from hidden states, on gloo ranks TP 1, 2, 4, against dense float64 truth: values,
gradients, collectives, what is saved.

What it shares with the distillation losses (chunk sizes, megatron-core's buffers, retained graphs):
test_fused_linear_jsd.py. Does not cover: CUDA, sequence parallelism (test_supervised.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.fused_linear_jsd import fused_linear_cross_entropy, fused_linear_distill
from megatron_gkd.loss import reference as ref
from megatron_gkd.loss.divergence import Divergence
from tests.support.losses import LIMIT, count_collectives, record_saved, refusals, relative_error, rows
from tests.support.numerics import FACTOR
from tests.support.ranks import one_rank_group, run_ranks, tp_group

PADDED, VOCAB, TOKENS, HIDDEN = 64, 61, 13, 24


def problem(dtype: torch.dtype, num_tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    """(hidden, head, labels, weights), the same on every rank; some labels are ignored."""
    hidden, head = torch.randn(num_tokens, HIDDEN).to(dtype), (torch.randn(PADDED, HIDDEN) * 0.5).to(dtype)
    labels = torch.randint(0, VOCAB, (num_tokens,))
    if num_tokens > 3:
        labels[3], labels[1] = -100, 32  # ignored; local token 0 of a shard
    return hidden, head, labels, torch.rand(num_tokens)


def truth(logits: torch.Tensor, given: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    hidden, head, labels, weights = given
    values = ref.cross_entropy(logits, labels, vocab_size=VOCAB)
    grad = ref.cross_entropy_grad(logits, labels, vocab_size=VOCAB) * weights.double().unsqueeze(1)
    loss_sum = (values * weights.double()).sum()
    return dict(loss_sum=loss_sum, values=values, hidden=grad @ head.double(), head=grad.T @ hidden.double())


def against_truth(dtype: torch.dtype, chunk_tokens: int | None) -> dict[str, float]:
    """Errors, in units of what is allowed."""
    group, given = tp_group(dist.get_world_size()), problem(dtype)
    hidden, head, labels, weights = given
    leaf, shard = hidden.clone().requires_grad_(), rows(head, group).requires_grad_()
    found = fused_linear_cross_entropy(
        leaf, shard, labels, tp_group=group, vocab_size=VOCAB, label_weights=weights, chunk_tokens=chunk_tokens
    )
    hidden_grad, head_grad = torch.autograd.grad(found.loss_sum, (leaf, shard))
    assert found.cross_entropy is not None
    assert not found.per_token.any()
    exact = truth(hidden.double() @ head.double().T, given)
    rounded = truth((hidden @ head.T).double(), given)
    allowed = {name: FACTOR * relative_error(rounded[name], exact[name]) + LIMIT[dtype] for name in exact}
    errors = dict(
        loss_sum=relative_error(found.loss_sum.detach(), exact["loss_sum"]),
        values=relative_error(found.cross_entropy, exact["values"]),
        hidden=relative_error(hidden_grad, exact["hidden"]),
        head=((head_grad - rows(exact["head"], group)).norm() / exact["head"].norm()).item(),
    )
    return {name: error / allowed[name] for name, error in errors.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "chunk_tokens"), [(torch.float64, 5), (torch.float32, None), (torch.float32, 4)])
def test_values_and_gradients(dtype: torch.dtype, chunk_tokens: int | None, world: int) -> None:
    for ratios in run_ranks(against_truth, dtype, chunk_tokens, world=world):
        assert max(ratios.values()) <= 1, ratios


def in_bfloat16() -> dict[str, tuple[float, float]]:
    """Errors against the float64 truth: (of the fused loss, of plain autograd in bfloat16)."""
    group, given = one_rank_group(), problem(torch.bfloat16)
    hidden, head, labels, weights = given
    exact = truth(hidden.double() @ head.double().T, given)
    leaves = [[x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2)]
    fused = fused_linear_cross_entropy(*leaves[0], labels, tp_group=group, vocab_size=VOCAB, label_weights=weights)
    logits = (leaves[1][0] @ leaves[1][1].T)[:, :VOCAB]
    values = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    losses = fused.loss_sum, (values * weights).sum()
    grads = [torch.autograd.grad(loss, both) for loss, both in zip(losses, leaves, strict=True)]
    return {
        name: tuple(relative_error(grad[index], exact[name]) for grad in grads)  # type: ignore[misc]
        for index, name in enumerate(("hidden", "head"))
    }


def test_bfloat16_is_at_most_twice_as_wrong_as_the_naive_way() -> None:
    ((found),) = run_ranks(in_bfloat16, world=1)
    for name, (fused, naive) in found.items():
        assert fused <= 2 * naive, (name, fused, naive)


def communication(num_tokens: int) -> tuple[Any, ...]:
    group = tp_group(2)
    hidden, head, labels, _ = problem(torch.float32, num_tokens)
    leaf, shard = hidden.clone().requires_grad_(), rows(head, group).requires_grad_()
    counts = []
    for ids in (labels, torch.full_like(labels, -1)):
        with record_saved() as saved, count_collectives() as forward:
            loss = fused_linear_cross_entropy(leaf, shard, ids, tp_group=group, vocab_size=VOCAB, chunk_tokens=4)
        with count_collectives() as backward:
            leaf.grad = shard.grad = None
            loss.loss_sum.backward()
        counts.append((len(forward), list(backward.calls), len(saved)))
    return counts[0], counts[1], float(leaf.grad.abs().sum() + shard.grad.abs().sum())  # type: ignore[union-attr]


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_the_same_collectives_whatever_the_tokens(num_tokens: int) -> None:
    for full, ignored, zero in run_ranks(communication, num_tokens, world=2):
        assert full == ignored == (-(-num_tokens // 4), [("all_reduce", (num_tokens, HIDDEN))], 0)
        assert zero == 0.0


def messages() -> dict[str, str]:
    hidden, head, labels, _ = problem(torch.float32)
    group = one_rank_group()

    def alone(**given: Any) -> Any:
        return fused_linear_distill(hidden, head, None, Divergence(0.0), tp_group=group, **given)

    return refusals(
        {
            "nothing": alone,
            "agreement": lambda: alone(labels=labels.clamp(min=0), report_agreement=True),
            "labels": lambda: fused_linear_cross_entropy(hidden, head, labels[:5], tp_group=group),
        }
    )


def test_bad_input() -> None:
    (found,) = run_ranks(messages, world=1)
    assert "neither a teacher nor labels were given" in found["nothing"]
    assert "report_agreement without a teacher was given" in found["agreement"]
    assert "labels [5] was given, [13] is needed" in found["labels"]
