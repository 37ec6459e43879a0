"""The [C, v] work on one chunk of the student's logits where nobody else has any: a teacher that is given by its top K,
or none. By torch, or by the kernels.

Both classes own the logits' buffer and do two things, one on each side of the collectives of a chunk:

    stats     (max, sumexp) of this rank's columns outside the support (all of them without a support), [2, C]; with
              `want_best` two more rows, this rank's (largest logit, its global id)
    gradient  [C, v], weighted, the label's share included

    outside the support   grad_tail exp(z - z_tail) + u exp(z - lse)  =  exp(z - shift) factor
    at the support        grad_k + u exp(z_k - lse);          at the label, wherever it lies, -u

`TorchSparse` needs a buffer for a wide gradient beside bfloat16 logits. `KernelSparse` writes -inf over the support's
logits, which the caller has gathered before, and the gradient over all of them: it needs no buffer but theirs.

No collectives, no matrix products. Legend: C tokens of a chunk, v valid columns of this rank, K support, O outcomes
(K or K + 1), u the label's weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_gkd.loss import kernels
from megatron_gkd.loss import outcomes as sp
from megatron_gkd.loss import sharded_softmax as sm
from megatron_gkd.loss.fused.dense import LabelPart
from megatron_gkd.loss.outcomes import OwnedIds
from megatron_gkd.loss.vocab_topk import shard_argmax


class Support(NamedTuple):
    """The tokens that a teacher has named."""

    owned: OwnedIds  # [C, K]
    logits_CK: torch.Tensor  # this rank's; 0 where another rank holds them


class SupportGradient(NamedTuple):
    """What the divergence says, weighted."""

    grad_CO: torch.Tensor  # float64
    tail_lse_C: torch.Tensor | None  # z_tail over all ranks; None: no tail outcome


class SparseSetting(NamedTuple):
    """What is alike for every chunk."""

    student_dtype: torch.dtype
    dtype: torch.dtype  # of the divergence
    device: torch.device
    num_columns: int  # v
    first_id: int  # global id of column 0
    want_best: bool = False


def uses_kernels(setting: SparseSetting) -> bool:
    """Whether the kernels do the work; alike on every rank, because it decides the size of a chunk."""
    return setting.dtype == torch.float32 and kernels.chosen(setting.device, setting.student_dtype)


def num_wide_buffers(setting: SparseSetting, *, with_support: bool) -> int:
    """[C, v] buffers in the divergence's dtype beside the logits."""
    if uses_kernels(setting):
        return 0
    return with_support + (setting.student_dtype != setting.dtype)


class TorchSparse:
    """By loss/outcomes.py and sharded_softmax.py, block by block."""

    def __init__(self, setting: SparseSetting, num_rows: int, *, with_support: bool) -> None:
        self.setting, v, dtype = setting, setting.num_columns, setting.dtype
        self.student_Cv = torch.empty(num_rows, v, dtype=setting.student_dtype, device=setting.device)
        # Logits that are already in the divergence's dtype are overwritten by Q.
        narrow = setting.student_dtype != dtype
        self.q_Cv = self.student_Cv.new_empty(num_rows, v, dtype=dtype) if narrow else self.student_Cv
        self.g_Cv = self.student_Cv.new_empty(num_rows, v, dtype=dtype) if with_support else self.q_Cv
        self.scratch_Bv1 = sp.scratch_for(self.student_Cv)

    def stats(self, student_Cv: torch.Tensor, support: Support | None) -> torch.Tensor:
        setting = self.setting
        if support is not None:
            stats = [sp.tail_stats(student_Cv, support.owned, self.scratch_Bv1)]
        else:
            max_C = sm.shard_max(student_Cv, setting.dtype)
            sumexp_C = sm.shard_sumexp(student_Cv, max_C, 1.0, self.scratch_Bv1[:, : setting.num_columns])
            stats = [torch.stack([max_C, sumexp_C])]
        if setting.want_best:
            stats.append(shard_argmax(student_Cv, setting.first_id, setting.dtype))
        return torch.cat(stats)

    def gradient(
        self,
        student_Cv: torch.Tensor,
        support: Support | None,
        divergence: SupportGradient | None,
        label: LabelPart | None,
    ) -> torch.Tensor:
        num_rows, block = student_Cv.shape[0], self.scratch_Bv1.shape[0]
        g_Cv, q_Cv = self.g_Cv[:num_rows], self.q_Cv[:num_rows]
        if support is not None and divergence is not None:
            sp.write_gradient_(g_Cv, student_Cv, support.owned, *divergence, self.scratch_Bv1)
        if label is not None:  # g += u (Q - onehot(label))
            sm.softmax_into_(q_Cv, student_Cv, label.lse_C, block)
            weight_C1 = label.weight_C.unsqueeze(1)
            g_Cv.mul_(weight_C1) if divergence is None else g_Cv.addcmul_(q_Cv, weight_C1)
            label.owned.add_(g_Cv, -label.weight_C)
        return g_Cv


