"""An update with given slopes: how a tile of `dLoss/dz` follows from them, and what no forward has made for it."""

import triton
import triton.language as tl

from .coefficient import in_doubt_so_far, positive_rows
from .common import activate, group_of, joint_rows, rows_of, scale_of_rows, slope_of

# How many groups of a basis a tile multiplies out: the fewest that `tl.dot` takes. With twice as many, and slopes of
# second order beside them, some configurations have no registers left and spill in the loop.
RANK = tl.constexpr(16)


@triton.jit
def columns_of(j, units, slope):
    """Offsets of the columns of `records.Slope` that units `j` have: their group's, `spec.Slopes`, or their own."""
    at = tl.zeros(j.shape, tl.int64)
    if slope.slope is not None:
        column = j
        if slope.groups is not None:
            column = group_of(j, units, slope.groups)
        at = column.to(tl.int64) * slope.slope_col
    return at


@triton.jit
def basis_of(j, units, basis):
    """`[RANK, len(j)]` of a `records.Basis`, zero beyond its groups and units; an empty scalar where there is none."""
    tile = 0.0
    if basis.basis is not None:
        g = tl.arange(0, RANK)
        at = basis.basis + g.to(tl.int64)[:, None] * basis.basis_row + j.to(tl.int64)[None, :] * basis.basis_col
        tile = tl.load(at, mask=(g < basis.groups)[:, None] & (j < units)[None, :], other=0.0)
    return tile


@triton.jit
def by_slopes(
    values, i, here, j, units, first, first_at, second, second_at, basis, basis_tile,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`(first + 2 second y) act'(z)` in float32 of rows `i`, from what the forward has kept; either may be none.

    With a basis, `first` is the product of its rows and `basis_tile`, which is made here.
    """
    kept = values.to(tl.float32)
    row = i.to(tl.int64)[:, None]
    inside = here[:, None] & (j < units)[None, :]
    by_y = tl.zeros(kept.shape, tl.float32)
    if second.slope is not None:
        at = second.slope + row * second.slope_row + second_at[None, :]
        by_y += 2.0 * tl.load(at, mask=inside, other=0.0) * activity_of(kept, ACTIVATION)
    if basis.basis is not None:
        g = tl.arange(0, RANK)
        at = first.slope + row * first.slope_row + g.to(tl.int64)[None, :] * first.slope_col
        by_group = tl.load(at, mask=here[:, None] & (g < basis.groups)[None, :], other=0.0)
        by_y += tl.dot(by_group, basis_tile, input_precision="ieee")
    elif first.slope is not None:
        by_y += tl.load(first.slope + row * first.slope_row + first_at[None, :], mask=inside, other=0.0)
    return by_y * slope_of(kept, ACTIVATION)


@triton.jit
def activity_of(kept, ACTIVATION: tl.constexpr):
    """`y`, from what the forward has kept: `z` for gelu and silu, else `y` itself."""
    y = kept
    if ACTIVATION == "gelu" or ACTIVATION == "silu":
        y = activate(kept, ACTIVATION)
    return y


@triton.jit
def list_kernel(slopes, stride, total, made, BLOCK: tl.constexpr):
    """The coefficients `2 slopes` `[total]` that are not exactly zero and their rows, in order: one program."""
    kept = 0
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < total
        c = 2.0 * tl.load(slopes + i.to(tl.int64) * stride, mask=here, other=0.0)
        kept = in_doubt_so_far(i, here, c, kept, made)
    tl.store(made.n_listed, kept)


@triton.jit
def scale_kernel(
    rows, input_sumsq, in_features, eps,  # `records.Batch`; [rows] sums of squares where they are known, or None
    row_scale,  # written: [rows]
    NORM: tl.constexpr, EPS_MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What normalises the rows, a block of them in each program."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = i < rows.total
    if input_sumsq is not None:
        square = tl.load(input_sumsq + i, mask=here, other=0.0)
    else:
        k = tl.arange(0, BLOCK_K)
        x_at = joint_rows(i, rows)[:, None] + k.to(tl.int64)[None, :] * rows.x_col
        sums = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            x = tl.load(x_at, mask=here[:, None] & (k < in_features - start)[None, :], other=0.0).to(tl.float32)
            sums += x * x
            x_at += BLOCK_K * tl.cast(rows.x_col, tl.int64)
        square = tl.sum(sums, axis=1)
    tl.store(row_scale + i, scale_of_rows(square, in_features, eps, NORM, EPS_MODE), mask=here)


@triton.jit
def units_kernel(
    rows, activities, out_features,  # `records.Batch`, `Kept`
    unit_sums,  # written: [splits, out]
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the positive rows' activities; programs (block of units, split of the rows)."""
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, rows.total, tl.num_programs(1) * BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        positive = positive_rows(i, i < rows.total, rows)
        values = rows_of(activities, i, positive, j, out_features)
        sums += activity_of(values.to(tl.float32), ACTIVATION)
    at = unit_sums + tl.cast(tl.program_id(1), tl.int64) * out_features + j
    tl.store(at, tl.sum(sums, axis=0), mask=j < out_features)
