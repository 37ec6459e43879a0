"""The divergence between a teacher P and a student Q, and its gradient: one home per formula.

Each formula is a method of `Divergence`, and nothing else in the package asks what beta is. `reference.py` is written
independently of this file and is what it is tested against.

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

Numbers: as in sharded_softmax.py, whose statistics these formulas begin with; d is bounded by +-LOG_RATIO_BOUND (see
reference.py).

Legend: C tokens of a chunk, R ranks of the group, v = V/tp valid columns of this rank. No collectives in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

from megatron_gkd.errors import ConfigError
from megatron_gkd.loss.reference import LOG_RATIO_BOUND
from megatron_gkd.loss.sharded_softmax import (
    LOWEST,
    RowNorm,
    centered_,
    row_norm,
    shard_max,
    shard_max_and_column,
    shard_sumexp,
    token_chunks,
)


class DenseNorm(NamedTuple):
    """Both models' normalisers and the anchor, from every rank's `Divergence.stats`."""

    student: RowNorm
    teacher: RowNorm
    anchor_C: torch.Tensor  # compute dtype, alike on every rank


class Form(IntEnum):
    """Which of the formulas of the module docstring a beta stands for."""

    FORWARD_KL = 0  # beta = 0
    REVERSE_KL = 1  # beta = 1
    SYMMETRIC = 2  # beta = 0.5: a shorter way to w
    GENERAL = 3


class Sums(NamedTuple):
    """This rank's share of the sums over the vocabulary; what is all-reduced, then given to `Divergence.value`."""

    divergence_C: torch.Tensor  # beta = 0: sum P d;  beta = 1: 0;  between: sum P (d - w)
    centre_C: torch.Tensor  # -sum Q (w - anchor); 0 at beta = 0


