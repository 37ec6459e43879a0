"""The [C, v] work of the divergence on one chunk of dense logits: by torch, or by the kernels.

Both classes do the same three things between the two collectives of a chunk. For a fused loss they own the logits
buffers too; logits that are the caller's are only read.

    stats     [n, C] of this rank, to be gathered        rows: Divergence.stats (5); the label's sumexp at
                                                         temperature 1 where `label_softmax`; both maxima's ids where
                                                         `want_ids`
    sums      [2, C] of this rank, to be reduced
    gradient  [C, v], weighted, the label's share included; it overwrites a buffer, or goes where the caller says

`TorchDense` lets Q and g overwrite logits that are already in the divergence's dtype, and needs buffers of their own
beside bfloat16 logits; `KernelDense` needs none, its gradient lies where the student's logits were, in their dtype.

No collectives, no matrix products. Legend: C tokens of a chunk, v valid columns of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_gkd.loss import kernels
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.divergence import DenseNorm, Divergence, Sums
from megatron_gkd.loss.outcomes import OwnedIds


class DenseSetting(NamedTuple):
    """What is alike for every chunk."""

    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    dtype: torch.dtype  # of the divergence
    device: torch.device
    num_columns: int  # v
    first_id: int  # global id of column 0
    divergence: Divergence
    label_softmax: bool = False  # the cross entropy needs a softmax of its own, at temperature 1
    want_ids: bool = False
    own_logits: bool = True  # the logits lie in buffers of this work, which it may overwrite
    keep: bool = True  # a gradient may be asked for: what it is made of is kept for all rows


class LabelPart(NamedTuple):
    """The cross entropy's share of a chunk's gradient: weight (Q1 - onehot)."""

    owned: OwnedIds  # [C]
    weight_C: torch.Tensor
    lse_C: torch.Tensor  # log-sum-exp at temperature 1, float64


def uses_kernels(setting: DenseSetting) -> bool:
    """Whether the kernels do the work; alike on every rank, because it decides the size of a chunk."""
    if setting.divergence.form not in kernels.FORMS:
        return False
    return kernels.chosen(setting.device, setting.student_dtype, setting.teacher_dtype)


def num_wide_buffers(setting: DenseSetting) -> int:
    """[C, v] buffers in the divergence's dtype beside the logits themselves."""
    if uses_kernels(setting):
        return 0
    narrow = (setting.student_dtype != setting.dtype) + (setting.teacher_dtype != setting.dtype)
    return narrow + int(setting.label_softmax)


