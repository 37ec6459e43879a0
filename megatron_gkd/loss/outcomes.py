"""The top-K side of the losses: outcomes of a sparse teacher, the student's values at them, and the gradient back
onto a shard.

Outcomes per token: the K support tokens, and with a tail bucket one more that stands for every other token. With z_k
the student's logits at the support and z_tail = log sum_{v outside S} exp(z_v):

    renormalize:  P', Q' = softmax over the K outcomes of (topk_logprobs / temperature) and (z_k / temperature)
    bucket:       P', Q' over K + 1 outcomes, Q' = softmax(z_1 .. z_K, z_tail), P'_tail = 1 - sum_k P_k
    gradient:     dD/dz_k as in divergence.py over the outcomes; outside S   dD/dz_v = dD/dz_tail * exp(z_v - z_tail)

z_tail is summed over the columns OUTSIDE S, relative to their own maximum, so a tail of 1e-30 keeps all its digits;
the teacher's tail is only known as 1 - sum, so it is bounded below by the float32 epsilon (float64
log-probabilities: float64's), where 1 - sum has no digits left. With K = V there is no tail. What is [T, K] is
float64: K is small, V is not. What is [T, v] is torch's, or that of loss/kernels/topk.py where kernels.chosen says so.

An index below 0 marks an ABSENT entry (a server that returned fewer than K): no probability on either side, no
gradient.

Legend: T tokens, C tokens of a chunk, R ranks, v valid columns of this rank, K support, O outcomes (K or K + 1).
No collectives here; topk_jsd.py and fused_linear_jsd.py make them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_gkd.errors import ConfigError, ShapeError
from megatron_gkd.loss import arguments as checks
from megatron_gkd.loss import kernels
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.divergence import Divergence, bound_log_ratio_
from megatron_gkd.parallel.vocab import VocabShard

Tail = Literal["renormalize", "bucket"]
_ABSENT = -1e30  # a log-weight that softmax turns into exactly 0 without making NaN of a row that has nothing else


@dataclass(frozen=True)
class OwnedIds:
    """Which global ids this rank holds, and at which local column. For other ids the column is 0, a placeholder that
    collides with the real local token 0; the only write through it is the addition of 0."""

    owned: torch.Tensor  # bool, [T] or [T, K]
    column: torch.Tensor  # int64, the same shape

    @staticmethod
    def of(ids: torch.Tensor, shard: VocabShard) -> OwnedIds:
        owned = (ids >= shard.start) & (ids < shard.start + shard.num_valid)
        return OwnedIds(owned, (ids - shard.start).masked_fill(~owned, 0).long())

    def __getitem__(self, rows: slice) -> OwnedIds:
        return OwnedIds(self.owned[rows], self.column[rows])

    def gather(self, logits_Tv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The logits at the ids, 0 where another rank holds them (so the sum over ranks has all); shape of the ids."""
        if logits_Tv.shape[1] == 0:
            return torch.zeros(self.owned.shape, dtype=dtype, device=logits_Tv.device)
        picked = logits_Tv.gather(1, _as_matrix(self.column)).to(dtype).view(self.owned.shape)
        return picked.masked_fill(~self.owned, 0.0)

    def add_(self, grad_Tv: torch.Tensor, values: torch.Tensor) -> None:
        """grad[t, id] += value for the ids held here; equal ids accumulate."""
        if grad_Tv.shape[1] > 0:
            mine = values.to(grad_Tv.dtype).masked_fill(~self.owned, 0.0)
            grad_Tv.scatter_add_(1, _as_matrix(self.column), _as_matrix(mine))


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.unsqueeze(1)


class SupportLoss(NamedTuple):
    """Divergence over the outcomes and its gradient with respect to their logits."""

    divergence_T: torch.Tensor  # float64
    grad_TO: torch.Tensor  # float64, temperature included


