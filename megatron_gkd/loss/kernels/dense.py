"""The three kernels of the dense divergence: one program per row, which walks over this rank's columns in blocks.

    stats_kernel      reads student and teacher logits   -> (max, sumexp) of both, teacher at the student's maximum
    sums_kernel       reads them again                   -> divergence and centre of the row (loss/divergence.py)
    gradient_kernel   reads them again                   -> weighted gradient, where the student's logits were

The arithmetic is that of loss/divergence.py, in float32, element by element; a [C, v] tensor is written once, by the
last kernel, in the dtype of its output. Between the kernels stand the two collectives. Each lane keeps its own running
value and the lanes are joined once, at the end of the row.

expm1 and log1p are written out (`_expm1_of_negative`, `_log1p_of_half`): polynomials that are exact to the last
digits near 0 whatever the backend does for exp and log, and that Triton's interpreter can run.

Row parameters, float32, [8, C] in this order (a kernel is given as many as it needs):
    student_shift, teacher_shift, offset, student_scale, teacher_scale, anchor, factor, factor_centre
    log Q = (x - student_shift) / temperature + log(student_scale), likewise P; offset = the difference of the logs

Compute dtype float32 only. No collectives. Triton has no type annotations for what a kernel is given, hence the
comment for the type checker below.

Legend: C rows of a chunk, v columns of this rank, B lanes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_gkd.loss.divergence import Form
from megatron_gkd.loss.reference import LOG_RATIO_BOUND
from megatron_gkd.loss.sharded_softmax import LOWEST

BLOCK = 2048  # columns that a program reads at once
NUM_WARPS = 8

FORWARD_KL = tl.constexpr(Form.FORWARD_KL.value)  # MODE: Divergence.form
REVERSE_KL = tl.constexpr(Form.REVERSE_KL.value)
SYMMETRIC = tl.constexpr(Form.SYMMETRIC.value)
NO_LABEL = tl.constexpr(0)  # LABEL: cross entropy in the same pass
LABEL = tl.constexpr(1)  # at the temperature of the divergence, 1
LABEL_OWN_SOFTMAX = tl.constexpr(2)  # at temperature 1 beside another one

_BOUND = tl.constexpr(LOG_RATIO_BOUND)
_LOWEST = tl.constexpr(LOWEST)
_NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def stats_kernel(
    student_ptr, teacher_ptr, out_ptr, student_stride, teacher_stride, out_stride, num_columns, start,
    inverse_temperature, WANT_LABEL: tl.constexpr, WANT_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [5 + WANT_LABEL + 2 WANT_COLUMNS, C]: Divergence.stats, the sumexp at temperature 1, both maxima's
    ids."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lane = tl.arange(0, BLOCK)
    lowest = tl.full([BLOCK], float("-inf"), tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    no_column = tl.zeros([BLOCK], tl.int32)
    # per lane: maximum, sum of exponentials and column of the maximum of both; the student's sum at temperature 1; the
    # teacher at the student's maximum
    lanes = (lowest, zero, no_column, lowest, zero, no_column, zero, lowest)
    whole = num_columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):  # without a mask: wide loads
        s = tl.load(student_ptr + first + lane).to(tl.float32)
        t = tl.load(teacher_ptr + first + lane).to(tl.float32)
        lanes = _with_block(lanes, s, t, first + lane, inverse_temperature, WANT_LABEL)
    if whole < num_columns:
        mask = whole + lane < num_columns
        s = tl.load(student_ptr + whole + lane, mask=mask, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + whole + lane, mask=mask, other=float("-inf")).to(tl.float32)
        lanes = _with_block(lanes, s, t, whole + lane, inverse_temperature, WANT_LABEL)

    max_s, sum_s, column_s, max_t, sum_t, column_t, cold_s, at_column = lanes
    top_s, top_t = tl.max(max_s, 0), tl.max(max_t, 0)
    best_s = tl.min(tl.where(max_s == top_s, column_s, _NEVER), 0)  # the lower column on a tie
    best_t = tl.min(tl.where(max_t == top_t, column_t, _NEVER), 0)
    at_best = tl.max(tl.where((max_s == top_s) & (column_s == best_s), at_column, float("-inf")), 0)
    out_ptr += row
    tl.store(out_ptr, top_s)
    tl.store(out_ptr + out_stride, tl.sum(sum_s * _rescale(max_s, top_s, inverse_temperature), 0))
    tl.store(out_ptr + 2 * out_stride, top_t)
    tl.store(out_ptr + 3 * out_stride, tl.sum(sum_t * _rescale(max_t, top_t, inverse_temperature), 0))
    tl.store(out_ptr + 4 * out_stride, at_best)
    if WANT_LABEL:
        tl.store(out_ptr + 5 * out_stride, tl.sum(cold_s * _rescale(max_s, top_s, 1.0), 0))
    if WANT_COLUMNS:
        tl.store(out_ptr + (5 + WANT_LABEL) * out_stride, (best_s + start).to(tl.float32))
        tl.store(out_ptr + (6 + WANT_LABEL) * out_stride, (best_t + start).to(tl.float32))


@triton.jit
def sums_kernel(
    student_ptr, teacher_ptr, rows_ptr, out_ptr, student_stride, teacher_stride, num_rows, num_columns,
    inverse_temperature, beta, one_minus_beta, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [2, C]: divergence.Sums of this rank."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    rows_ptr += row
    shift_s, shift_t = tl.load(rows_ptr), tl.load(rows_ptr + num_rows)
    offset, scale_s = tl.load(rows_ptr + 2 * num_rows), tl.load(rows_ptr + 3 * num_rows)
    scale_t, anchor = tl.load(rows_ptr + 4 * num_rows), tl.load(rows_ptr + 5 * num_rows)
    lane = tl.arange(0, BLOCK)
    divergence, centre = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    whole = num_columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        s = tl.load(student_ptr + first + lane).to(tl.float32)
        t = tl.load(teacher_ptr + first + lane).to(tl.float32)
        share, g, _q = _terms(
            (s - shift_s) * inverse_temperature, (t - shift_t) * inverse_temperature,
            offset, scale_s, scale_t, anchor, beta, one_minus_beta, MODE,
        )  # fmt: skip
        divergence += share
        centre -= g
    if whole < num_columns:
        mask = whole + lane < num_columns
        s = tl.load(student_ptr + whole + lane, mask=mask, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + whole + lane, mask=mask, other=float("-inf")).to(tl.float32)
        share, g, _q = _terms(
            (s - shift_s) * inverse_temperature, (t - shift_t) * inverse_temperature,
            offset, scale_s, scale_t, anchor, beta, one_minus_beta, MODE,
        )  # fmt: skip
        divergence += tl.where(mask, share, 0.0)
        centre -= tl.where(mask, g, 0.0)
    tl.store(out_ptr + row, tl.sum(divergence, 0))
    tl.store(out_ptr + num_rows + row, 0.0 if MODE == FORWARD_KL else tl.sum(centre, 0))


@triton.jit
def gradient_kernel(
    student_ptr, teacher_ptr, rows_ptr, label_rows_ptr, label_column_ptr, out_ptr, student_stride, teacher_stride,
    out_stride, num_rows, num_columns, inverse_temperature, beta, one_minus_beta, MODE: tl.constexpr,
    LABEL_MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [C, v] = factor g + factor_centre Q (+ label_weight (Q1 - onehot)); `out` may be the student's logits.

    label_rows [2, C] float32: the weight of the cross entropy, and the scale of Q1 = exp(x - shift) scale, Q at
    temperature 1; label_column [C] int32: -1 where another rank holds the label.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    out_ptr += row * out_stride
    rows_ptr += row
    shift_s, shift_t = tl.load(rows_ptr), tl.load(rows_ptr + num_rows)
    offset, scale_s = tl.load(rows_ptr + 2 * num_rows), tl.load(rows_ptr + 3 * num_rows)
    scale_t, anchor = tl.load(rows_ptr + 4 * num_rows), tl.load(rows_ptr + 5 * num_rows)
    factor, factor_centre = tl.load(rows_ptr + 6 * num_rows), tl.load(rows_ptr + 7 * num_rows)
    label_weight, label_scale, label_column = 0.0, 0.0, -1
    if LABEL_MODE != NO_LABEL:
        label_weight = tl.load(label_rows_ptr + row)
        label_scale = tl.load(label_rows_ptr + num_rows + row)
        label_column = tl.load(label_column_ptr + row)
    lane = tl.arange(0, BLOCK)
    whole = num_columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        columns = first + lane
        s = tl.load(student_ptr + columns).to(tl.float32)
        t = tl.load(teacher_ptr + columns).to(tl.float32)
        _share, g, q = _terms(
            (s - shift_s) * inverse_temperature, (t - shift_t) * inverse_temperature,
            offset, scale_s, scale_t, anchor, beta, one_minus_beta, MODE,
        )  # fmt: skip
        value = g * factor + q * factor_centre
        value = _with_label(value, s - shift_s, q, columns, label_weight, label_scale, label_column, LABEL_MODE)
        tl.store(out_ptr + columns, value.to(out_ptr.dtype.element_ty))
    if whole < num_columns:
        columns = whole + lane
        mask = columns < num_columns
        s = tl.load(student_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
        _share, g, q = _terms(
            (s - shift_s) * inverse_temperature, (t - shift_t) * inverse_temperature,
            offset, scale_s, scale_t, anchor, beta, one_minus_beta, MODE,
        )  # fmt: skip
        value = g * factor + q * factor_centre
        value = _with_label(value, s - shift_s, q, columns, label_weight, label_scale, label_column, LABEL_MODE)
        tl.store(out_ptr + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


# ---- element by element ---------------------------------------------------------------------------------------------


@triton.jit
def _rescale(old_max, new_max, inverse_temperature):
    """exp(old_max - new_max), and 1 where nothing but masked logits was seen: there the sum is 0, or NaN."""
    shift = tl.where(new_max < _LOWEST, 0.0, new_max)
    return tl.where(old_max < _LOWEST, 1.0, tl.exp((old_max - shift) * inverse_temperature))


@triton.jit
def _joined_sum(x, max_B, sum_B, inverse_temperature):
    """Sum of exp((x - max) / temperature) after one more x, relative to the larger of the two maxima."""
    top = tl.maximum(max_B, x)
    shift = tl.where(top < _LOWEST, 0.0, top)
    return sum_B * _rescale(max_B, top, inverse_temperature) + tl.exp((x - shift) * inverse_temperature)


@triton.jit
def _with_block(lanes, s, t, columns, inverse_temperature, WANT_LABEL: tl.constexpr):
    """The lanes of stats_kernel after one more block."""
    max_s, sum_s, column_s, max_t, sum_t, column_t, cold_s, at_column = lanes
    at_column = tl.where(s > max_s, t, at_column)
    column_s, column_t = tl.where(s > max_s, columns, column_s), tl.where(t > max_t, columns, column_t)
    sum_s, sum_t = _joined_sum(s, max_s, sum_s, inverse_temperature), _joined_sum(t, max_t, sum_t, inverse_temperature)
    if WANT_LABEL:
        cold_s = _joined_sum(s, max_s, cold_s, 1.0)
    return tl.maximum(max_s, s), sum_s, column_s, tl.maximum(max_t, t), sum_t, column_t, cold_s, at_column


@triton.jit
def _terms(ys, yt, offset, scale_s, scale_t, anchor, beta, one_minus_beta, MODE: tl.constexpr):
    """(share of the divergence, g, Q): Divergence.partial_sums_ before it sums."""
    q, p = tl.exp(ys) * scale_s, tl.exp(yt) * scale_t
    d = yt - tl.where(ys < _LOWEST, _LOWEST, ys) + offset
    d = tl.where(d > _BOUND, _BOUND, tl.where(d < -_BOUND, -_BOUND, d))  # NaN stays
    if MODE == FORWARD_KL:
        share, g = d * p, q - p
    elif MODE == REVERSE_KL:
        share, g = d * 0.0, (d - anchor) * q
    else:
        r = _small_log(d, beta, one_minus_beta, MODE)
        share, g = (tl.where(d > 0, 0.0, d) - r) * p, (tl.where(d > 0, d, 0.0) + r - anchor) * q
    return share, g, q


@triton.jit
def _small_log(d, beta, one_minus_beta, MODE: tl.constexpr):
    """Divergence._small_log: log(M/Q) where d <= 0, log(M/P) where d > 0."""
    a = -tl.abs(d)
    e = tl.exp(a)
    if MODE == SYMMETRIC:
        r = _log1p_of_half(_expm1_of_negative(a, e) * 0.5)
    else:
        share = tl.where(d > 0, one_minus_beta, beta)
        rest = tl.where(d > 0, beta, one_minus_beta)
        near = _expm1_of_negative(a, e) * share
        far = tl.log(e * share + rest)
        r = tl.where(near < -0.5, far, _log1p_of_half(near))
    return r


@triton.jit
def _expm1_of_negative(a, e):
    """exp(a) - 1 for a <= 0, given e = exp(a). Series to a^9 / 9! down to a = -1/2: what is cut off is 3e-10 of it."""
    series = 1.0 + a * (1.0 / 9.0)
    series = 1.0 + a * (1.0 / 8.0) * series
    series = 1.0 + a * (1.0 / 7.0) * series
    series = 1.0 + a * (1.0 / 6.0) * series
    series = 1.0 + a * (1.0 / 5.0) * series
    series = 1.0 + a * (1.0 / 4.0) * series
    series = 1.0 + a * (1.0 / 3.0) * series
    series = 1.0 + a * (1.0 / 2.0) * series
    return tl.where(a < -0.5, e - 1.0, a * series)


@triton.jit
def _log1p_of_half(x):
    """log(1 + x) for -1/2 <= x <= 0 as 2 artanh(s), s = x / (2 + x) in [-1/3, 0]: what is cut off is 2e-9 of it."""
    s = x / (2.0 + x)
    z = s * s
    series = 1.0 / 13.0 + z * (1.0 / 15.0)
    series = 1.0 / 11.0 + z * series
    series = 1.0 / 9.0 + z * series
    series = 1.0 / 7.0 + z * series
    series = 1.0 / 5.0 + z * series
    series = 1.0 / 3.0 + z * series
    return 2.0 * s * (1.0 + z * series)


@triton.jit
def _with_label(value, y, q, columns, label_weight, label_scale, label_column, LABEL_MODE: tl.constexpr):
    """value + label_weight (Q1 - onehot)."""
    if LABEL_MODE == NO_LABEL:
        result = value
    else:
        q1 = q if LABEL_MODE == LABEL else tl.exp(y) * label_scale
        result = value + label_weight * (q1 - tl.where(columns == label_column, 1.0, 0.0))
    return result