class KernelSparse:
    """By the kernels of kernels/topk.py."""

    def __init__(self, setting: SparseSetting, num_rows: int) -> None:
        self.setting, v = setting, setting.num_columns
        # Rows start at multiples of 16 numbers, and have a column to which ids of other ranks are written.
        stride = -(-(v + 1) // 16) * 16
        self._wide_Cv1 = torch.empty(num_rows, stride, dtype=setting.student_dtype, device=setting.device)[:, : v + 1]
        self.student_Cv = self._wide_Cv1[:, :v]

    def stats(self, student_Cv: torch.Tensor, support: Support | None) -> torch.Tensor:
        """Overwrites the logits at the support."""
        from megatron_gkd.loss.kernels import launch_topk

        setting = self.setting
        if support is not None:
            owned, num_columns = support.owned, setting.num_columns
            target_CK = owned.column.masked_fill(~owned.owned, num_columns)
            self._wide_Cv1[: student_Cv.shape[0]].scatter_(1, target_CK, -torch.inf)
        stats_nC = launch_topk.stats(student_Cv, ids_from=setting.first_id if setting.want_best else None)
        if not setting.want_best:
            return stats_nC
        best_2C = torch.stack([stats_nC[0], stats_nC[2]])
        if support is not None:
            best_2C = _larger(best_2C, _best_of(support, setting.first_id))
        return torch.cat([stats_nC[:2], best_2C])

    def gradient(
        self,
        student_Cv: torch.Tensor,
        support: Support | None,
        divergence: SupportGradient | None,
        label: LabelPart | None,
    ) -> torch.Tensor:
        """Overwrites the logits."""
        from megatron_gkd.loss.kernels import launch_topk

        if label is None and (divergence is None or divergence.tail_lse_C is None):
            student_Cv.zero_()
        else:
            shift_C, factor_C = _outside(divergence, label)
            at_column = None if label is None else launch_topk.Label(label.weight_C, _column_outside(support, label))
            launch_topk.gradient_(student_Cv, student_Cv, shift_C=shift_C, factor_C=factor_C, label=at_column)
        if support is not None and divergence is not None:
            grad_CK = divergence.grad_CO[:, : support.logits_CK.shape[1]]
            if label is not None:
                grad_CK = grad_CK + _label_at_support(support, label)
            support.owned.add_(student_Cv, grad_CK)
        return student_Cv


def _outside(divergence: SupportGradient | None, label: LabelPart | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, factor) of the columns outside the support, [C]. Relative to z_tail where there is one: a tail of 1e-30
    keeps its digits, and the label's share of it may vanish."""
    if divergence is None or divergence.tail_lse_C is None:
        assert label is not None
        shift_C, scale_C = sp.tail_scale(label.lse_C, torch.float32)
        return shift_C, scale_C * label.weight_C.double()
    shift_C, scale_C = sp.tail_scale(divergence.tail_lse_C, torch.float32)
    weight_C = divergence.grad_CO[:, -1]
    if label is not None:
        weight_C = weight_C + label.weight_C.double() * torch.exp(divergence.tail_lse_C - label.lse_C)
    return shift_C, scale_C * weight_C


def _hits(support: Support, label: LabelPart) -> torch.Tensor:
    """Where the label is at the support and both are here, bool [C, K]."""
    same_CK = support.owned.column == label.owned.column.unsqueeze(1)
    return same_CK & support.owned.owned & label.owned.owned.unsqueeze(1)


def _column_outside(support: Support | None, label: LabelPart) -> torch.Tensor:
    """The label's column where it is here and outside the support, else -1. At the support it is counted in float64
    before the gradient is rounded to the logits' dtype."""
    elsewhere_C = ~label.owned.owned
    if support is not None:
        elsewhere_C = elsewhere_C | _hits(support, label).any(1)
    return label.owned.column.masked_fill(elsewhere_C, -1)


def _label_at_support(support: Support, label: LabelPart) -> torch.Tensor:
    """u (Q - onehot) at the support, [C, K] float64; of other ranks' tokens arbitrary."""
    q_CK = torch.exp(support.logits_CK.double() - label.lse_C.unsqueeze(1))
    return label.weight_C.double().unsqueeze(1) * (q_CK - _hits(support, label).double())


def _best_of(support: Support, first_id: int) -> torch.Tensor:
    """(largest of the support's logits here, its global id), [2, C]; the lower id on a tie; (-inf, 2^31) without."""
    logits_CK = support.logits_CK.masked_fill(~support.owned.owned, -torch.inf)
    top_C1 = logits_CK.amax(1, keepdim=True)
    is_top_CK = support.owned.owned & (logits_CK == top_C1)
    id_C = (support.owned.column + first_id).masked_fill(~is_top_CK, 2**31).amin(1)
    return torch.stack([top_C1.squeeze(1), id_C.to(logits_CK.dtype)])


def _larger(one_2C: torch.Tensor, other_2C: torch.Tensor) -> torch.Tensor:
    """Of two (value, id), the larger value; the lower id on a tie."""
    (value, index), (other_value, other_index) = one_2C, other_2C
    later = (other_value > value) | (other_value == value) & (other_index < index)
    return torch.where(later, other_2C, one_2C)


def sparse_work(setting: SparseSetting, num_rows: int, *, with_support: bool) -> TorchSparse | KernelSparse:
    """For chunks of up to `num_rows` rows."""
    if uses_kernels(setting):
        return KernelSparse(setting, num_rows)
    return TorchSparse(setting, num_rows, with_support=with_support)
