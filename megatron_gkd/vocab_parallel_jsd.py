"""Generalized JSD between two models whose logits are sharded over the vocabulary: exact value, exact gradient.

    P = softmax(teacher_t / temperature), Q = softmax(student_t / temperature), M = beta P + (1-beta) Q
    D_t = beta KL(P||M) + (1-beta) KL(Q||M);   beta = 0: D = KL(P||Q), forward KL;   beta = 1: D = KL(Q||P), reverse KL

The end points are a definition, not the limit: JSD_beta tends to 0 as beta tends to 0 or 1, so beta = 0.01 trains
about 100 times more weakly than beta = 0.

    beta = 0:      dD/dz_v = Q_v - P_v                                       z = student / temperature
    beta = 1:      dD/dz_v = Q_v (log(Q_v/P_v) - KL(Q||P))
    0 < beta < 1:  dD/dz_v = (1-beta) Q_v (log(Q_v/M_v) - KL(Q||M))

The gradient is formed in the forward and scaled in the backward; autograd never sees a collective.

Shapes: student_logits, teacher_logits [T, V/tp], the same global columns on a rank; result [T] float32 (float64 if
an input is). Padding (columns whose global id is >= vocab_size) has no probability and no gradient, whatever it
holds, NaN included.

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

from megatron_gkd import checks, kernels
from megatron_gkd import sharded_softmax as sm
from megatron_gkd.divergence import Divergence, Sums
from megatron_gkd.parallel.collectives import all_gather_stack, all_reduce_sum_, require_group
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard
from megatron_gkd.vocab_parallel_topk import vocab_parallel_argmax, vocab_parallel_topk

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
    """`vocab_parallel_jsd` of a divergence that is made already."""
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
        work = None
        if not kernels.chosen(student_Tv.device, student_Tv.dtype, teacher_Tv.dtype):
            work = _Workspace(min(chunk, num_tokens), shard.num_valid, dtype, student_Tv.device, keep_grad)
        for rows in sm.token_chunks(num_tokens, chunk):
            values_T[rows] = _chunk(
                student_Tv[rows, : shard.num_valid],
                teacher_Tv[rows, : shard.num_valid],
                None if grad_Tv is None else grad_Tv[rows, : shard.num_valid],
                work, divergence, group,
            )  # fmt: skip
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


class _Workspace:
    """Buffers that every chunk reuses: g and Q [C, v] (one block of rows where no gradient is wanted) and 2 scratch
    blocks.
    """

    def __init__(
        self, num_tokens: int, num_columns: int, dtype: torch.dtype, device: torch.device, keep_grad: bool
    ) -> None:
        block = sm.block_tokens_for(num_tokens, num_columns, dtype, device)
        self.keep_grad = keep_grad
        rows = num_tokens if keep_grad else block
        self.g_Cv = torch.empty(rows, num_columns, dtype=dtype, device=device)
        self.q_Cv = torch.empty(rows, num_columns, dtype=dtype, device=device)
        self.scratch_nBv = torch.empty(2, block, num_columns, dtype=dtype, device=device)


def _chunk(
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    grad_out_Cv: torch.Tensor | None,
    work: _Workspace | None,
    divergence: Divergence,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Values [C] of one chunk; its gradient into `grad_out_Cv` (no gradient where None). `work` is None where the
    kernels take over.

    Communication: all-gather [5, C], then all-reduce [2, C], compute dtype, over `group`.
    """
    num_tokens = student_Cv.shape[0]
    if work is None:
        return _chunk_by_kernels(student_Cv, teacher_Cv, grad_out_Cv, divergence, group)
    stats_5C = divergence.stats(student_Cv, teacher_Cv, work.scratch_nBv[0])
    norm = divergence.norm(all_gather_stack(stats_5C, group), group.rank())

    keep = slice(0, num_tokens if grad_out_Cv is not None else None)
    g_Cv, q_Cv = work.g_Cv[keep], work.q_Cv[keep]
    sums = divergence.dense_pass_(
        student_Cv, teacher_Cv, norm,
        g_out_Cv=g_Cv, q_out_Cv=q_Cv, scratch_nBv=work.scratch_nBv, keep=grad_out_Cv is not None,
    )  # fmt: skip
    sums = Sums(*all_reduce_sum_(torch.stack(sums), group))
    if grad_out_Cv is not None:
        factor_C = divergence.row_scale(norm) * divergence.gradient_factor
        for rows in sm.token_chunks(num_tokens, work.scratch_nBv.shape[1]):
            grad_Bv = divergence.add_centre_(g_Cv[rows], q_Cv[rows], sums.centre_C[rows].unsqueeze(-1))
            torch.mul(grad_Bv, factor_C[rows].unsqueeze(-1), out=grad_out_Cv[rows])
    return divergence.value(sums, norm.anchor_C)


def _chunk_by_kernels(
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    grad_out_Cv: torch.Tensor | None,
    divergence: Divergence,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """`_chunk` with the same two collectives, and no [C, v] temporaries."""
    from megatron_gkd.kernels import launch

    stats_5C = launch.stats(student_Cv, teacher_Cv, divergence)
    norm = divergence.norm(all_gather_stack(stats_5C, group), group.rank())
    sums = launch.sums(student_Cv, teacher_Cv, norm, divergence)
    sums = Sums(*all_reduce_sum_(torch.stack(sums), group))
    if grad_out_Cv is not None:
        launch.gradient_(
            grad_out_Cv, student_Cv, teacher_Cv, norm, divergence,
            centre_C=sums.centre_C, weight_C=torch.ones_like(sums.centre_C),
        )  # fmt: skip
    return divergence.value(sums, norm.anchor_C)
