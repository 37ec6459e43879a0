"""Launches of the three kernels: what loss/divergence.py computes in torch, from the same [C, v] logits, by Triton.

| function | kernel | stands for |
|---|---|---|
| `stats` | stats_kernel | Divergence.stats, and the label's and the maxima's rows |
| `sums` | sums_kernel | Divergence.dense_pass_, its sums |
| `gradient_` | gradient_kernel | Divergence.dense_pass_ and add_centre_, its gradient; the label's gradient |

Shapes: logits [C, v] with v >= 0 valid columns, rows at any stride, columns contiguous. Nothing but `out` is
written. Importing this file imports triton; __init__.py says when to.

Legend: C rows of a chunk, v valid columns of this rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from megatron_gkd.loss.divergence import DenseNorm, Divergence, Sums
from megatron_gkd.loss.kernels import dense


class LabelGradient(NamedTuple):
    """The cross entropy's share of a gradient: weight (Q1 - onehot), Q1 the student's distribution at temperature
    1."""

    weight_C: torch.Tensor
    column_C: torch.Tensor  # local column of the label, int32; -1 where another rank holds it or there is none
    lse_C: torch.Tensor | None  # log-sum-exp at temperature 1, float64; None: the divergence is at that temperature


def stats(
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    divergence: Divergence,
    *,
    want_label: bool = False,
    ids_from: int | None = None,
) -> torch.Tensor:
    """Divergence.stats [5, C]; with `want_label` one more row, the student's sumexp at temperature 1; with
    `ids_from` (the global id of column 0) two more, the ids of both maxima."""
    want_columns = ids_from is not None
    num_rows = student_Cv.shape[0]
    out_nC = student_Cv.new_empty((5 + want_label + 2 * want_columns, num_rows), dtype=torch.float32)
    student_Cv, teacher_Cv = by_rows(student_Cv), by_rows(teacher_Cv)
    with on_device_of(student_Cv):
        dense.stats_kernel[(num_rows,)](
            student_Cv, teacher_Cv, out_nC, student_Cv.stride(0), teacher_Cv.stride(0), num_rows,
            student_Cv.shape[1], ids_from or 0, divergence.inverse_temperature,
            WANT_LABEL=int(want_label), WANT_COLUMNS=int(want_columns), BLOCK=dense.BLOCK, num_warps=dense.NUM_WARPS,
        )  # fmt: skip
    return out_nC


def sums(student_Cv: torch.Tensor, teacher_Cv: torch.Tensor, norm: DenseNorm, divergence: Divergence) -> Sums:
    """This rank's share of the sums over the vocabulary."""
    num_rows = student_Cv.shape[0]
    out_2C = student_Cv.new_empty((2, num_rows), dtype=torch.float32)
    rows_6C = torch.stack(_row_parameters(norm))
    student_Cv, teacher_Cv = by_rows(student_Cv), by_rows(teacher_Cv)
    with on_device_of(student_Cv):
        dense.sums_kernel[(num_rows,)](
            student_Cv, teacher_Cv, rows_6C, out_2C, student_Cv.stride(0), teacher_Cv.stride(0), num_rows,
            student_Cv.shape[1], *_numbers(divergence),
            MODE=divergence.form.value, BLOCK=dense.BLOCK, num_warps=dense.NUM_WARPS,
        )  # fmt: skip
    return Sums(out_2C[0], out_2C[1])


def gradient_(
    out_Cv: torch.Tensor,
    student_Cv: torch.Tensor,
    teacher_Cv: torch.Tensor,
    norm: DenseNorm,
    divergence: Divergence,
    *,
    centre_C: torch.Tensor,
    weight_C: torch.Tensor,
    label: LabelGradient | None = None,
) -> None:
    """weight_t dD_t/dlogits (and the label's share) into `out_Cv`, which may be `student_Cv` itself.

    Args:
        centre_C: the sum over all ranks.
    """
    num_rows = student_Cv.shape[0]
    assert out_Cv.stride(1) == 1 or out_Cv.shape[1] <= 1, "columns of the gradient are contiguous"
    factor_C = (weight_C * divergence.gradient_factor).float()
    rows_8C = torch.stack([*_row_parameters(norm), factor_C, factor_C * centre_C])
    label_mode, label_rows, label_column = dense.NO_LABEL, rows_8C, rows_8C  # not read without a label
    if label is not None:
        scale_C = norm.student.scale_C
        label_mode, label_column = dense.LABEL, label.column_C.to(torch.int32).contiguous()
        if label.lse_C is not None:
            label_mode = dense.LABEL_OWN_SOFTMAX
            scale_C = torch.exp(norm.student.shift_C.double() - label.lse_C).float()
        label_rows = torch.stack([label.weight_C.float(), scale_C])
    student_Cv, teacher_Cv = by_rows(student_Cv), by_rows(teacher_Cv)
    with on_device_of(student_Cv):
        dense.gradient_kernel[(num_rows,)](
            student_Cv, teacher_Cv, rows_8C, label_rows, label_column, out_Cv, student_Cv.stride(0),
            teacher_Cv.stride(0), out_Cv.stride(0), num_rows, student_Cv.shape[1], *_numbers(divergence),
            MODE=divergence.form.value, LABEL_MODE=label_mode.value, BLOCK=dense.BLOCK, num_warps=dense.NUM_WARPS,
        )  # fmt: skip


def _row_parameters(norm: DenseNorm) -> list[torch.Tensor]:
    student, teacher, anchor_C = norm
    offset_C = (teacher.log_offset_C - student.log_offset_C).float()
    return [student.shift_C, teacher.shift_C, offset_C, student.scale_C, teacher.scale_C, anchor_C]


def _numbers(divergence: Divergence) -> tuple[float, float, float]:
    """inverse_temperature, beta, one_minus_beta; floats, since triton compiles integers 0 and 1 in."""
    return divergence.inverse_temperature, float(divergence.beta), 1.0 - divergence.beta


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with contiguous columns: itself but for transposed logits."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
