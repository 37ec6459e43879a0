"""Generalized JSD between two models whose logits are sharded over the vocabulary: exact value, exact gradient.

    P = softmax(teacher_t / temperature), Q = softmax(student_t / temperature), M = beta P + (1-beta) Q
    D_t = beta KL(P||M) + (1-beta) KL(Q||M);   beta = 0: D = KL(P||Q), forward KL;   beta = 1: D = KL(Q||P), reverse KL

The end points are a definition, not the limit: JSD_beta tends to 0 as beta tends to 0 or 1, so beta = 0.01 trains
about 100 times more weakly than beta = 0.

    beta = 0:      dD/dz_v = Q_v - P_v                                       z = student / temperature
    beta = 1:      dD/dz_v = Q_v (log(Q_v/P_v) - KL(Q||P))
    0 < beta < 1:  dD/dz_v = (1-beta) Q_v (log(Q_v/M_v) - KL(Q||M))

The gradient is computed in the forward and scaled in the backward; autograd never sees a collective.

Shapes: student_logits, teacher_logits [T, V/tp], the same global columns on a rank; result [T] float32 (float64 if
an input is). Padding (columns whose global id is >= vocab_size) has no probability and no gradient, whatever its
content, even NaN.

Communication, per chunk of C tokens, over tp_group: 1 all-gather of [5, C] (maximum and sum of exponentials of both
models, the teacher's logit at the student's maximum) and 1 all-reduce of [2, C] (the divergence sums). None in the
backward. The number of chunks depends on T, V/tp and the dtype, alike on every rank.

Memory: saved for backward is the gradient, one [T, V/tp] tensor in the student's dtype; temporaries are bounded by
sharded_softmax.CHUNK_BYTES. Inputs are never overwritten.

Does not: average over tokens, mask, scale by temperature^2, differentiate the teacher, or give second derivatives.
For the version that never holds [T, V/tp] at all see fused_linear_jsd.py.

Legend: T tokens, C tokens of a chunk, R ranks, v valid columns of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_gkd.loss import arguments as checks
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.divergence import Divergence, Sums
from megatron_gkd.loss.fused.dense import DenseSetting, dense_work
from megatron_gkd.loss.vocab_topk import vocab_parallel_argmax, vocab_parallel_topk
from megatron_gkd.parallel.collectives import all_gather_stack, all_reduce_sum_, require_group
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard

__all__ = ["vocab_parallel_argmax", "vocab_parallel_jsd", "vocab_parallel_topk"]


def vocab_parallel_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    tp_group: dist.ProcessGroup,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Divergence per token in nats, [T]; differentiable in `student_logits` only.

    Args:
        student_logits: [T, V/tp], any floating dtype.
        teacher_logits: [T, V/tp], any floating dtype, the same global columns.
        beta: 0 forward KL, 1 reverse KL, between: generalized JSD.
        tp_group: the ranks that hold the other columns; required (a one-rank group where there are none).
        temperature: both logits are divided by it.
        vocab_size: size of the true vocabulary; None: no padding. Required where the last shard is shorter.
    """
    divergence = Divergence(beta, temperature)
    return vocab_parallel_divergence(
        student_logits, teacher_logits, divergence, tp_group=tp_group, vocab_size=vocab_size
    )


def vocab_parallel_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    divergence: Divergence,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """`vocab_parallel_jsd` with a `Divergence` in place of beta and temperature."""
    group = require_group(tp_group)
    checks.check_matrix("student_logits", student_logits)
    checks.check_matrix("teacher_logits", teacher_logits)
    checks.check_same_device(student_logits=student_logits, teacher_logits=teacher_logits)
    checks.check_same_tokens(student_logits=student_logits, teacher_logits=teacher_logits)
    checks.check_same_columns("student_logits", student_logits.shape[1], "teacher_logits", teacher_logits.shape[1])
    shard = vocab_shard(student_logits.shape[1], rank=group.rank(), tp_size=group.size(), vocab_size=vocab_size)
    keep_grad = torch.is_grad_enabled() and student_logits.requires_grad
    args = (divergence, shard, group, keep_grad)
    result: torch.Tensor = _VocabParallelDivergence.apply(student_logits, teacher_logits.detach(), *args)
    return result


class _VocabParallelDivergence(torch.autograd.Function):
    """Forward: values and gradient. Backward: gradient times grad_output."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, student_Tv, teacher_Tv, divergence: Divergence, shard: VocabShard, group, keep_grad
    ):
        num_tokens = student_Tv.shape[0]
        dtype = sm.compute_dtype(student_Tv, teacher_Tv)
        chunk = sm.chunk_tokens_for(2 * shard.max_columns * dtype.itemsize)
        grad_Tv = torch.empty_like(student_Tv, memory_format=torch.contiguous_format) if keep_grad else None
        values_T = torch.empty(num_tokens, dtype=dtype, device=student_Tv.device)
        setting = DenseSetting(
            student_Tv.dtype, teacher_Tv.dtype, dtype, student_Tv.device, shard.num_valid, shard.start, divergence,
            own_logits=False, keep=keep_grad,
        )  # fmt: skip
        dense = dense_work(setting, min(chunk, num_tokens))
        for rows in sm.token_chunks(num_tokens, chunk):
            student_Cv, teacher_Cv = student_Tv[rows, : shard.num_valid], teacher_Tv[rows, : shard.num_valid]
            # Communication: all-gather [5, C], then all-reduce [2, C], compute dtype, over `group`.
            norm = divergence.norm(all_gather_stack(dense.stats(student_Cv, teacher_Cv), group), group.rank())
            sums = Sums(*all_reduce_sum_(torch.stack(dense.sums(student_Cv, teacher_Cv, norm)), group))
            values_T[rows] = divergence.value(sums, norm.anchor_C)
            if grad_Tv is not None:
                one_C, out_Cv = torch.ones_like(sums.centre_C), grad_Tv[rows, : shard.num_valid]
                dense.gradient(student_Cv, teacher_Cv, norm, sums.centre_C, one_C, out_Cv=out_Cv)
        if grad_Tv is not None:
            grad_Tv[:, shard.num_valid :] = 0  # padding
            ctx.save_for_backward(grad_Tv)
        ctx.chunk = chunk
        return values_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output_T):  # type: ignore[no-untyped-def]
        (saved_Tv,) = ctx.saved_tensors
        grad_Tv = torch.empty_like(saved_Tv)  # a second tensor: a retained graph may come back for the first
        for rows in sm.token_chunks(saved_Tv.shape[0], ctx.chunk):  # one rounding, from the wider of the two dtypes
            torch.mul(saved_Tv[rows], grad_output_T[rows].unsqueeze(-1), out=grad_Tv[rows])
        return (grad_Tv,) + (None,) * 5
