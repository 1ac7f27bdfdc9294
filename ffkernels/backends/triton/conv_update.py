"""The gradients of a convolution's weight and bias: the implicit product again, over all places, split and in order."""

import triton
import triton.language as tl

from .common import grouped, operand
from .conv_slopes import centre_of, through_windows
from .slopes import columns_of
from .update import finish_tile
from .windows import at_windows, inputs_of, place_of, tap_of


@triton.jit
def conv_update_kernel(
    images, maps, first, second,  # `records.Images`, `KeptMaps`, `Slope`, `Slope`
    weight, bias, parts, peers,  # `Parameter`, `Parameter`, `Parts` where the places are split; `Pull` without members
    SHAPE: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    WITHIN: tl.constexpr,
):  # fmt: skip
    """`dW = sum_q r_q dz_q x_q^T` and `db = sum_q dz_q` over places `q` of all images, window by window.

    Programs (tile, split): the first ones have a tile of the weight `[out, taps * in]` each, the others a block of the
    bias each, if there is one.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    channels: tl.constexpr = SHAPE.groups * SHAPE.outs
    COLUMNS: tl.constexpr = SHAPE.kernel_height * SHAPE.kernel_width * SHAPE.ins
    tiles_of_group: tl.constexpr = (SHAPE.outs + BLOCK_OUT - 1) // BLOCK_OUT
    tiles_out: tl.constexpr = tiles_of_group * SHAPE.groups
    tiles_in: tl.constexpr = (COLUMNS + BLOCK_IN - 1) // BLOCK_IN
    blocks = blocks_of(images.total, SHAPE, BLOCK_K, WITHIN)
    share = tl.cdiv(blocks, tl.num_programs(1))
    begin = split * share
    last = tl.minimum(begin + share, blocks)
    if program < tiles_out * tiles_in:
        tile_out, tile_in = grouped(program, tiles_out, tiles_in, GROUP)
        group = tile_out // tiles_of_group
        unit = tile_out % tiles_of_group * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        unit_here = unit < SHAPE.outs
        j = group * SHAPE.outs + unit
        k = tile_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
        dy, dx, channel = tap_of(k, SHAPE)
        first_at, second_at = columns_of(j, channels, first), columns_of(j, channels, second)
        centre = centre_of(maps, j, unit_here)
        acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for block in range(begin, last):
            image, window, place, here = places_of(block, images.total, SHAPE, BLOCK_K, WITHIN)
            y, x = place_of(window, place, SHAPE)
            values = inputs_of(images, image, y, x, here, group, dy, dx, channel, k < COLUMNS, SHAPE)
            if maps.dz is not None:
                at = at_windows(image, window, j, SHAPE)
                dz = tl.load(maps.dz + at, mask=here[:, None] & unit_here[None, :], other=0.0)
            else:
                dz = through_windows(
                    maps, images.total, first, first_at, second, second_at, centre, image, window, place, here, j,
                    unit_here, SHAPE, ACTIVATION,
                )  # fmt: skip
                if images.scale is not None:
                    dz *= tl.load(images.scale + image, mask=image < images.total, other=0.0)[:, None]
            left = operand(tl.trans(dz), COMPUTE, WIDEN)
            acc = tl.dot(left, operand(values, COMPUTE, WIDEN), acc, input_precision=PRECISION)
        # What lies behind the group is another's.
        j = tl.where(unit_here, j, channels)
        finish_tile(
            acc, tile_in * BLOCK_IN, j, COLUMNS, channels, split, parts, peers, weight, "grad", BLOCK_OUT, BLOCK_IN, 1
        )  # fmt: skip
    else:
        if bias.parameter is not None:
            j = (program - tiles_out * tiles_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            unit_here = j < channels
            first_at, second_at = columns_of(j, channels, first), columns_of(j, channels, second)
            centre = centre_of(maps, j, unit_here)
            bias_sum = tl.zeros([BLOCK_K, BLOCK_OUT], tl.float32)
            for block in range(begin, last):
                image, window, place, here = places_of(block, images.total, SHAPE, BLOCK_K, WITHIN)
                bias_sum += through_windows(
                    maps, images.total, first, first_at, second, second_at, centre, image, window, place, here, j,
                    unit_here, SHAPE, ACTIVATION,
                )  # fmt: skip
            gradient = tl.sum(bias_sum, axis=0)
            if parts.bias is not None:
                tl.store(parts.bias + tl.cast(split, tl.int64) * channels + j, gradient, mask=unit_here)
            else:
                tl.store(bias.state0 + j, gradient, mask=unit_here)


@triton.jit
def blocks_of(total, SHAPE: tl.constexpr, BLOCK_K: tl.constexpr, WITHIN: tl.constexpr):
    """How many blocks of BLOCK_K places `total` images have."""
    places: tl.constexpr = SHAPE.pooled_height * SHAPE.pooled_width * SHAPE.pool_height * SHAPE.pool_width
    if WITHIN:
        return total * ((places + BLOCK_K - 1) // BLOCK_K)
    else:
        return tl.cdiv(total * places, BLOCK_K)


@triton.jit
def places_of(block, total, SHAPE: tl.constexpr, BLOCK_K: tl.constexpr, WITHIN: tl.constexpr):
    """Image, window and place of a block's places, and which of them there are; WITHIN: one image, which is theirs."""
    PLACES: tl.constexpr = SHAPE.pool_height * SHAPE.pool_width
    of_image: tl.constexpr = SHAPE.pooled_height * SHAPE.pooled_width * PLACES
    if WITHIN:
        blocks: tl.constexpr = (of_image + BLOCK_K - 1) // BLOCK_K
        image = block // blocks + tl.zeros([1], tl.int32)
        q = block % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        here = q < of_image
    else:
        q = block * BLOCK_K + tl.arange(0, BLOCK_K)
        image = q // of_image
        q -= image * of_image
        here = image < total
    return image, q // PLACES, q % PLACES, here
