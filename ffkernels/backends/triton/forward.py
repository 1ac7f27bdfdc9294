"""The forward kernel: one tile product, and in its epilogue row scale, bias, activation, sums of squares and store."""

import triton
import triton.language as tl

from .classes import store_class_sums
from .coefficient import positive_rows
from .common import activate, grouped, joint_rows, operand, scale_of_rows


@triton.jit
def forward_kernel(
    # Sizes first: where arguments are loaded in registers of their own (gfx942), that takes the fewest instructions.
    rows, in_features, out_features,  # `records.Batch`
    input_sumsq, layer,  # [rows] sums of squares where they are known or None, `Linear`
    x_tiles, weight_tiles,  # both again as tensor descriptors of all rows and of the weight, under TMA
    shared, written, classes,  # `Shared`, `Forwarded`, `ClassSums`
    NORM: tl.constexpr, EPS_MODE: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,  # float16 has no room for rows of any length: scale them before they are rounded
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    PERSISTENT: tl.constexpr, SQUARES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """`y = act(r W x + b)`, `partials[n] = sum_j y_j^2` over the columns `j` of block `n`, summed before rounding.

    One program for each tile; PERSISTENT: fewer, which take tiles in turn, so that one's epilogue meets the next one's
    loads.
    """
    if PERSISTENT:
        tiles = tl.cdiv(rows.total, BLOCK_M) * tl.cdiv(out_features, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            forward_tile(
                tile, rows, input_sumsq, layer, x_tiles, weight_tiles, shared, written, classes,
                in_features, out_features, NORM, EPS_MODE, ACTIVATION, SCALE_FIRST, COMPUTE, PRECISION, WIDEN,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, SQUARES, SLOTS,
            )  # fmt: skip
    else:
        forward_tile(
            tl.program_id(0), rows, input_sumsq, layer, x_tiles, weight_tiles, shared, written, classes,
            in_features, out_features, NORM, EPS_MODE, ACTIVATION, SCALE_FIRST, COMPUTE, PRECISION, WIDEN,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, SQUARES, SLOTS,
        )  # fmt: skip


@triton.jit
def forward_tile(
    tile, rows, input_sumsq, layer, x_tiles, weight_tiles, shared, written, classes, in_features, out_features,
    NORM: tl.constexpr, EPS_MODE: tl.constexpr, ACTIVATION: tl.constexpr, SCALE_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    SQUARES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One tile of the product.

    `W (r x) = r (W x)`: the row scale `r` waits for the product, and where nobody knows the rows' sums of squares they
    are taken from the very tiles that the product reads.
    """
    tile_m, tile_n = grouped(tile, tl.cdiv(rows.total, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_here, unit_here = i < rows.total, j < out_features
    inside = row_here[:, None] & unit_here[None, :]
    x_at = joint_rows(i, rows)[:, None] + k.to(tl.int64)[None, :] * rows.x_col
    weight_at = (
        layer.weight
        + j.to(tl.int64)[None, :] * layer.weight_row
        + k.to(tl.int64)[:, None] * layer.weight_col
    )  # fmt: skip

    square = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if NORM != "none" and input_sumsq is not None:
        square = tl.load(input_sumsq + i, mask=row_here, other=0.0)
        scale = scale_of_rows(square, in_features, layer.eps, NORM, EPS_MODE)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    columns = in_features
    if shared.product is not None:
        columns = shared.columns
        pair = tl.where(i < rows.n_pos, i, i - rows.n_pos).to(tl.int64)
        acc += tl.load(shared.product + pair[:, None] * out_features + j[None, :], mask=inside, other=0.0)
    for start in range(0, columns, BLOCK_K):
        if TMA:
            x = x_tiles.load([tile_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
            w = weight_tiles.load([tile_n * BLOCK_N, start]).T  # [BLOCK_K, BLOCK_N]
        else:
            here = k < columns - start
            x = tl.load(x_at, mask=row_here[:, None] & here[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(weight_at, mask=here[:, None] & unit_here[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
            x_at += BLOCK_K * tl.cast(rows.x_col, tl.int64)
            weight_at += BLOCK_K * tl.cast(layer.weight_col, tl.int64)
        if NORM != "none" and input_sumsq is None:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
        if SCALE_FIRST:
            x = x.to(tl.float32) * scale[:, None]
        x, w = operand(x, COMPUTE, WIDEN), operand(w, COMPUTE, WIDEN)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if NORM != "none":
        if input_sumsq is None:
            scale = scale_of_rows(square, in_features, layer.eps, NORM, EPS_MODE)
        if written.row_scale is not None and tile_n == 0:
            tl.store(written.row_scale + i, scale, mask=row_here)
        if not SCALE_FIRST:
            acc *= scale[:, None]
    if layer.bias is not None:
        b = tl.load(layer.bias + j.to(tl.int64) * layer.bias_stride, mask=unit_here, other=0.0)
        acc += b[None, :]
    activity = activate(acc, ACTIVATION)
    # Beyond the edges product and bias are 0, and so is every activation of 0: nothing to mask in the sum.
    partials = written.partials + tl.cast(tile_n, tl.int64) * rows.total
    tl.store(partials + i, tl.sum(activity * activity, axis=1), mask=row_here)
    if classes.sums is not None:
        store_class_sums(activity, i, j, row_here, tile_n, rows.total, out_features, classes, SQUARES, SLOTS, BLOCK_N)
    if written.unit_sums is not None:
        positive = positive_rows(i, row_here, rows)
        of_positive = tl.sum(tl.where(positive[:, None], activity, 0.0), axis=0)
        unit_sums = written.unit_sums + tl.cast(tile_m, tl.int64) * out_features
        tl.store(unit_sums + j, of_positive, mask=unit_here)
    if written.y is not None:
        y_at = written.y + i.to(tl.int64)[:, None] * written.y_row + j.to(tl.int64)[None, :] * written.y_col
        tl.store(y_at, activity.to(written.y.dtype.element_ty), mask=inside)
    if written.kept is not None:
        kept_at = written.kept + i.to(tl.int64)[:, None] * out_features + j[None, :]
        tl.store(kept_at, acc.to(written.kept.dtype.element_ty), mask=inside)
