"""Where the numbers of a convolution lie in maps whose channels lie last: windows of a pool, their places, taps."""

import triton
import triton.language as tl


@triton.jit
def place_of(window, place, SHAPE: tl.constexpr):
    """Row and column, in maps in front of the pool, of places in windows; both are numbered row by row."""
    y = window // SHAPE.pooled_width * SHAPE.pool_stride_y + place // SHAPE.pool_width
    x = window % SHAPE.pooled_width * SHAPE.pool_stride_x + place % SHAPE.pool_width
    return y, x


@triton.jit
def tap_of(k, SHAPE: tl.constexpr):
    """Row and column of the tap, and channel within the group, of columns `k` of a weight `[out, taps * in]`."""
    tap = k // SHAPE.ins
    return tap // SHAPE.kernel_width, tap % SHAPE.kernel_width, k % SHAPE.ins


@triton.jit
def taps_from(start, SHAPE: tl.constexpr, BLOCK_K: tl.constexpr):
    """`tap_of` the columns from a multiple of BLOCK_K on, by one division for all of them where they are of one tap."""
    k = start + tl.arange(0, BLOCK_K)
    if SHAPE.ins % BLOCK_K == 0:
        tap, same = start // SHAPE.ins, tl.zeros([BLOCK_K], tl.int32)
        dy, dx = tap // SHAPE.kernel_width + same, tap % SHAPE.kernel_width + same
        # Of a remainder Triton would not see that it is a multiple of 16, and load number by number.
        channel = k - tap * SHAPE.ins
    else:
        dy, dx, channel = tap_of(k, SHAPE)
    return dy, dx, channel, k < SHAPE.kernel_height * SHAPE.kernel_width * SHAPE.ins


@triton.jit
def inputs_of(images, image, y, x, here, group, dy, dx, channel, column_here, SHAPE: tl.constexpr):
    """`[len(image), len(channel)]` what a group's taps read for places (y, x) of the maps that they make; zero beyond
    edges."""
    channels: tl.constexpr = SHAPE.groups * SHAPE.ins
    row = y * SHAPE.stride_y - SHAPE.pad_y
    column = x * SHAPE.stride_x - SHAPE.pad_x
    inside = here[:, None] & column_here[None, :]
    if SHAPE.pad_y > 0:
        at_row = row[:, None] + dy[None, :]
        inside &= (at_row >= 0) & (at_row < SHAPE.height)
    if SHAPE.pad_x > 0:
        at_column = column[:, None] + dx[None, :]
        inside &= (at_column >= 0) & (at_column < SHAPE.width)
    corner = image.to(tl.int64) * (SHAPE.height * SHAPE.width * channels) + (row * SHAPE.width + column) * channels
    tap = (dy * SHAPE.width + dx) * channels + group * SHAPE.ins + channel
    return tl.load(images.x + corner[:, None] + tap[None, :], mask=inside, other=0.0)


@triton.jit
def at_places(image, y, x, j, SHAPE: tl.constexpr):
    """Offsets in maps in front of the pool."""
    row = image.to(tl.int64) * (SHAPE.before_height * SHAPE.before_width) + y * SHAPE.before_width + x
    return row[:, None] * (SHAPE.groups * SHAPE.outs) + j[None, :]


@triton.jit
def at_windows(image, window, j, SHAPE: tl.constexpr):
    """Offsets in maps behind the pool."""
    row = image.to(tl.int64) * (SHAPE.pooled_height * SHAPE.pooled_width) + window
    return row[:, None] * (SHAPE.groups * SHAPE.outs) + j[None, :]


@triton.jit
def store_pooled(
    a, winner, first_image, part, total, j, unit_here, mapped, pivot, SHAPE: tl.constexpr,
    IMAGES: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores activities `[IMAGES * WINDOWS, BLOCK_N]` behind the pool, their winners, and what these windows, a part of
    those of each image, add to the moments."""
    cell = tl.arange(0, IMAGES * WINDOWS)
    image, window = first_image + cell // WINDOWS, part * WINDOWS + cell % WINDOWS
    here = (image < total) & (window < SHAPE.pooled_height * SHAPE.pooled_width)
    inside = here[:, None] & unit_here[None, :]
    at = at_windows(image, window, j, SHAPE)
    p = a.to(mapped.p.dtype.element_ty)
    tl.store(mapped.p + at, p, mask=inside)
    if SHAPE.pool == "max":
        tl.store(mapped.where + at, winner.to(mapped.where.dtype.element_ty), mask=inside)
    # Of what the way back reads: sums that cancel there cancel here.
    apart = p.to(tl.float32)
    if pivot is not None:
        apart -= tl.load(pivot + j, mask=unit_here, other=0.0)[None, :]
    apart = tl.reshape(tl.where(inside, apart, 0.0), [IMAGES, WINDOWS, BLOCK_N])
    row = first_image + tl.arange(0, IMAGES)
    at_row = (tl.cast(part, tl.int64) * total + row)[:, None] * (SHAPE.groups * SHAPE.outs) + j[None, :]
    row_here = (row < total)[:, None] & unit_here[None, :]
    tl.store(mapped.first + at_row, tl.sum(apart, axis=1), mask=row_here)
    tl.store(mapped.spread + at_row, tl.sum(apart * apart, axis=1), mask=row_here)
