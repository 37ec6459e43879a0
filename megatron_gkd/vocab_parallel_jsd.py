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
divergence.CHUNK_BYTES. Inputs are never overwritten.

Does not: average over tokens, mask, scale by temperature^2, differentiate the teacher, or give second derivatives.
For the version that never holds [T, V/tp] at all see fused_linear_jsd.py.

Legend: T tokens, C tokens of a chunk, R ranks, v valid columns of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_gkd import checks, kernels
from megatron_gkd import divergence as dv
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
    group = require_group(tp_group)
    checks.check_beta(beta)
    checks.check_temperature(temperature)
    checks.check_matrix("student_logits", student_logits)
    checks.check_matrix("teacher_logits", teacher_logits)
    checks.check_same_device(student_logits=student_logits, teacher_logits=teacher_logits)
    checks.check_same_tokens(student_logits=student_logits, teacher_logits=teacher_logits)
    checks.check_same_columns("student_logits", student_logits.shape[1], "teacher_logits", teacher_logits.shape[1])
    shard = vocab_shard(student_logits.shape[1], rank=group.rank(), tp_size=group.size(), vocab_size=vocab_size)
    keep_grad = torch.is_grad_enabled() and student_logits.requires_grad
    args = (float(beta), 1.0 / temperature, shard, group, keep_grad)
    result: torch.Tensor = _VocabParallelJSD.apply(student_logits, teacher_logits.detach(), *args)
    return result


class _VocabParallelJSD(torch.autograd.Function):
    """Forward: values and gradient. Backward: gradient times grad_output."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, student_Tv, teacher_Tv, beta, inverse_temperature, shard: VocabShard, group, keep_grad
    ):
        num_tokens = student_Tv.shape[0]
        dtype = dv.compute_dtype(student_Tv, teacher_Tv)
        chunk = dv.chunk_tokens_for(2 * shard.max_columns * dtype.itemsize)
        grad_Tv = torch.empty_like(student_Tv, memory_format=torch.contiguous_format) if keep_grad else None
        values_T = torch.empty(num_tokens, dtype=dtype, device=student_Tv.device)
        work = None
        if not kernels.chosen(student_Tv.device, student_Tv.dtype, teacher_Tv.dtype):
            work = _Workspace(min(chunk, num_tokens), shard.num_valid, dtype, student_Tv.device, keep_grad)
        for rows in dv.token_chunks(num_tokens, chunk):
            values_T[rows] = _chunk(
                student_Tv[rows, : shard.num_valid],
                teacher_Tv[rows, : shard.num_valid],
                None if grad_Tv is None else grad_Tv[rows, : shard.num_valid],
                work, beta, inverse_temperature, group,
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
        for rows in dv.token_chunks(saved_Tv.shape[0], ctx.chunk):  # one rounding, from the wider of the two dtypes
            torch.mul(saved_Tv[rows], grad_output_T[rows].unsqueeze(-1), out=grad_Tv[rows])
        return (grad_Tv,) + (None,) * 6


class _Workspace:
    """Buffers that every chunk reuses: g and Q [C, v] (one block of rows where no gradient is wanted) and 2 scratch
    blocks.
    """

    def __init__(
        self, num_tokens: int, num_columns: int, dtype: torch.dtype, device: torch.device, keep_grad: bool
    ) -> None:
        block = dv.block_tokens_for(num_tokens, num_columns, dtype, device)
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
    beta: float,
    inverse_temperature: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Values [C] of one chunk; its gradient into `grad_out_Cv` (no gradient where None). `work` is None where the
    kernels take over.

    Communication: all-gather [5, C], then all-reduce [2, C], compute dtype, over `group`.
    """
    num_tokens = student_Cv.shape[0]
    if work is None:
        return _chunk_by_kernels(student_Cv, teacher_Cv, grad_out_Cv, beta, inverse_temperature, group)
    stats_5C = dv.dense_stats(student_Cv, teacher_Cv, inverse_temperature, work.scratch_nBv[0])
    norm = dv.dense_norm(all_gather_stack(stats_5C, group), group.rank(), beta, inverse_temperature)

    keep = slice(0, num_tokens if grad_out_Cv is not None else None)
    g_Cv, q_Cv = work.g_Cv[keep], work.q_Cv[keep]
    sums = dv.dense_pass_(
        student_Cv, teacher_Cv, norm, beta=beta, inverse_temperature=inverse_temperature,
        g_out_Cv=g_Cv, q_out_Cv=q_Cv, scratch_nBv=work.scratch_nBv, keep=grad_out_Cv is not None,
    )  # fmt: skip
    sums = dv.Sums(*all_reduce_sum_(torch.stack(sums), group))
    if grad_out_Cv is not None:
        factor_C = dv.row_scale(norm, beta) * (dv.gradient_factor(beta) * inverse_temperature)
        for rows in dv.token_chunks(num_tokens, work.scratch_nBv.shape[1]):
            grad_Bv = dv.add_centre_(g_Cv[rows], q_Cv[rows], sums.centre_C[rows].unsqueeze(-1), beta)
            torch.mul(grad_Bv, factor_C[rows].unsqueeze(-1), out=grad_out_Cv[rows])
    return dv.finish_divergence(sums, norm.anchor_C, beta)


def _chunk_by_kernels(
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    grad_out_Cv: torch.Tensor | None,
    beta: float,
    inverse_temperature: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """`_chunk` with the same two collectives, and no [C, v] temporaries."""
    from megatron_gkd.kernels import launch

    stats_5C = launch.stats(student_Cv, teacher_Cv, inverse_temperature)
    norm = dv.dense_norm(all_gather_stack(stats_5C, group), group.rank(), beta, inverse_temperature)
    sums = launch.sums(student_Cv, teacher_Cv, norm, beta=beta, inverse_temperature=inverse_temperature)
    sums = dv.Sums(*all_reduce_sum_(torch.stack(sums), group))
    if grad_out_Cv is not None:
        launch.gradient_(
            grad_out_Cv, student_Cv, teacher_Cv, norm, beta=beta, inverse_temperature=inverse_temperature,
            centre_C=sums.centre_C, weight_C=torch.ones_like(sums.centre_C),
        )  # fmt: skip
    return dv.finish_divergence(sums, norm.anchor_C, beta)
