"""An update with given slopes: how a tile of `dLoss/dz` follows from them, and what no forward has made for it."""

import triton
import triton.language as tl

from .coefficient import in_doubt_so_far, positive_rows
from .common import activate, joint_rows, scale_of_rows, slope_of


@triton.jit
def column_of(j, units, groups):
    """Where the slope of units `j` stands: that of its group, `spec.Slopes`, or with `groups` None its own."""
    if groups is None:
        column = j
    else:
        size = units // groups
        edge = (units % groups) * (size + 1)
        column = tl.where(j < edge, j // (size + 1), units % groups + (j - edge) // size)
    return column.to(tl.int64)


@triton.jit
def by_slopes(
    values, i, inside, first, first_row, first_at, second, second_row, second_at, ACTIVATION: tl.constexpr
):  # fmt: skip
    """`(first + 2 second y) act'(z)` in float32 of rows `i`, from what the forward has kept; each slope may be None.

    `*_at`: offsets of the units' columns.
    """
    kept = values.to(tl.float32)
    row = i.to(tl.int64)[:, None]
    by_y = tl.zeros(kept.shape, tl.float32)
    if second is not None:
        y = activity_of(kept, ACTIVATION)
        by_y += 2.0 * tl.load(second + row * second_row + second_at[None, :], mask=inside, other=0.0) * y
    if first is not None:
        by_y += tl.load(first + row * first_row + first_at[None, :], mask=inside, other=0.0)
    return by_y * slope_of(kept, ACTIVATION)


@triton.jit
def activity_of(kept, ACTIVATION: tl.constexpr):
    """`y`, from what the forward has kept: `z` for gelu and silu, else `y` itself."""
    y = kept
    if ACTIVATION == "gelu" or ACTIVATION == "silu":
        y = activate(kept, ACTIVATION)
    return y


@triton.jit
def list_kernel(
    second, second_row, rows,  # [rows] slopes, one a row
    index, coefficient, count,  # written: [rows], [rows], []
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The coefficients `2 second` that are not exactly zero and their rows, in order: one program."""
    kept = 0
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < rows
        c = 2.0 * tl.load(second + i.to(tl.int64) * second_row, mask=here, other=0.0)
        kept = in_doubt_so_far(i, here, c, kept, index, coefficient)
    tl.store(count, kept)


@triton.jit
def scale_kernel(
    x_pos, x_neg, input_sumsq,  # rows [n_pos, in], [rows - n_pos, in]; sums of squares [rows] where they are known
    n_pos, rows, in_features, x_pos_row, x_neg_row, x_col, eps,
    row_scale,  # written: [rows]
    NORM: tl.constexpr, EPS_MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What normalises the rows, a block of them in each program."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = i < rows
    if input_sumsq is not None:
        square = tl.load(input_sumsq + i, mask=here, other=0.0)
    else:
        k = tl.arange(0, BLOCK_K)
        x_at = joint_rows(i, x_pos, x_neg, n_pos, x_pos_row, x_neg_row)[:, None] + k.to(tl.int64)[None, :] * x_col
        sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            x = tl.load(x_at, mask=here[:, None] & (k < in_features - start)[None, :], other=0.0).to(tl.float32)
            sums += x * x
            x_at += BLOCK_K * tl.cast(x_col, tl.int64)
        square = tl.sum(sums, axis=1)
    tl.store(row_scale + i, scale_of_rows(square, in_features, eps, NORM, EPS_MODE), mask=here)


@triton.jit
def units_kernel(
    kept, kept_row, kept_col, is_positive, n_pos, rows, out_features,  # [rows, out], [rows] or None: the first n_pos
    unit_sums,  # written: [splits, out]
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the positive rows' activities; programs (block of units, split of the rows)."""
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, rows, tl.num_programs(1) * BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        positive = positive_rows(i, i < rows, is_positive, n_pos)
        at = kept + i.to(tl.int64)[:, None] * kept_row + j.to(tl.int64)[None, :] * kept_col
        values = tl.load(at, mask=positive[:, None] & (j < out_features)[None, :], other=0.0).to(tl.float32)
        sums += activity_of(values, ACTIVATION)
    at = unit_sums + tl.cast(tl.program_id(1), tl.int64) * out_features + j
    tl.store(at, tl.sum(sums, axis=0), mask=j < out_features)