def check_support(
    topk_logprobs: torch.Tensor, topk_indices: torch.Tensor, shard: VocabShard, tail: str, temperature: float
) -> None:
    checks.check_matrix("topk_logprobs", topk_logprobs)
    if topk_indices.shape != topk_logprobs.shape:
        raise ShapeError(
            f"topk_indices {list(topk_indices.shape)} and topk_logprobs {list(topk_logprobs.shape)} were given, "
            f"one shape [T, K] is needed"
        )
    if topk_logprobs.shape[1] > shard.vocab_size:
        raise ConfigError(
            f"K={topk_logprobs.shape[1]} was given for a vocabulary of {shard.vocab_size}, K <= vocabulary is needed"
        )
    if tail not in ("renormalize", "bucket"):
        raise ConfigError(f"tail={tail!r} was given, 'renormalize' or 'bucket' is needed")
    if tail == "bucket" and temperature != 1.0:
        raise ConfigError(
            f"tail='bucket' with temperature={temperature} was given: the teacher's mass outside its top K at another "
            f"temperature cannot be known from K log-probabilities; use temperature=1.0 or tail='renormalize'"
        )
    checks.check_ids("topk_indices", topk_indices, shard.vocab_size)


def has_tail(num_outcomes: int, shard: VocabShard, tail: str) -> bool:
    return tail == "bucket" and num_outcomes < shard.vocab_size


def support_loss(
    logits_TK: torch.Tensor,
    tail_lse_T: torch.Tensor | None,
    topk_logprobs: torch.Tensor,
    topk_indices: torch.Tensor,
    divergence: Divergence,
) -> SupportLoss:
    """Args:
    logits_TK: the student's logits at the support, from all ranks.
    tail_lse_T: z_tail over all ranks; None: no tail outcome.
    """
    absent_TK = topk_indices < 0
    z_TO = logits_TK.double().masked_fill(absent_TK, _ABSENT).clamp(min=_ABSENT)
    l_TO = topk_logprobs.double().masked_fill(absent_TK, _ABSENT).clamp(min=_ABSENT)
    if tail_lse_T is not None:
        z_TO = torch.cat([z_TO, tail_lse_T.double().clamp(min=_ABSENT).unsqueeze(1)], dim=1)
        l_TO = torch.cat([l_TO, _teacher_tail(l_TO, topk_logprobs.dtype).unsqueeze(1)], dim=1)
    log_q_TO = torch.log_softmax(z_TO * divergence.inverse_temperature, dim=1)
    log_p_TO = torch.log_softmax(l_TO * divergence.inverse_temperature, dim=1)
    p_TO, q_TO, d_TO = log_p_TO.exp(), log_q_TO.exp(), bound_log_ratio_(log_p_TO - log_q_TO)
    anchor_T1 = torch.zeros_like(d_TO[:, :1])  # float64 has digits to spare
    g_TO = torch.empty_like(d_TO)
    sums = divergence.partial_sums_(p_TO, q_TO, d_TO, anchor_T1, g_TO)
    grad_TO = divergence.add_centre_(g_TO, q_TO, sums.centre_C.unsqueeze(1)).mul_(divergence.gradient_factor)
    return SupportLoss(divergence.value(sums, anchor_T1.squeeze(1)), grad_TO)


def _teacher_tail(logprobs_TK: torch.Tensor, given: torch.dtype) -> torch.Tensor:
    """log(1 - sum_k p_k), bounded below by what the given dtype can tell, [T] float64."""
    floor = torch.finfo(torch.float64 if given == torch.float64 else torch.float32).eps
    inside_T = torch.logsumexp(logprobs_TK, dim=1)
    return (-torch.expm1(inside_T)).clamp(min=floor).log()


def outside_logits(logits_Bv: torch.Tensor, owned: OwnedIds, scratch_Bv1: torch.Tensor) -> torch.Tensor:
    """The logits with this rank's support columns at -inf, in `scratch_Bv1`, whose extra column takes the writes of
    ids held elsewhere.
    """
    num_columns = logits_Bv.shape[1]
    out_Bv = scratch_Bv1[: logits_Bv.shape[0], :num_columns]
    out_Bv.copy_(logits_Bv)
    target_BK = owned.column.masked_fill(~owned.owned, num_columns)
    scratch_Bv1[: logits_Bv.shape[0]].scatter_(1, target_BK, -torch.inf)
    return out_Bv


