"""Pools that the forward's tiles cannot hold: windows that overlap, or whose places are no power of two, or many.

Products in front of these come from the forward, through memory: in its tile a place would have to stand once for each
window that it is in, and windows of nine places would leave seven sixteenths of the tile's products unused.
"""

import triton
import triton.language as tl

from .common import activate
from .windows import at_places, place_of, store_pooled


@triton.jit
def pool_kernel(
    mapped, pivot, total,  # `records.Mapped`, of which `before` is read; [out] or None; images
    SHAPE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`p = pool(act(z))` and its moments; programs (image and block of its windows, block of channels)."""
    windows: tl.constexpr = SHAPE.pooled_height * SHAPE.pooled_width
    channels: tl.constexpr = SHAPE.groups * SHAPE.outs
    parts: tl.constexpr = (windows + BLOCK_M - 1) // BLOCK_M
    PLACES: tl.constexpr = SHAPE.pool_height * SHAPE.pool_width
    first_image, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    image = first_image + tl.zeros([BLOCK_M], tl.int32)
    window = part * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit_here = j < channels
    inside = (window < windows)[:, None] & unit_here[None, :]
    a = tl.full([BLOCK_M, BLOCK_N], 0.0 if SHAPE.pool == "average" else float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for place in range(PLACES):
        y, x = place_of(window, place, SHAPE)
        z = tl.load(mapped.before + at_places(image, y, x, j, SHAPE), mask=inside, other=0.0)
        value = activate(z.to(tl.float32), ACTIVATION)
        if SHAPE.pool == "average":
            a += value
        else:
            # The first of equal ones wins, and a NaN always does.
            wins = (value > a) | (value != value)
            a = tl.where(wins, value, a)
            winner = tl.where(wins, place, winner)
    if SHAPE.pool == "average":
        a *= 1.0 / PLACES
    store_pooled(
        a, winner, first_image, part, total, j, unit_here, mapped, pivot, SHAPE, 1, BLOCK_M, BLOCK_N
    )  # fmt: skip
