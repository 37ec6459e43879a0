"""The arithmetic that all losses share: token chunks, sharded softmax statistics, divergence and gradient.

One home per formula; `reference.py` is written independently of this file and is what it is tested against.

With d_v = log(P_v / Q_v), and for 0 < beta < 1   w_v = log(M_v / Q_v):

    beta = 0:      D = sum P d                                     dD/dz = Q - P
    beta = 1:      D = -sum Q d            S = -sum Q d            dD/dz = -Q (d + S)
    0 < beta < 1:  D = beta sum P (d - w) + (1-beta) S
                   S = -sum Q w                                    dD/dz = -(1-beta) Q (w + S)

w comes from the smaller of two logarithms (`_small_log`): exact at P = Q (D = 0, not 1e-7), no overflow, no log M, no
difference of entropies.

The anchor. Where one token holds nearly all of Q, w + S is a small difference of large numbers and float32 loses it.
So w (or d) is taken relative to its value at the student's most probable token, `anchor`, a number per row that all
ranks share:
    g = Q (w - anchor),   centre = -sum g,   S = centre - anchor,   dD/dz = factor * (g + centre * Q)
Nothing large is left to cancel; at beta = 0, g = Q - P and no centre is needed. Only `centre` and D are sums over
the whole vocabulary: one all-reduce of [2, C] finishes both.

Numbers: [C, v] work is float32 (float64 if an input is float64); what is [C] (maxima, log-sum-exps, offsets) is
combined in float64, since one rounding of a log-sum-exp would shift every d of the row alike. d is bounded by
+-LOG_RATIO_BOUND (see reference.py). -inf logits give probability 0 exactly; NaN stays NaN.

Legend: T tokens, C tokens of a chunk, R ranks of the group, v = V/tp valid columns of this rank. No collectives in
this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_gkd.reference import LOG_RATIO_BOUND

CHUNK_BYTES = 64 * 2**20  # of the [C, v] buffers of one token chunk
_BLOCK_BYTES_CPU = 2**19  # of one scratch buffer: a few of them fit into a core's L2 cache
_SEGMENT_CPU = 1024  # columns; see _max_by_segments
_LOWEST = -1e30  # at or below it a logit is a mask; stands in for -inf where a difference of two would be NaN


# ---- token chunks ---------------------------------------------------------------------------------------------------


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def chunk_tokens_for(row_bytes: int) -> int:
    """Tokens per chunk so that buffers of `row_bytes` a token stay within CHUNK_BYTES; at least 1."""
    return max(1, CHUNK_BYTES // row_bytes)


def token_chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices that cover [0, num_tokens); none for 0 tokens. The count depends on the arguments alone, alike on every
    rank.
    """
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def block_tokens_for(num_tokens: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows that one elementwise pass covers: cache-sized on CPU, a whole chunk on a GPU (fewer launches)."""
    if device.type != "cpu":
        return max(1, num_tokens)
    return max(1, min(num_tokens, _BLOCK_BYTES_CPU // (dtype.itemsize * max(1, num_columns))))


# ---- softmax over a sharded vocabulary ------------------------------------------------------------------------------


class RowNorm(NamedTuple):
    """Turns this rank's logits x into global log-probabilities: log Q = (x - shift) / temperature + log_offset."""

    shift_C: (
        torch.Tensor
    )  # this rank's row maximum (the log-sum-exp where all is -inf), [C] compute dtype, in units of the logits
    log_offset_C: torch.Tensor  # shift / temperature - log-sum-exp, [C] float64
    scale_C: torch.Tensor  # exp(log_offset), [C] compute dtype: Q = exp((x - shift) / temperature) * scale
    lse_C: torch.Tensor  # log-sum-exp over the whole vocabulary at this temperature, [C] float64


def shard_max(logits_Cv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Row maxima in `dtype`, [C]; -inf where this rank has no valid column."""
    if logits_Cv.shape[1] == 0:
        return torch.full((logits_Cv.shape[0],), -torch.inf, dtype=dtype, device=logits_Cv.device)
    return logits_Cv.amax(-1).to(dtype)


def shard_max_and_column(logits_Cv: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(row maxima in `dtype`, their columns), [C] each, the lower column on a tie; (-inf, 0) without a valid column."""
    if logits_Cv.shape[1] == 0:
        return shard_max(logits_Cv, dtype), torch.zeros(logits_Cv.shape[0], dtype=torch.int64, device=logits_Cv.device)
    if logits_Cv.device.type != "cpu" or logits_Cv.shape[1] < 2 * _SEGMENT_CPU:
        top = logits_Cv.max(-1)  # torch documents: the first of several maxima
        return top.values.to(dtype), top.indices
    return _max_by_segments(logits_Cv, dtype)


def _max_by_segments(logits_Cv: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the maxima of segments, then within one segment: on CPU `amax` is several times faster than `max`."""
    num_segments = logits_Cv.shape[1] // _SEGMENT_CPU
    ends = num_segments * _SEGMENT_CPU
    head_CnS = logits_Cv[:, :ends].unflatten(1, (num_segments, _SEGMENT_CPU))
    segment_C = head_CnS.amax(-1).max(-1).indices
    top = head_CnS.gather(1, segment_C.view(-1, 1, 1).expand(-1, 1, _SEGMENT_CPU)).squeeze(1).max(-1)
    max_C, column_C = top.values, top.indices + segment_C * _SEGMENT_CPU
    if ends < logits_Cv.shape[1]:
        rest = logits_Cv[:, ends:].max(-1)
        later_C = (rest.values > max_C) | rest.values.isnan() & ~max_C.isnan()
        max_C = torch.where(later_C, rest.values, max_C)
        column_C = torch.where(later_C, rest.indices + ends, column_C)
    return max_C.to(dtype), column_C


def dense_stats(
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    inverse_temperature: float,
    scratch_Bv: torch.Tensor,
    *,
    ids_from: int | None = None,
) -> torch.Tensor:
    """What the ranks tell each other before they can normalise, [5, C]: the student's (max, sumexp), the teacher's
    (max, sumexp), and the teacher's logit at the student's maximum. With `ids_from` (the global id of column 0) two
    more rows: the ids of the student's and the teacher's maximum."""
    dtype = scratch_Bv.dtype
    student_max_C, column_C = shard_max_and_column(student_Cv, dtype)
    ids = []
    if ids_from is None:
        teacher_max_C = shard_max(teacher_Cv, dtype)
    else:
        teacher_max_C, teacher_column_C = shard_max_and_column(teacher_Cv, dtype)
        ids = [(column_C + ids_from).to(dtype), (teacher_column_C + ids_from).to(dtype)]
    at_column_C = (
        teacher_Cv.gather(-1, column_C.unsqueeze(-1)).squeeze(-1).to(dtype) if teacher_Cv.shape[1] else teacher_max_C
    )
    student_sumexp_C = shard_sumexp(student_Cv, student_max_C, inverse_temperature, scratch_Bv)
    teacher_sumexp_C = shard_sumexp(teacher_Cv, teacher_max_C, inverse_temperature, scratch_Bv)
    return torch.stack([student_max_C, student_sumexp_C, teacher_max_C, teacher_sumexp_C, at_column_C, *ids])


class DenseNorm(NamedTuple):
    """Both models' normalisers and the anchor, from every rank's `dense_stats`."""

    student: RowNorm
    teacher: RowNorm
    anchor_C: torch.Tensor  # compute dtype, alike on every rank


def dense_norm(stats_R5C: torch.Tensor, rank: int, beta: float, inverse_temperature: float) -> DenseNorm:
    student = row_norm(stats_R5C[:, 0], stats_R5C[:, 1], rank, inverse_temperature)
    teacher = row_norm(stats_R5C[:, 2], stats_R5C[:, 3], rank, inverse_temperature)
    top_1C = stats_R5C[:, 0].argmax(0, keepdim=True)
    log_p_C = stats_R5C[:, 4].gather(0, top_1C).squeeze(0).double() * inverse_temperature - teacher.lse_C
    log_q_C = stats_R5C[:, 0].gather(0, top_1C).squeeze(0).double() * inverse_temperature - student.lse_C
    return DenseNorm(student, teacher, anchor_of(log_p_C - log_q_C, beta).to(stats_R5C.dtype))


def finite_shift(max_C: torch.Tensor) -> torch.Tensor:
    """The maxima, but 0 where a whole row is masked by -inf or by a dtype's lowest value: -inf - 0 is -inf, not NaN."""
    return max_C.masked_fill(max_C < _LOWEST, 0.0)


def shard_sumexp(
    logits_Cv: torch.Tensor, max_C: torch.Tensor, inverse_temperature: float, scratch_Bv: torch.Tensor
) -> torch.Tensor:
    """sum_v exp((x_v - max) / temperature), [C], block by block through `scratch_Bv`; the logits are only read."""
    shift_C = finite_shift(max_C)
    out_C = torch.empty_like(shift_C)
    for rows in token_chunks(logits_Cv.shape[0], max(1, scratch_Bv.shape[0])):
        y_Bv = centered_(logits_Cv[rows], shift_C[rows], inverse_temperature, scratch_Bv[: rows.stop - rows.start])
        torch.sum(y_Bv.exp_(), -1, out=out_C[rows])
    return out_C


def centered_(
    logits_Bv: torch.Tensor, shift_B: torch.Tensor, inverse_temperature: float, out_Bv: torch.Tensor
) -> torch.Tensor:
    """(x - shift) / temperature into `out_Bv`, in its dtype."""
    torch.sub(logits_Bv, shift_B.unsqueeze(-1), out=out_Bv)
    return out_Bv if inverse_temperature == 1.0 else out_Bv.mul_(inverse_temperature)


def combine_lse(max_RC: torch.Tensor, sumexp_RC: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    """Log-sum-exp over all ranks, [C] float64, from every rank's (max, sumexp); -inf where no rank has a finite
    column.
    """
    scaled_RC = max_RC.double() * inverse_temperature
    top_C = scaled_RC.amax(0)
    shift_C = finite_shift(top_C)
    return shift_C + torch.log((sumexp_RC.double() * torch.exp(scaled_RC - shift_C)).sum(0))


def row_norm(max_RC: torch.Tensor, sumexp_RC: torch.Tensor, rank: int, inverse_temperature: float) -> RowNorm:
    """This rank's normaliser from every rank's (max, sumexp)."""
    lse_C = combine_lse(max_RC, sumexp_RC, inverse_temperature)
    # A rank whose columns are all masked has probability 0 there at any shift; near the log-sum-exp its scale is 1,
    # not exp(-log-sum-exp), which may be infinite.
    stand_in_C = (finite_shift(lse_C) / inverse_temperature).to(max_RC.dtype)
    shift_C = torch.where(max_RC[rank] < _LOWEST, stand_in_C, max_RC[rank])
    log_offset_C = shift_C.double() * inverse_temperature - lse_C
    return RowNorm(shift_C, log_offset_C, log_offset_C.exp().to(shift_C.dtype), lse_C)


def softmax_into_(
    out_Cv: torch.Tensor, logits_Cv: torch.Tensor, lse_C: torch.Tensor, block_tokens: int
) -> torch.Tensor:
    """exp(x - lse), block by block; `out_Cv` may be `logits_Cv`. The float64 log-sum-exp is split in two, so that no
    row inherits its rounding as a common factor."""
    high_C = finite_shift(lse_C.to(out_Cv.dtype))
    low_C = torch.exp(high_C.double() - lse_C).to(out_Cv.dtype)
    for rows in token_chunks(logits_Cv.shape[0], max(1, block_tokens)):
        torch.sub(logits_Cv[rows], high_C[rows].unsqueeze(-1), out=out_Cv[rows]).exp_().mul_(low_C[rows].unsqueeze(-1))
    return out_Cv


# ---- the divergence -------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """This rank's share of the sums over the vocabulary; what is all-reduced, then given to `finish_divergence`."""

    divergence_C: torch.Tensor  # beta = 0: sum P d;  beta = 1: 0;  between: sum P (d - w)
    centre_C: torch.Tensor  # -sum Q (w - anchor); 0 at beta = 0


def gradient_factor(beta: float) -> float:
    """dD/dz = factor * (g + centre * Q)."""
    return 1.0 if beta == 0 else (-1.0 if beta == 1 else beta - 1.0)


def bound_log_ratio_(d: torch.Tensor) -> torch.Tensor:
    return d.clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def anchor_of(d_C: torch.Tensor, beta: float) -> torch.Tensor:
    """w (beta = 1: d) where the log-ratio is d; 0 at beta = 0. In the dtype given."""
    if beta == 0:
        return torch.zeros_like(d_C)
    bounded_C = bound_log_ratio_(d_C.clone())
    return bounded_C if beta == 1 else _small_log(bounded_C, beta).add_(bounded_C.clamp(min=0))


def partial_sums_(
    p: torch.Tensor, q: torch.Tensor, d: torch.Tensor, anchor: torch.Tensor, g_out: torch.Tensor, beta: float
) -> Sums:
    """Sums over the last dimension; writes g to `g_out` and overwrites d. d is bounded; `anchor` is [..., 1]."""
    if beta == 0:
        torch.sub(q, p, out=g_out)
        divergence_C = d.mul_(p).sum(-1)
        return Sums(divergence_C, torch.zeros_like(divergence_C))
    if beta == 1:
        centre_C = torch.sub(d, anchor, out=g_out).mul_(q).sum(-1).neg_()
        return Sums(torch.zeros_like(centre_C), centre_C)
    r = _small_log(d, beta, out=g_out)
    down = d.clamp(max=0)
    forward_C = torch.sub(down, r, out=down).mul_(p).sum(-1)
    w = r.add_(d.clamp_(min=0))
    centre_C = w.sub_(anchor).mul_(q).sum(-1).neg_()
    return Sums(forward_C, centre_C)


def _small_log(d: torch.Tensor, beta: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """r = log(M/Q) where d <= 0 and log(M/P) where d > 0: the one of the two that is not a difference of large
    numbers.

    log(M/Q) = w = r + max(d, 0) and log(P/M) = d - w = min(d, 0) - r.
    """
    if beta == 0.5:  # 1 + expm1(-|d|) / 2 = 1 / (1 + tanh(|d| / 2)): nothing cancels
        return _neg_log1p_(torch.abs(d, out=out).mul_(0.5).tanh_())
    a = torch.abs(d, out=out).neg_()
    over = (d > 0).to(d.dtype)
    share, rest = over * (1.0 - 2.0 * beta) + beta, over * (2.0 * beta - 1.0) + (1.0 - beta)
    far = torch.exp(a, out=over).mul_(share).add_(rest).log_()
    near = a.expm1_().mul_(share)
    is_far = near < -0.5  # there 1 + near has lost digits; elsewhere the sum under `far` has
    return torch.where(is_far, far, near.log1p_(), out=near)


def _neg_log1p_(y: torch.Tensor) -> torch.Tensor:
    """-log(1 + y) for 0 <= y <= 1, to the last digit also near 0: the logarithm of the rounded 1 + y, less what was
    rounded off. Three times as fast on CPU as torch's own."""
    u = y + 1.0
    rounded = u - 1.0
    return torch.sub(rounded.sub_(y), u.log_(), out=y)


def finish_divergence(sums: Sums, anchor_C: torch.Tensor, beta: float) -> torch.Tensor:
    """D from the sums over all ranks. Not below 0: only rounding is cut, and the gradient is not touched."""
    if beta == 0:
        return sums.divergence_C.clamp(min=0)
    reverse_C = sums.centre_C - anchor_C
    return (beta * sums.divergence_C + (1.0 - beta) * reverse_C if beta != 1 else reverse_C).clamp(min=0)


def add_centre_(g: torch.Tensor, q: torch.Tensor, centre: torch.Tensor, beta: float) -> torch.Tensor:
    """g + centre * Q in place, the gradient without its factor. `centre` [..., 1] is the sum over all ranks; g and Q
    may carry one common factor.
    """
    return g if beta == 0 else g.addcmul_(q, centre)


def row_scale(norm: DenseNorm, beta: float) -> torch.Tensor:
    """What `dense_pass_` leaves out of g and Q, [C]: the student's normaliser (1 at beta = 0). Two passes over [C, v]
    less."""
    return torch.ones_like(norm.student.scale_C) if beta == 0 else norm.student.scale_C


def dense_pass_(
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    norm: DenseNorm,
    *,
    beta: float,
    inverse_temperature: float,
    g_out_Cv: torch.Tensor,
    q_out_Cv: torch.Tensor,
    scratch_nBv: torch.Tensor,
    keep: bool = True,
) -> Sums:
    """Q and g, both divided by `row_scale`, and the sums of one chunk, block by block. `q_out_Cv` may be `student_Cv`
    itself and `g_out_Cv` `teacher_Cv` (both are then overwritten); `scratch_nBv` holds 2 blocks. With keep=False the
    outputs have one block's rows and hold nothing useful."""
    student_norm, teacher_norm, anchor_C = norm
    offset_C1 = (teacher_norm.log_offset_C - student_norm.log_offset_C).to(student_norm.shift_C.dtype).unsqueeze(-1)
    divergence_C = torch.empty_like(student_norm.shift_C)
    centre_C = torch.empty_like(student_norm.shift_C)
    for rows in token_chunks(student_Cv.shape[0], max(1, scratch_nBv.shape[1])):
        num_rows = rows.stop - rows.start
        out_rows = rows if keep else slice(0, num_rows)
        g_Bv, q_Bv = g_out_Cv[out_rows], q_out_Cv[out_rows]
        p_Bv, d_Bv = scratch_nBv[0, :num_rows], scratch_nBv[1, :num_rows]
        # Student first, teacher second: each input block is read before the output that may alias it is written.
        ys_Bv = centered_(student_Cv[rows], student_norm.shift_C[rows], inverse_temperature, p_Bv)
        torch.exp(ys_Bv, out=q_Bv)
        ys_Bv.clamp_(min=_LOWEST)
        yt_Bv = centered_(teacher_Cv[rows], teacher_norm.shift_C[rows], inverse_temperature, g_Bv)
        torch.sub(yt_Bv, ys_Bv, out=d_Bv).add_(offset_C1[rows])
        torch.exp(yt_Bv, out=p_Bv)
        if beta == 0:  # g = Q - P mixes the two scales; elsewhere they are factors of the sums
            q_Bv.mul_(student_norm.scale_C[rows].unsqueeze(-1))
            p_Bv.mul_(teacher_norm.scale_C[rows].unsqueeze(-1))
        sums = partial_sums_(p_Bv, q_Bv, bound_log_ratio_(d_Bv), anchor_C[rows].unsqueeze(-1), g_Bv, beta)
        divergence_C[rows], centre_C[rows] = sums.divergence_C, sums.centre_C
    if beta == 0:
        return Sums(divergence_C, centre_C)
    return Sums(divergence_C.mul_(teacher_norm.scale_C), centre_C.mul_(student_norm.scale_C))