def tail_stats(logits_Cv: torch.Tensor, owned: OwnedIds, scratch_Bv1: torch.Tensor) -> torch.Tensor:
    """This rank's (max, sumexp) over its columns outside the support, [2, C], block by block."""
    shape, device = (2, logits_Cv.shape[0]), logits_Cv.device
    out_2C = torch.zeros(shape, dtype=sm.compute_dtype(logits_Cv), device=device)
    out_2C[0] = -torch.inf
    by_kernels = kernels.chosen(device, logits_Cv.dtype)
    for rows in sm.token_chunks(logits_Cv.shape[0] if logits_Cv.shape[1] else 0, max(1, scratch_Bv1.shape[0])):
        y_Bv = outside_logits(logits_Cv[rows], owned[rows], scratch_Bv1)
        if by_kernels:
            from megatron_gkd.loss.kernels import launch_topk

            out_2C[:, rows] = launch_topk.stats(y_Bv)
        else:
            out_2C[0, rows] = max_B = y_Bv.amax(-1)
            out_2C[1, rows] = y_Bv.sub_(sm.finite_shift(max_B).unsqueeze(-1)).exp_().sum(-1)
    return out_2C


def tail_scale(tail_lse_C: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift in `dtype`, factor in float64) with exp(z - z_tail) = exp(z - shift) * factor: the float64 log-sum-exp
    split in two, so that no row inherits its rounding."""
    high_C = sm.finite_shift(tail_lse_C.to(dtype))
    return high_C, torch.exp(high_C.double() - sm.finite_shift(tail_lse_C))


def write_gradient_(
    grad_Cv: torch.Tensor,
    logits_Cv: torch.Tensor,
    owned: OwnedIds,
    grad_CO: torch.Tensor,
    tail_lse_C: torch.Tensor | None,
    scratch_Bv1: torch.Tensor,
) -> None:
    """dD/dz of this rank's columns into `grad_Cv` (which may be `logits_Cv` itself): the support, and outside it the
    tail's share.
    """
    num_support = owned.owned.shape[1]
    by_kernels = kernels.chosen(logits_Cv.device, logits_Cv.dtype)
    for rows in sm.token_chunks(logits_Cv.shape[0], max(1, scratch_Bv1.shape[0])):
        if tail_lse_C is None:
            grad_Cv[rows].zero_()
        else:
            y_Bv = outside_logits(logits_Cv[rows], owned[rows], scratch_Bv1)
            high_B, factor_B = tail_scale(tail_lse_C[rows], sm.compute_dtype(logits_Cv))
            weight_B = grad_CO[rows, num_support] * factor_B
            if by_kernels:
                from megatron_gkd.loss.kernels import launch_topk

                launch_topk.gradient_(grad_Cv[rows], y_Bv, shift_C=high_B, factor_C=weight_B)
            else:
                weight_B1 = weight_B.to(y_Bv.dtype).unsqueeze(-1)
                grad_Cv[rows] = y_Bv.sub_(high_B.unsqueeze(-1)).exp_().mul_(weight_B1)
        owned[rows].add_(grad_Cv[rows], grad_CO[rows, :num_support])


def scratch_for(logits_Tv: torch.Tensor) -> torch.Tensor:
    """Blocks of rows of such logits, with the extra column that `outside_logits` needs: what torch computes in, or what
    the kernels read."""
    (num_tokens, num_columns), dtype, device = logits_Tv.shape, sm.compute_dtype(logits_Tv), logits_Tv.device
    block = sm.block_tokens_for(num_tokens, num_columns, dtype, device)
    if kernels.chosen(device, logits_Tv.dtype):
        dtype = logits_Tv.dtype
        block = min(block, sm.chunk_tokens_for((num_columns + 1) * dtype.itemsize))
    return torch.empty(block, num_columns + 1, dtype=dtype, device=device)
