"""Softmax over a vocabulary that is sharded over ranks, in chunks of tokens: what all losses and the top K share.

A rank reduces its own columns to (max, sumexp) of a row (`shard_max`, `shard_sumexp`); every rank's pairs, gathered,
give the log-sum-exp of the whole row (`combine_lse`), and with it what turns this rank's logits into global
log-probabilities (`row_norm`).

Numbers: [C, v] work is float32 (float64 if an input is float64); what is [C] is combined in float64, since one rounding
of a log-sum-exp would shift every log-ratio of the row alike. -inf logits give probability 0 exactly; NaN stays NaN.

Legend: T tokens, C tokens of a chunk, R ranks of the group, v = V/tp valid columns of this rank. No collectives in
this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CHUNK_BYTES = 64 * 2**20  # of the [C, v] buffers of one token chunk
_BLOCK_BYTES_CPU = 2**19  # of one scratch buffer: a few of them fit into a core's L2 cache
_SEGMENT_CPU = 1024  # columns; see _max_by_segments
LOWEST = -1e30  # at or below it a logit is a mask; stands in for -inf where a difference of two would be NaN


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

    # This rank's row maximum (the log-sum-exp where all is -inf), [C] compute dtype, in units of the logits.
    shift_C: torch.Tensor
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


def finite_shift(max_C: torch.Tensor) -> torch.Tensor:
    """The maxima, but 0 where a whole row is masked by -inf or by a dtype's lowest value: -inf - 0 is -inf, not NaN."""
    return max_C.masked_fill(max_C < LOWEST, 0.0)


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
    shift_C = torch.where(max_RC[rank] < LOWEST, stand_in_C, max_RC[rank])
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