# What the MODE of kernels/dense.py may be: a closed list, so that a form without a kernel takes the torch path.
KERNEL_FORMS = (Form.FORWARD_KL, Form.REVERSE_KL, Form.SYMMETRIC, Form.GENERAL)


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and at which temperature of both models. Raises ConfigError for one that does not exist."""

    beta: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:  # also catches NaN
            raise ConfigError(
                f"beta={self.beta} was given, 0 <= beta <= 1 is needed (0 forward KL, 1 reverse KL, 0.5 symmetric JSD)"
            )
        if not (self.temperature > 0.0 and self.temperature != float("inf")):
            raise ConfigError(
                f"temperature={self.temperature} was given, a positive finite number is needed; 1.0 leaves logits as "
                "they are"
            )

    @property
    def form(self) -> Form:
        return {0.0: Form.FORWARD_KL, 1.0: Form.REVERSE_KL, 0.5: Form.SYMMETRIC}.get(self.beta, Form.GENERAL)

    @property
    def inverse_temperature(self) -> float:
        return 1.0 / self.temperature

    @property
    def gradient_factor(self) -> float:
        """dD / d student logit = factor * (g + centre * Q); the temperature is in it."""
        factor = {Form.FORWARD_KL: 1.0, Form.REVERSE_KL: -1.0}.get(self.form, self.beta - 1.0)
        return factor * self.inverse_temperature

    def stats(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor,
        scratch_Bv: torch.Tensor,
        *,
        ids_from: int | None = None,
    ) -> torch.Tensor:
        """What the ranks tell each other before they can normalise, [5, C]: the student's (max, sumexp), the teacher's
        (max, sumexp), and the teacher's logit at the student's maximum. With `ids_from` (the global id of column 0)
        two more rows: the ids of the student's and the teacher's maximum."""
        dtype = scratch_Bv.dtype
        student_max_C, column_C = shard_max_and_column(student_Cv, dtype)
        ids = []
        if ids_from is None:
            teacher_max_C = shard_max(teacher_Cv, dtype)
        else:
            teacher_max_C, teacher_column_C = shard_max_and_column(teacher_Cv, dtype)
            ids = [(column_C + ids_from).to(dtype), (teacher_column_C + ids_from).to(dtype)]
        at_column_C = teacher_max_C
        if teacher_Cv.shape[1]:
            at_column_C = teacher_Cv.gather(-1, column_C.unsqueeze(-1)).squeeze(-1).to(dtype)
        student_sumexp_C = shard_sumexp(student_Cv, student_max_C, self.inverse_temperature, scratch_Bv)
        teacher_sumexp_C = shard_sumexp(teacher_Cv, teacher_max_C, self.inverse_temperature, scratch_Bv)
        return torch.stack([student_max_C, student_sumexp_C, teacher_max_C, teacher_sumexp_C, at_column_C, *ids])

    def norm(self, stats_R5C: torch.Tensor, rank: int) -> DenseNorm:
        """This rank's normalisers and the anchor, from every rank's `stats`."""
        student = row_norm(stats_R5C[:, 0], stats_R5C[:, 1], rank, self.inverse_temperature)
        teacher = row_norm(stats_R5C[:, 2], stats_R5C[:, 3], rank, self.inverse_temperature)
        top_1C = stats_R5C[:, 0].argmax(0, keepdim=True)
        log_p_C = stats_R5C[:, 4].gather(0, top_1C).squeeze(0).double() * self.inverse_temperature - teacher.lse_C
        log_q_C = stats_R5C[:, 0].gather(0, top_1C).squeeze(0).double() * self.inverse_temperature - student.lse_C
        return DenseNorm(student, teacher, self._anchor(log_p_C - log_q_C).to(stats_R5C.dtype))

    def dense_pass_(
        self,
        student_Cv: torch.Tensor,
        teacher_Cv: torch.Tensor,
        norm: DenseNorm,
        *,
        g_out_Cv: torch.Tensor,
        q_out_Cv: torch.Tensor,
        scratch_nBv: torch.Tensor,
        keep: bool = True,
    ) -> Sums:
        """Q and g, both divided by `row_scale`, and the sums of one chunk, block by block. `q_out_Cv` may be
        `student_Cv` itself and `g_out_Cv` `teacher_Cv` (both are then overwritten); `scratch_nBv` holds 2 blocks. With
        keep=False the outputs have one block's rows and hold nothing useful."""
        student_norm, teacher_norm, anchor_C = norm
        offset_C = (teacher_norm.log_offset_C - student_norm.log_offset_C).to(student_norm.shift_C.dtype)
        divergence_C = torch.empty_like(student_norm.shift_C)
        centre_C = torch.empty_like(student_norm.shift_C)
        for rows in token_chunks(student_Cv.shape[0], max(1, scratch_nBv.shape[1])):
            num_rows = rows.stop - rows.start
            out_rows = rows if keep else slice(0, num_rows)
            g_Bv, q_Bv = g_out_Cv[out_rows], q_out_Cv[out_rows]
            p_Bv, d_Bv = scratch_nBv[0, :num_rows], scratch_nBv[1, :num_rows]
            # Student first, teacher second: each input block is read before the output that may alias it is written.
            ys_Bv = centered_(student_Cv[rows], student_norm.shift_C[rows], self.inverse_temperature, p_Bv)
            torch.exp(ys_Bv, out=q_Bv)
            ys_Bv.clamp_(min=LOWEST)
            yt_Bv = centered_(teacher_Cv[rows], teacher_norm.shift_C[rows], self.inverse_temperature, g_Bv)
            torch.sub(yt_Bv, ys_Bv, out=d_Bv).add_(offset_C[rows].unsqueeze(-1))
            torch.exp(yt_Bv, out=p_Bv)
            if self.form is Form.FORWARD_KL:  # g = Q - P mixes the two scales; elsewhere they are factors of the sums
                q_Bv.mul_(student_norm.scale_C[rows].unsqueeze(-1))
                p_Bv.mul_(teacher_norm.scale_C[rows].unsqueeze(-1))
            sums = self.partial_sums_(p_Bv, q_Bv, bound_log_ratio_(d_Bv), anchor_C[rows].unsqueeze(-1), g_Bv)
            divergence_C[rows], centre_C[rows] = sums.divergence_C, sums.centre_C
        if self.form is Form.FORWARD_KL:
            return Sums(divergence_C, centre_C)
        return Sums(divergence_C.mul_(teacher_norm.scale_C), centre_C.mul_(student_norm.scale_C))

    def row_scale(self, norm: DenseNorm) -> torch.Tensor:
        """What `dense_pass_` leaves out of g and Q, [C]: the student's normaliser (1 at beta = 0). Two passes over [C,
        v] less."""
        scale_C = norm.student.scale_C
        return torch.ones_like(scale_C) if self.form is Form.FORWARD_KL else scale_C

    def partial_sums_(
        self, p: torch.Tensor, q: torch.Tensor, d: torch.Tensor, anchor: torch.Tensor, g_out: torch.Tensor
    ) -> Sums:
        """Sums over the last dimension; writes g to `g_out` and overwrites d. d is bounded; `anchor` is [..., 1]."""
        if self.form is Form.FORWARD_KL:
            torch.sub(q, p, out=g_out)
            divergence_C = d.mul_(p).sum(-1)
            return Sums(divergence_C, torch.zeros_like(divergence_C))
        if self.form is Form.REVERSE_KL:
            centre_C = torch.sub(d, anchor, out=g_out).mul_(q).sum(-1).neg_()
            return Sums(torch.zeros_like(centre_C), centre_C)
        r = self._small_log(d, out=g_out)
        down = d.clamp(max=0)
        forward_C = torch.sub(down, r, out=down).mul_(p).sum(-1)
        w = r.add_(d.clamp_(min=0))
        centre_C = w.sub_(anchor).mul_(q).sum(-1).neg_()
        return Sums(forward_C, centre_C)

    def value(self, sums: Sums, anchor_C: torch.Tensor) -> torch.Tensor:
        """D from the sums over all ranks. Not below 0: only rounding is cut, and the gradient is not touched."""
        if self.form is Form.FORWARD_KL:
            return sums.divergence_C.clamp(min=0)
        value_C = sums.centre_C - anchor_C
        if self.form is not Form.REVERSE_KL:
            value_C = self.beta * sums.divergence_C + (1.0 - self.beta) * value_C
        return value_C.clamp(min=0)

    def add_centre_(self, g: torch.Tensor, q: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        """g + centre * Q in place, the gradient without its factor. `centre` [..., 1] is the sum over all ranks; g and
        Q may carry one common factor."""
        return g if self.form is Form.FORWARD_KL else g.addcmul_(q, centre)

    def _anchor(self, d_C: torch.Tensor) -> torch.Tensor:
        """w (beta = 1: d) where the log-ratio is d; 0 at beta = 0. In the dtype given."""
        if self.form is Form.FORWARD_KL:
            return torch.zeros_like(d_C)
        bounded_C = bound_log_ratio_(d_C.clone())
        if self.form is Form.REVERSE_KL:
            return bounded_C
        return self._small_log(bounded_C).add_(bounded_C.clamp(min=0))

    def _small_log(self, d: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """r = log(M/Q) where d <= 0 and log(M/P) where d > 0: the one of the two that is not a difference of large
        numbers.

        log(M/Q) = w = r + max(d, 0) and log(P/M) = d - w = min(d, 0) - r.
        """
        if self.form is Form.SYMMETRIC:  # 1 + expm1(-|d|) / 2 = 1 / (1 + tanh(|d| / 2)): nothing cancels
            return _neg_log1p_(torch.abs(d, out=out).mul_(0.5).tanh_())
        beta = self.beta
        a = torch.abs(d, out=out).neg_()
        over = (d > 0).to(d.dtype)
        share, rest = over * (1.0 - 2.0 * beta) + beta, over * (2.0 * beta - 1.0) + (1.0 - beta)
        far = torch.exp(a, out=over).mul_(share).add_(rest).log_()
        near = a.expm1_().mul_(share)
        is_far = near < -0.5  # there 1 + near has lost digits; elsewhere the sum under `far` has
        return torch.where(is_far, far, near.log1p_(), out=near)


def bound_log_ratio_(d: torch.Tensor) -> torch.Tensor:
    return d.clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _neg_log1p_(y: torch.Tensor) -> torch.Tensor:
    """-log(1 + y) for 0 <= y <= 1, to the last digit also near 0: the logarithm of the rounded 1 + y, less what was
    rounded off. Three times as fast on CPU as torch's own."""
    u = y + 1.0
    rounded = u - 1.0
    return torch.sub(rounded.sub_(y), u.log_(), out=y)
