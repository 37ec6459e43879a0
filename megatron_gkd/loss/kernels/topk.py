"""The kernels around a sparse teacher: one program per row, which walks over this rank's columns in blocks.

    stats_kernel      (max, sumexp) of a row, and the id of its maximum
    gradient_kernel   exp(x - shift) * factor, and the label's -weight: a softmax's gradient, in one pass
    select_kernel     (max, sumexp) of a row and the columns of its K largest

The first two are the student's. What lies on the K support tokens is [C, K] and torch's; the support's columns are
-inf when the kernels see them, so the rest of the vocabulary is a row like any other, and they get exactly 0.

select_kernel is the teacher's: a radix selection. A float's bits, as an unsigned key, are ordered like the float. The
first pass counts the keys by their highest 8 bits, which tells those bits of the K-th largest key; each further pass
counts the keys that begin like it by their next 8 (two passes for bfloat16, three for float16, four for float32). The
last pass writes, in ascending order, the columns of all keys above the K-th and of the first ones that equal it: ties
go to the lower column. A row of 150,000 logits stays in the L2 cache between the passes. -0.0 equals 0.0; any K.

Compute dtype float32. NaN logits make the sums NaN; which columns they displace is open. No collectives.

Legend: C rows, v columns of this rank, B lanes, K selected.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_gkd.loss.kernels.dense import _joined_sum, _rescale

BLOCK = 2048  # columns that a program reads at once
NUM_WARPS = 8

_NEVER = tl.constexpr(2**31 - 1)
_BINS = tl.constexpr(256)  # a digit of a key has 8 bits
_EQUAL = tl.constexpr(65536)  # counts of a block, two in one number: keys above the K-th, and this often equal ones


@triton.jit
def stats_kernel(
    logits_ptr, out_ptr, stride, num_rows, num_columns, start, WANT_ID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [2 + WANT_ID, C]: maximum, sum of exp(x - maximum), id of the maximum (the lower one on a tie)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    lane = tl.arange(0, BLOCK)
    max_B, sum_B = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    column_B = tl.zeros([BLOCK], tl.int32)
    whole = num_columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):  # without a mask: wide loads
        x = tl.load(logits_ptr + first + lane).to(tl.float32)
        column_B = tl.where(x > max_B, first + lane, column_B)
        sum_B, max_B = _joined_sum(x, max_B, sum_B, 1.0), tl.maximum(max_B, x)
    if whole < num_columns:
        x = tl.load(logits_ptr + whole + lane, mask=whole + lane < num_columns, other=float("-inf")).to(tl.float32)
        column_B = tl.where(x > max_B, whole + lane, column_B)
        sum_B, max_B = _joined_sum(x, max_B, sum_B, 1.0), tl.maximum(max_B, x)
    top = tl.max(max_B, 0)
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + num_rows + row, tl.sum(sum_B * _rescale(max_B, top, 1.0), 0))
    if WANT_ID:
        best = tl.min(tl.where(max_B == top, column_B, _NEVER), 0)
        tl.store(out_ptr + 2 * num_rows + row, (best + start).to(tl.float32))


@triton.jit
def gradient_kernel(
    logits_ptr, rows_ptr, label_column_ptr, out_ptr, stride, out_stride, num_rows, num_columns,
    WITH_LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = exp(x - shift) * factor - label_weight at the label's column; rows [3, C]: shift, factor, label_weight.
    `out_ptr` may be `logits_ptr`."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    out_ptr += row * out_stride
    shift, factor = tl.load(rows_ptr + row), tl.load(rows_ptr + num_rows + row)
    label_weight, label_column = 0.0, -1
    if WITH_LABEL:
        label_weight = tl.load(rows_ptr + 2 * num_rows + row)
        label_column = tl.load(label_column_ptr + row)
    lane = tl.arange(0, BLOCK)
    whole = num_columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        columns = first + lane
        value = tl.exp(tl.load(logits_ptr + columns).to(tl.float32) - shift) * factor
        if WITH_LABEL:
            value -= tl.where(columns == label_column, label_weight, 0.0)
        tl.store(out_ptr + columns, value.to(out_ptr.dtype.element_ty))
    if whole < num_columns:
        columns = whole + lane
        mask = columns < num_columns
        x = tl.load(logits_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
        value = tl.exp(x - shift) * factor
        if WITH_LABEL:
            value -= tl.where(columns == label_column, label_weight, 0.0)
        tl.store(out_ptr + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def select_kernel(
    logits_ptr, columns_ptr, stats_ptr, stride, num_rows, num_columns, k, NUM_DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """columns [C, K] int32, ascending; stats [2, C]: maximum, sum of exp(x - maximum). 1 <= K <= num_columns."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    max_B, sum_B = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([_BINS], tl.int32)
    for first in range(0, num_columns, BLOCK):
        x, _columns, inside = _block(logits_ptr, first, num_columns, BLOCK)
        sum_B, max_B = _joined_sum(x, max_B, sum_B, 1.0), tl.maximum(max_B, x)
        counts += tl.histogram((_key(x) >> 24).to(tl.int32), _BINS, mask=inside)
    top = tl.max(max_B, 0)
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + num_rows + row, tl.sum(sum_B * _rescale(max_B, top, 1.0), 0))

    digit, wanted = _digit_of(counts, k)  # of the K-th largest key; how many are wanted of those that share it
    prefix = digit
    for place in tl.static_range(1, NUM_DIGITS):
        counts = tl.zeros([_BINS], tl.int32)
        for first in range(0, num_columns, BLOCK):
            x, _columns, inside = _block(logits_ptr, first, num_columns, BLOCK)
            key = _key(x)
            alike = inside & (key >> (32 - 8 * place) == prefix)
            counts += tl.histogram((key >> (24 - 8 * place) & 255).to(tl.int32), _BINS, mask=alike)
        digit, wanted = _digit_of(counts, wanted)
        prefix = prefix * 256 + digit

    columns_ptr += row * k
    num_above, num_equal = 0, 0  # in the blocks before
    for first in range(0, num_columns, BLOCK):
        x, columns, inside = _block(logits_ptr, first, num_columns, BLOCK)
        head = _key(x) >> (32 - 8 * NUM_DIGITS)
        above, equal = inside & (head > prefix), inside & (head == prefix)
        both = above.to(tl.int32) + equal.to(tl.int32) * _EQUAL
        total = tl.sum(both, 0)
        if total > 0:
            before = tl.cumsum(both, 0) - both
            equal_before = num_equal + before // _EQUAL
            position = num_above + before % _EQUAL + tl.minimum(equal_before, wanted)
            tl.store(columns_ptr + position, columns, mask=above | (equal & (equal_before < wanted)))
        num_above += total % _EQUAL
        num_equal += total // _EQUAL


@triton.jit
def _block(logits_ptr, first, num_columns, BLOCK: tl.constexpr):
    """(values, their columns, which of them are there). All but the last block are read without a mask: wide loads."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < num_columns
    if first + BLOCK <= num_columns:
        x = tl.load(logits_ptr + columns)
    else:
        x = tl.load(logits_ptr + columns, mask=inside, other=float("-inf"))
    return x.to(tl.float32), columns, inside


@triton.jit
def _key(x):
    """An unsigned integer of 32 bits, ordered like the float; equal for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _digit_of(counts, wanted):
    """(the digit of the `wanted`-th largest key, how many of the keys with that digit are wanted)."""
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    higher = tl.sum(tl.where(tl.arange(0, _BINS) > digit, counts, 0), 0)
    return digit.to(tl.uint32), wanted - higher
