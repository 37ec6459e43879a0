"""Generalized JSD against a sparse teacher: K log-probabilities per token instead of V logits.

    tail="renormalize" (the definition of the method)   P', Q' = both models renormalised on the teacher's K tokens
    tail="bucket"                                       P', Q' over K + 1 outcomes, the last one "everything else"
    D_t = JSD_beta(P', Q');   beta = 0: KL(P'||Q'), beta = 1: KL(Q'||P')

The end points are a definition, not the limit (see vocab_parallel_jsd.py).

Both are divergences between two distributions: >= 0, and 0 only if these are equal. `renormalize` ignores the mass that
the student puts outside the support. `bucket` includes it, and is at most the divergence over the full vocabulary.
`topk_masses` gives both models' mass inside. Formulas and numerics: loss/outcomes.py and loss/divergence.py.

Temperature: `topk_logprobs` are the teacher's log-probabilities at temperature 1. `renormalize` divides them and the
student's logits by `temperature` and renormalises on the support, which equals renormalising the two tempered
distributions. `bucket` needs the teacher's mass outside at that temperature, which cannot be computed from K numbers:
only temperature = 1 is accepted.

Shapes: student_logits [T, V/tp]; topk_logprobs, topk_indices [T, K], alike on every rank, indices are global ids
(negative: absent, no probability on either side). Result [T] float32 (float64 for float64 logits). K may exceed
V/tp; an index may lie in any shard.

Communication over tp_group, forward: 1 all-reduce of [T, K] (student logits at the support, each from the rank that
holds it); `bucket` and `topk_masses` also 1 all-gather of [2, T] (maximum and sum of exponentials outside the
support). Backward: none.

Memory: saved for backward are [T, K] tensors, and with `bucket` the student's logits themselves (no copy). Inputs
are never overwritten. Differentiable in student_logits only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_gkd.loss import arguments as checks
from megatron_gkd.loss import outcomes as sp
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.parallel.collectives import all_gather_stack, all_reduce_sum_, require_group
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard


class SupportMasses(NamedTuple):
    """Probability inside the support at temperature 1, [T] each, detached."""

    teacher: torch.Tensor
    student: torch.Tensor


def topk_jsd(
    student_logits: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    *,
    beta: float,
    tp_group: dist.ProcessGroup,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tail: sp.Tail = "renormalize",
) -> torch.Tensor:
    """Divergence per token in nats, [T]; differentiable in `student_logits` only."""
    return topk_divergence(
        student_logits, topk_logprobs, topk_indices, Divergence(beta, temperature), tp_group=tp_group,
        vocab_size=vocab_size, tail=tail,
    )  # fmt: skip


def topk_divergence(
    student_logits: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    divergence: Divergence,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None = None,
    tail: sp.Tail = "renormalize",
) -> torch.Tensor:
    """`topk_jsd` with a `Divergence` in place of beta and temperature."""
    temperature = divergence.temperature
    group, shard = _prepare(student_logits, topk_logprobs, topk_indices, tp_group, vocab_size, tail, temperature)
    args = (divergence, shard, group, sp.has_tail(topk_indices.shape[1], shard, tail))
    result: torch.Tensor = _TopKDivergence.apply(student_logits, topk_logprobs.detach(), topk_indices, *args)
    return result


@torch.no_grad()
def topk_masses(
    student_logits: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None = None,
) -> SupportMasses:
    """(teacher, student) probability inside the support, [T] each.

    Communication: 1 all-reduce of [T, K] and 1 all-gather of [2, T] over `tp_group`.
    """
    group, shard = _prepare(student_logits, topk_logprobs, topk_indices, tp_group, vocab_size, "renormalize", 1.0)
    dtype = sm.compute_dtype(student_logits)
    owned = sp.OwnedIds.of(topk_indices, shard)
    valid_Tv = student_logits[:, : shard.num_valid]
    logits_TK = all_reduce_sum_(owned.gather(valid_Tv, dtype), group)
    tail_lse_T = _tail_lse(valid_Tv, owned, group)
    return support_masses(logits_TK, tail_lse_T, topk_logprobs, topk_indices, dtype)


def support_masses(
    logits_TK: torch.Tensor,
    tail_lse_T: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    dtype: torch.dtype,
) -> SupportMasses:
    """Both masses from the student's logits at the support and its log-sum-exp outside, both from all ranks."""
    absent_TK = topk_indices < 0
    inside_T = torch.logsumexp(logits_TK.double().masked_fill(absent_TK, -torch.inf), dim=1)
    teacher_T = topk_logprobs.double().masked_fill(absent_TK, -torch.inf).exp().sum(1)
    return SupportMasses(teacher_T.to(dtype), torch.sigmoid(inside_T - tail_lse_T).to(dtype))


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, student_Tv, topk_logprobs, topk_indices, divergence: Divergence, shard: VocabShard, group, tail
    ):
        dtype = sm.compute_dtype(student_Tv)
        owned = sp.OwnedIds.of(topk_indices, shard)
        valid_Tv = student_Tv[:, : shard.num_valid]
        logits_TK = all_reduce_sum_(owned.gather(valid_Tv, dtype), group)
        tail_lse_T = _tail_lse(valid_Tv, owned, group) if tail else None
        loss = sp.support_loss(logits_TK, tail_lse_T, topk_logprobs, topk_indices, divergence)
        # Only the tail's part of the gradient needs the logits again; the input is saved, not a copy.
        ctx.save_for_backward(topk_indices, loss.grad_TO, *((student_Tv, tail_lse_T) if tail else ()))
        ctx.shard, ctx.like = shard, (student_Tv.shape, student_Tv.dtype)
        return loss.divergence_T.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output_T):  # type: ignore[no-untyped-def]
        topk_indices, grad_TO, *tail = ctx.saved_tensors
        shape, dtype = ctx.like
        grad_Tv = torch.zeros(shape, dtype=dtype, device=grad_TO.device)
        valid_Tv = grad_Tv[:, : ctx.shard.num_valid]
        weighted_TO = grad_TO * grad_output_T.double().unsqueeze(1)
        logits_Tv, tail_lse_T = (tail[0][:, : ctx.shard.num_valid], tail[1]) if tail else (valid_Tv, None)
        scratch_Bv1 = sp.scratch_for(valid_Tv)
        sp.write_gradient_(
            valid_Tv, logits_Tv, sp.OwnedIds.of(topk_indices, ctx.shard), weighted_TO, tail_lse_T, scratch_Bv1
        )
        return (grad_Tv,) + (None,) * 6


def _prepare(
    student_logits: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None,
    tail: str,
    temperature: float,
) -> tuple[dist.ProcessGroup, VocabShard]:
    group = require_group(tp_group)
    checks.check_matrix("student_logits", student_logits)
    shard = vocab_shard(student_logits.shape[1], rank=group.rank(), tp_size=group.size(), vocab_size=vocab_size)
    sp.check_support(topk_logprobs, topk_indices, shard, tail, temperature)
    checks.check_same_tokens(student_logits=student_logits, topk_logprobs=topk_logprobs)
    checks.check_same_device(student_logits=student_logits, topk_logprobs=topk_logprobs, topk_indices=topk_indices)
    return group, shard


def _tail_lse(valid_Tv: torch.Tensor, owned: sp.OwnedIds, group: dist.ProcessGroup) -> torch.Tensor:
    """Log-sum-exp over every rank's columns outside the support, [T] float64. Communication: 1 all-gather of [2, T]."""
    stats_R2T = all_gather_stack(sp.tail_stats(valid_Tv, owned, sp.scratch_for(valid_Tv)), group)
    return sm.combine_lse(stats_R2T[:, 0], stats_R2T[:, 1], 1.0)