class TorchDense:
    """By loss/divergence.py, block by block."""

    def __init__(self, setting: DenseSetting, num_rows: int) -> None:
        self.setting = setting
        v, dtype, device, own = setting.num_columns, setting.dtype, setting.device, setting.own_logits
        block = sm.block_tokens_for(num_rows, v, dtype, device)

        def buffer(of: torch.dtype, rows: int = num_rows if setting.keep else block) -> torch.Tensor:
            return torch.empty(rows, v, dtype=of, device=device)

        if own:
            self.student_Cv = buffer(setting.student_dtype, num_rows)
            self.teacher_Cv = buffer(setting.teacher_dtype, num_rows)
        self.q_Cv = self.student_Cv if own and setting.student_dtype == dtype else buffer(dtype)
        self.g_Cv = self.teacher_Cv if own and setting.teacher_dtype == dtype else buffer(dtype)
        self.label_q_Cv = buffer(dtype) if setting.label_softmax else None
        self.scratch_nBv = torch.empty(2, block, v, dtype=dtype, device=device)

    def stats(self, student_Cv: torch.Tensor, teacher_Cv: torch.Tensor) -> torch.Tensor:
        setting, scratch_Bv = self.setting, self.scratch_nBv[0]
        ids_from = setting.first_id if setting.want_ids else None
        stats_nC = setting.divergence.stats(student_Cv, teacher_Cv, scratch_Bv, ids_from=ids_from)
        if not setting.label_softmax:
            return stats_nC
        sumexp_C = sm.shard_sumexp(student_Cv, stats_nC[0], 1.0, scratch_Bv)
        return torch.cat([stats_nC[:5], sumexp_C.unsqueeze(0), stats_nC[5:]])

    def sums(
        self, student_Cv: torch.Tensor, teacher_Cv: torch.Tensor, norm: DenseNorm, label: LabelPart | None = None
    ) -> Sums:
        """Overwrites the logits where Q and g have no buffers of their own."""
        setting, num_rows = self.setting, student_Cv.shape[0]
        if label is not None and self.label_q_Cv is not None:
            sm.softmax_into_(self.label_q_Cv[:num_rows], student_Cv, label.lse_C, self.scratch_nBv.shape[1])
        return setting.divergence.dense_pass_(
            student_Cv, teacher_Cv, norm, g_out_Cv=self.g_Cv[:num_rows], q_out_Cv=self.q_Cv[:num_rows],
            scratch_nBv=self.scratch_nBv, keep=setting.keep,
        )  # fmt: skip

    def gradient(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor,
        norm: DenseNorm,
        centre_C: torch.Tensor,
        weight_C: torch.Tensor,
        label: LabelPart | None = None,
        out_Cv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Into `out_Cv`, where it is given (without a label)."""
        divergence, num_rows = self.setting.divergence, student_Cv.shape[0]
        g_Cv, q_Cv = self.g_Cv[:num_rows], self.q_Cv[:num_rows]
        scale_C = divergence.row_scale(norm)
        factor_C1 = (weight_C * scale_C * divergence.gradient_factor).unsqueeze(1)
        for rows in sm.token_chunks(num_rows, max(1, self.scratch_nBv.shape[1])):
            g_Bv = divergence.add_centre_(g_Cv[rows], q_Cv[rows], centre_C[rows].unsqueeze(1))
            torch.mul(g_Bv, factor_C1[rows], out=g_Bv if out_Cv is None else out_Cv[rows])
        if label is not None and self.label_q_Cv is not None:
            g_Cv.addcmul_(self.label_q_Cv[:num_rows], label.weight_C.unsqueeze(1))
        elif label is not None:
            g_Cv.addcmul_(q_Cv, (label.weight_C * scale_C).unsqueeze(1))
        if label is not None:
            label.owned.add_(g_Cv, -label.weight_C)
        return g_Cv


class KernelDense:
    """By the kernels of kernels/dense.py."""

    def __init__(self, setting: DenseSetting, num_rows: int) -> None:
        self.setting = setting
        # Rows start at multiples of 16 numbers, whatever v is: wide loads, and leading dimensions that products like.
        stride = -(-setting.num_columns // 16) * 16

        def buffer(of: torch.dtype) -> torch.Tensor:
            return torch.empty(num_rows, stride, dtype=of, device=setting.device)[:, : setting.num_columns]

        if setting.own_logits:
            self.student_Cv, self.teacher_Cv = buffer(setting.student_dtype), buffer(setting.teacher_dtype)

    def stats(self, student_Cv: torch.Tensor, teacher_Cv: torch.Tensor) -> torch.Tensor:
        from megatron_gkd.loss.kernels import launch

        setting = self.setting
        return launch.stats(
            student_Cv, teacher_Cv, setting.divergence, want_label=setting.label_softmax,
            ids_from=setting.first_id if setting.want_ids else None,
        )  # fmt: skip

    def sums(
        self, student_Cv: torch.Tensor, teacher_Cv: torch.Tensor, norm: DenseNorm, label: LabelPart | None = None
    ) -> Sums:
        from megatron_gkd.loss.kernels import launch

        return launch.sums(student_Cv, teacher_Cv, norm, self.setting.divergence)

    def gradient(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor,
        norm: DenseNorm,
        centre_C: torch.Tensor,
        weight_C: torch.Tensor,
        label: LabelPart | None = None,
        out_Cv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from megatron_gkd.loss.kernels import launch

        out_Cv = student_Cv if out_Cv is None else out_Cv

        part = None
        if label is not None:
            column_C = label.owned.column.masked_fill(~label.owned.owned, -1)
            lse_C = label.lse_C if self.setting.label_softmax else None
            part = launch.LabelGradient(label.weight_C, column_C, lse_C)
        launch.gradient_(
            out_Cv, student_Cv, teacher_Cv, norm, self.setting.divergence,
            centre_C=centre_C, weight_C=weight_C, label=part,
        )  # fmt: skip
        return out_Cv


def dense_work(setting: DenseSetting, num_rows: int) -> TorchDense | KernelDense:
    """For chunks of up to `num_rows` rows."""
    return KernelDense(setting, num_rows) if uses_kernels(setting) else TorchDense(setting, num_rows)
