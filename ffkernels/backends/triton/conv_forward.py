"""The forward of a convolution: a tile of an implicit product, and in its epilogue all up to the pool and the moments.

The product is that of rows, one for each place of the maps that come out, which nobody lays out, and the weight
`[out, taps * in]`. A tile's rows are ordered by windows of the pool, so that the pool reduces an axis of the tile.
"""

import triton
import triton.language as tl

from .common import activate, grouped, operand
from .windows import at_places, inputs_of, place_of, store_pooled, taps_from


@triton.jit
def conv_forward_kernel(
    images, kernels, mapped,  # `records.Images`, `Kernels`; written: `Mapped`
    SHAPE: tl.constexpr,  # `records.Shape`
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """`p = pool(act(r conv(x) + b))` and its moments; where `mapped` has no `p`, `r conv(x) + b` alone.

    A tile has WINDOWS windows of each of as many images as there is room for, and channels of one group.
    """
    # Triton 3.6 hands on a name of its own, not a member.
    POOL: tl.constexpr = SHAPE.pool
    PLACES: tl.constexpr = SHAPE.pool_height * SHAPE.pool_width
    IMAGES: tl.constexpr = BLOCK_M // (WINDOWS * PLACES)
    COLUMNS: tl.constexpr = SHAPE.kernel_height * SHAPE.kernel_width * SHAPE.ins
    windows: tl.constexpr = SHAPE.pooled_height * SHAPE.pooled_width
    parts: tl.constexpr = (windows + WINDOWS - 1) // WINDOWS
    tiles_of_group: tl.constexpr = (SHAPE.outs + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = grouped(
        tl.program_id(0), tl.cdiv(images.total, IMAGES) * parts, tiles_of_group * SHAPE.groups, GROUP
    )  # fmt: skip
    first_image, first_window = tile_m // parts * IMAGES, tile_m % parts * WINDOWS
    group = tile_n // tiles_of_group
    unit = tile_n % tiles_of_group * BLOCK_N + tl.arange(0, BLOCK_N)
    unit_here = unit < SHAPE.outs
    j = group * SHAPE.outs + unit

    m = tl.arange(0, BLOCK_M)
    image, window = first_image + m // (WINDOWS * PLACES), first_window + m // PLACES % WINDOWS
    here = (image < images.total) & (window < windows)
    y, x = place_of(window, m % PLACES, SHAPE)
    k = tl.arange(0, BLOCK_K)
    weight_at = kernels.weight + j.to(tl.int64)[None, :] * COLUMNS + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        dy, dx, channel, column_here = taps_from(start, SHAPE, BLOCK_K)
        values = inputs_of(images, image, y, x, here, group, dy, dx, channel, column_here, SHAPE)
        w = tl.load(weight_at + start, mask=column_here[:, None] & unit_here[None, :], other=0.0)
        acc = tl.dot(operand(values, COMPUTE, WIDEN), operand(w, COMPUTE, WIDEN), acc, input_precision=PRECISION)

    if images.scale is not None:
        acc *= tl.load(images.scale + image, mask=here, other=0.0)[:, None]
    if kernels.bias is not None:
        acc += tl.load(kernels.bias + j, mask=unit_here, other=0.0)[None, :]
    if mapped.before is not None:
        at = at_places(image, y, x, j, SHAPE)
        tl.store(mapped.before + at, acc.to(mapped.before.dtype.element_ty), mask=here[:, None] & unit_here[None, :])
    if mapped.p is not None:
        a, winner = pooled(activate(acc, ACTIVATION), POOL, PLACES)
        store_pooled(
            a, winner, first_image, tile_m % parts, images.total, j, unit_here, mapped, kernels.pivot, SHAPE,
            IMAGES, WINDOWS, BLOCK_N,
        )  # fmt: skip


@triton.jit
def pooled(a, POOL: tl.constexpr, PLACES: tl.constexpr):
    """What each PLACES rows of a tile are pooled to, and the place that wins where a maximum does."""
    winner = 0
    if POOL != "none":
        cells: tl.constexpr = a.shape[0] // PLACES
        places = tl.reshape(a, [cells, PLACES, a.shape[1]])
        if POOL == "average":
            a = tl.sum(places, axis=1) * (1.0 / PLACES)
        else:
            tl.static_assert(POOL == "max")
            a, winner = tl.max(places, axis=1, return_indices=True, return_indices_tie_break_left=True)
            # A comparison may lose a NaN, which wins wherever it is.
            nans = tl.max((places != places).to(tl.int32), axis=1)
            a = tl.where(nans > 0, float("nan"), a)
    return a, winner
