"""From the moments' slopes to `dLoss/dz` of a convolution: of a tile as the update takes it, or written to memory."""

import triton
import triton.language as tl

from .common import LEAKY_SLOPE, slope_of
from .slopes import columns_of
from .windows import at_places, at_windows, place_of


@triton.jit
def through_windows(
    maps, total, first, first_at, second, second_at, centre, image, window, place, here, j, unit_here,
    SHAPE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`[len(window), len(j)]` in float32 what reaches places of windows of images, or of one image, through the
    activation too: `dp = first + 2 second (p - centre)`, to the place that won, or to each its share."""
    inside = here[:, None] & unit_here[None, :]
    at = at_windows(image, window, j, SHAPE)
    row, row_here = image.to(tl.int64)[:, None], (image < total)[:, None] & unit_here[None, :]
    p = tl.load(maps.p + at, mask=inside, other=0.0).to(tl.float32)
    dp = tl.zeros(p.shape, tl.float32)
    if second.slope is not None:
        slope = tl.load(second.slope + row * second.slope_row + second_at[None, :], mask=row_here, other=0.0)
        dp += 2.0 * slope * (p - centre[None, :])
    if first.slope is not None:
        dp += tl.load(first.slope + row * first.slope_row + first_at[None, :], mask=row_here, other=0.0)
    if SHAPE.pool == "max":
        winner = tl.load(maps.where + at, mask=inside, other=0).to(tl.int32)
        dp = tl.where(winner == place[:, None], dp, 0.0)
    elif SHAPE.pool == "average":
        dp *= 1.0 / (SHAPE.pool_height * SHAPE.pool_width)
    kept = p
    if maps.before is not None:
        y, x = place_of(window, place, SHAPE)
        kept = tl.load(maps.before + at_places(image, y, x, j, SHAPE), mask=inside, other=0.0).to(tl.float32)
    # Not even an infinity times zero is left of what a ReLU shuts off.
    if ACTIVATION == "relu":
        dz = tl.where(kept <= 0, 0.0, dp)
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(kept <= 0, LEAKY_SLOPE * dp, dp)
    else:
        dz = dp * slope_of(kept, ACTIVATION)
    return tl.where(inside, dz, 0.0)


@triton.jit
def centre_of(maps, j, unit_here):
    """`[len(j)]` what the moments are about."""
    centre = tl.zeros(j.shape, tl.float32)
    if maps.pivot is not None:
        centre = tl.load(maps.pivot + j, mask=unit_here, other=0.0)
    return centre


@triton.jit
def gradient_kernel(
    maps, scale, total, first, second,  # `records.KeptMaps`; [total] or None; `Slope`, `Slope`
    bias_parts,  # written, beside `maps.dz`: [blocks, out] sums of the gradient without the scale
    SHAPE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`dz` of places one after another, each through all the windows that it is in; programs (block of places, block of
    channels)."""
    places: tl.constexpr = SHAPE.before_height * SHAPE.before_width
    channels: tl.constexpr = SHAPE.groups * SHAPE.outs
    # How many windows a place may be in.
    DOWN: tl.constexpr = (SHAPE.pool_height + SHAPE.pool_stride_y - 1) // SHAPE.pool_stride_y
    ACROSS: tl.constexpr = (SHAPE.pool_width + SHAPE.pool_stride_x - 1) // SHAPE.pool_stride_x
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit_here = j < channels
    first_at, second_at = columns_of(j, channels, first), columns_of(j, channels, second)
    centre = centre_of(maps, j, unit_here)
    q = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = q // places
    y, x = q % places // SHAPE.before_width, q % SHAPE.before_width
    dz = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for back in range(DOWN * ACROSS):
        line, column = y // SHAPE.pool_stride_y - back // ACROSS, x // SHAPE.pool_stride_x - back % ACROSS
        down, across = y - line * SHAPE.pool_stride_y, x - column * SHAPE.pool_stride_x
        here = (image < total) & (line >= 0) & (line < SHAPE.pooled_height) & (down < SHAPE.pool_height)
        here &= (column >= 0) & (column < SHAPE.pooled_width) & (across < SHAPE.pool_width)
        dz += through_windows(
            maps, total, first, first_at, second, second_at, centre, image, line * SHAPE.pooled_width + column,
            down * SHAPE.pool_width + across, here, j, unit_here, SHAPE, ACTIVATION,
        )  # fmt: skip
    tl.store(bias_parts + tl.program_id(0).to(tl.int64) * channels + j, tl.sum(dz, axis=0), mask=unit_here)
    if scale is not None:
        dz *= tl.load(scale + image, mask=image < total, other=0.0)[:, None]
    at = at_places(image, y, x, j, SHAPE)
    tl.store(maps.dz + at, dz.to(maps.dz.dtype.element_ty), mask=(image < total)[:, None] & unit_here[None, :])
