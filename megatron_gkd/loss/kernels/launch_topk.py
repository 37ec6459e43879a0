"""Launches of the kernels around a sparse teacher, from [C, v] logits that are given.

| function | kernel | stands for |
|---|---|---|
| `stats` | stats_kernel | shard_max, shard_sumexp, shard_argmax |
| `gradient_` | gradient_kernel | the columns outside the support, and the label's |
| `select` | select_kernel | the columns of vocab_topk's local top K, and the row's statistics |

Shapes: as in launch.py. Importing this file imports triton; __init__.py says when to.

Legend: C rows, v valid columns of this rank, K selected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_gkd.loss.kernels import topk
from megatron_gkd.loss.kernels.launch import by_rows, on_device_of

_DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}  # bytes of a float32 that such a number may fill


class Label(NamedTuple):
    """What the label's column gets less."""

    weight_C: torch.Tensor
    column_C: torch.Tensor  # -1 where another rank holds it or there is none


def stats(logits_Cv: torch.Tensor, *, ids_from: int | None = None) -> torch.Tensor:
    """(max, sumexp) of this rank, [2, C]; with `ids_from` (the global id of column 0) the maximum's id too."""
    num_rows = logits_Cv.shape[0]
    want_id = ids_from is not None
    out_nC = logits_Cv.new_empty((2 + want_id, num_rows), dtype=torch.float32)
    logits_Cv = by_rows(logits_Cv)
    if num_rows:
        with on_device_of(logits_Cv):
            topk.stats_kernel[(num_rows,)](
                logits_Cv, out_nC, logits_Cv.stride(0), num_rows, logits_Cv.shape[1], ids_from or 0,
                WANT_ID=int(want_id), BLOCK=topk.BLOCK, num_warps=topk.NUM_WARPS,
            )  # fmt: skip
    return out_nC


def gradient_(
    out_Cv: torch.Tensor,
    logits_Cv: torch.Tensor,
    *,
    shift_C: torch.Tensor,
    factor_C: torch.Tensor,
    label: Label | None = None,
) -> None:
    """exp(x - shift) * factor, less the label's weight, into `out_Cv`, which may be `logits_Cv`."""
    num_rows = logits_Cv.shape[0]
    assert out_Cv.stride(1) == 1 or out_Cv.shape[1] <= 1, "columns of the gradient are contiguous"
    rows, columns_C = [shift_C.float(), factor_C.float()], shift_C  # the columns are not read without a label
    if label is not None:
        rows.append(label.weight_C.float())
        columns_C = label.column_C.to(torch.int32).contiguous()
    rows_nC, logits_Cv = torch.stack(rows), by_rows(logits_Cv)
    if num_rows:
        with on_device_of(logits_Cv):
            topk.gradient_kernel[(num_rows,)](
                logits_Cv, rows_nC, columns_C, out_Cv, logits_Cv.stride(0), out_Cv.stride(0), num_rows,
                logits_Cv.shape[1], WITH_LABEL=int(label is not None), BLOCK=topk.BLOCK, num_warps=topk.NUM_WARPS,
            )  # fmt: skip


def select(logits_Cv: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns [C, K] int64 of the K largest, ascending, ties to the lower column; (max, sumexp) [2, C])."""
    num_rows = logits_Cv.shape[0]
    columns_CK = logits_Cv.new_empty((num_rows, k), dtype=torch.int32)
    stats_2C = logits_Cv.new_empty((2, num_rows), dtype=torch.float32)
    logits_Cv = by_rows(logits_Cv)
    if num_rows:
        with on_device_of(logits_Cv):
            topk.select_kernel[(num_rows,)](
                logits_Cv, columns_CK, stats_2C, logits_Cv.stride(0), num_rows, logits_Cv.shape[1], k,
                NUM_DIGITS=_DIGITS[logits_Cv.dtype], BLOCK=topk.BLOCK, num_warps=topk.NUM_WARPS,
            )  # fmt: skip
    return columns_CK.long(), stats_2C
