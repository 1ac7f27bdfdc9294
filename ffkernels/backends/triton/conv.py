"""A convolution's operators: from records to the kernels' own, and the launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...spec import Geometry, Layer, MapGradients, MapRows, Maps, MapSlopes
from ..eager.conv import hand_on_, is_told_before, nothing, size_of, summed
from . import configs, operands
from .conv_forward import conv_forward_kernel
from .conv_slopes import gradient_kernel
from .conv_update import conv_update_kernel
from .device import device_of, processors
from .finish import finish_kernel
from .launch import FINISH_BLOCK, count_splits
from .pools import pool_kernel
from .records import Images, KeptMaps, Kernels, Mapped, Parameter, Parts, Pull, Shape, Slope
from .support import interpreted

# Windows of up to so many places are pooled in the product's tile, where their number is a power of two.
PLACES_IN_TILE = 16
MAPS_BLOCK = {False: {"BLOCK_M": 64, "BLOCK_N": 64}, True: {"BLOCK_M": 16, "BLOCK_N": 16}}
# The kernels count places with 32 bits.
MOST_PLACES = 2**31 - 2**16


def conv2d_forward(rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None) -> Maps:
    """See `ops.SCHEMAS`."""
    if is_centred and pivot is None and len(rows.x):
        # The first row's mean: squares about what is like the rest keep the digits of a variance.
        one = MapRows(rows.x[:1], None if rows.scale is None else rows.scale[:1])
        maps = forward(one, layer, geometry, None)
        pivot = maps.first[0] / (maps.p.shape[2] * maps.p.shape[3])
    maps = forward(rows, layer, geometry, pivot)
    about = layer.weight.new_zeros(len(layer.weight) if is_centred else 0) if pivot is None else pivot.clone()
    return maps._replace(pivot=about)


def conv2d_forward_like(
    rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None
) -> Maps:
    """What `conv2d_forward` returns, of tensors without numbers."""
    maps = room(rows, layer, geometry, shape_of(rows, layer, geometry))
    about = layer.weight.new_empty(len(layer.weight) if is_centred or pivot is not None else 0)
    return maps._replace(pivot=about)


def conv2d_gradients_(rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes) -> MapGradients:
    """See `ops.SCHEMAS`."""
    if not len(rows.x):
        return nothing(rows, layer, geometry, slopes)
    shape, weight, channels = shape_of(rows, layer, geometry), layer.weight, len(layer.weight)
    dz = bias = None
    if slopes.by_place or overlaps(geometry):
        dz, bias = gradient(rows, layer, maps, slopes, shape)
        bias = bias if layer.bias is not None else torch.zeros_like(bias)
    by_column, by_tile = update(rows, layer, maps, slopes, shape, dz)
    taps = (channels, weight.shape[2], weight.shape[3], weight.shape[1])
    by_weight = by_column.view(taps).permute(0, 3, 1, 2).contiguous()
    by_place = weight.new_empty(0) if dz is None else summed(dz, weight, slopes)
    if slopes.gain is not None and slopes.shift is not None:
        hand_on_(maps, slopes.gain, slopes.shift)
    return MapGradients(by_weight, by_tile if bias is None else bias, by_place)


def shape_of(rows: MapRows, layer: Layer, geometry: Geometry) -> Shape:
    """What the kernels are compiled for.

    Raises:
        ValueError: where a row has more numbers, or the maps have more places, than the kernels count.
    """
    (count, channels, height, width), weight = rows.x.shape, layer.weight
    before = size_of(rows, layer, geometry)
    sides = zip(before, geometry.pool_size, geometry.pool_stride, strict=True)
    behind = [(size - of) // step + 1 for size, of, step in sides]
    if max(count * before[0] * before[1], height * width * channels) > MOST_PLACES:
        raise ValueError(
            f"x has shape {tuple(rows.x.shape)}, which becomes {count} maps of {before}; accepted: up to {MOST_PLACES} "
            "numbers in a row, and places in all rows' maps"
        )
    padding = geometry.padding if geometry.padding_mode == "zeros" else (0, 0)
    sizes: Any = (
        height, width, weight.shape[1], len(weight) // geometry.groups, geometry.groups, *weight.shape[2:],
        *geometry.stride, *padding, *before, *behind, geometry.pool, *geometry.pool_size, *geometry.pool_stride,
    )  # fmt: skip
    return Shape(*sizes)


def overlaps(geometry: Geometry) -> bool:
    """Whether a place may be in several windows of the pool."""
    return any(step < of for of, step in zip(geometry.pool_size, geometry.pool_stride, strict=True))


def fits_in_tile(geometry: Geometry) -> bool:
    """Whether windows are pooled in the product's tile: `pools`."""
    places = geometry.pool_size[0] * geometry.pool_size[1]
    return not overlaps(geometry) and places <= PLACES_IN_TILE and places & (places - 1) == 0


def without_pool(shape: Shape) -> Shape:
    """The same of the maps in front of the pool alone."""
    return shape._replace(
        pooled_height=shape.before_height, pooled_width=shape.before_width, pool="none",
        pool_height=1, pool_width=1, pool_stride_y=1, pool_stride_x=1,
    )  # fmt: skip


def room(rows: MapRows, layer: Layer, geometry: Geometry, shape: Shape) -> Maps:
    """Memory for what a forward makes, whose pivot has no elements."""
    count, channels, new = len(rows.x), len(layer.weight), layer.weight.new_empty
    behind = (count, channels, shape.pooled_height, shape.pooled_width)
    p = maps_like(rows.x, behind, layer.compute_dtype)
    where = maps_like(p, behind if shape.pool == "max" else (0,), where_dtype(shape))
    in_front = (count, channels, shape.before_height, shape.before_width)
    before = maps_like(p, in_front if is_told_before(layer.activation, geometry) else (0,), p.dtype)
    return Maps(p, new(count, channels), new(count, channels), new(0), where, before)


def where_dtype(shape: Shape) -> torch.dtype:
    """What numbers the places of a window."""
    return torch.uint8 if shape.pool_height * shape.pool_width <= 256 else torch.int32


def maps_like(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for maps whose channels lie last, or for none of them."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def forward(rows: MapRows, layer: Layer, geometry: Geometry, pivot: Tensor | None) -> Maps:
    """Launches the forward, and where the pool is one of its own, that; the pivot has no elements."""
    shape = shape_of(rows, layer, geometry)
    maps = room(rows, layer, geometry, shape)
    count, channels = maps.first.shape
    if count == 0:
        return maps
    before = maps.before if maps.before.numel() else None
    p, where = maps.p, maps.where if shape.pool == "max" else None
    config = configs.of_conv("conv_forward", kind_of(layer), sizes_of(rows, shape), shape.ins, layer.weight.device)
    in_tile = fits_in_tile(geometry)
    multiplied = shape if in_tile else without_pool(shape)
    places = multiplied.pool_height * multiplied.pool_width
    windows = multiplied.pooled_height * multiplied.pooled_width
    in_image = windows_in_tile(multiplied, config["BLOCK_M"])
    block = MAPS_BLOCK[interpreted()]
    parts = triton.cdiv(windows, in_image) if in_tile else triton.cdiv(maps.p[0, 0].numel(), block["BLOCK_M"])
    first, spread = (
        sums if parts == 1 else sums.new_empty(parts, count, channels) for sums in (maps.first, maps.spread)
    )
    if in_tile:
        mapped = Mapped(p, where, before, first, spread)
    else:
        in_front = (count, channels, shape.before_height, shape.before_width)
        before = maps_like(p, in_front, p.dtype) if before is None else before
        mapped = Mapped(None, None, before, None, None)
    images = config["BLOCK_M"] // (in_image * places)
    tiles_m = triton.cdiv(count, images) * triton.cdiv(windows, in_image)
    tiles_n = triton.cdiv(shape.outs, config["BLOCK_N"]) * shape.groups
    with device_of(rows.x):
        conv_forward_kernel[(tiles_m * tiles_n,)](
            images=images_of(rows),
            kernels=Kernels(kernels_of(layer), packed(layer.bias), packed(pivot)),
            mapped=mapped,
            SHAPE=multiplied,
            ACTIVATION=layer.activation,
            WINDOWS=in_image,
            **arithmetic(layer),
            **config,
        )
        if not in_tile:
            pool_kernel[(count * parts, triton.cdiv(channels, block["BLOCK_N"]))](
                mapped=Mapped(p, where, before, first, spread),
                pivot=packed(pivot),
                total=count,
                SHAPE=shape,
                ACTIVATION=layer.activation,
                **block,
            )
    if parts > 1:
        # PyTorch adds them in a fixed order.
        torch.sum(first, 0, out=maps.first)
        torch.sum(spread, 0, out=maps.spread)
    return maps


def gradient(rows: MapRows, layer: Layer, maps: Maps, slopes: MapSlopes, shape: Shape) -> tuple[Tensor, Tensor]:
    """Launches `dz` into memory, in the compute dtype, and the bias's gradient beside it."""
    count, channels = maps.p.shape[:2]
    dz = maps_like(maps.p, (count, channels, shape.before_height, shape.before_width), layer.compute_dtype)
    block = MAPS_BLOCK[interpreted()]
    blocks = triton.cdiv(count * shape.before_height * shape.before_width, block["BLOCK_M"])
    bias_parts = layer.weight.new_empty(blocks, channels)
    first, second = slopes_of(slopes, channels)
    with device_of(rows.x):
        gradient_kernel[(blocks, triton.cdiv(channels, block["BLOCK_N"]))](
            maps=kept_of(maps)._replace(dz=dz),
            scale=packed(rows.scale),
            total=count,
            first=first,
            second=second,
            bias_parts=bias_parts,
            SHAPE=shape,
            ACTIVATION=layer.activation,
            **block,
        )
    return dz, bias_parts.sum(0)


def update(
    rows: MapRows, layer: Layer, maps: Maps, slopes: MapSlopes, shape: Shape, dz: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches the gradients of the weight, `[out, taps * in]`, and of the bias: zeros where there is none, and where
    `dz` is given."""
    weight, channels = layer.weight, len(layer.weight)
    columns = weight[0].numel()
    made = weight.new_empty(channels, columns)
    has_bias = layer.bias is not None and dz is None
    of_bias = weight.new_empty(channels) if has_bias else weight.new_zeros(channels)
    by_weight, by_bias = operands.gradient_of(made), operands.gradient_of(of_bias) if has_bias else Parameter()
    first, second, kept = *slopes_of(slopes, channels), kept_of(maps)
    if dz is not None:
        shape, first, second, kept = without_pool(shape), Slope(), Slope(), KeptMaps(dz=dz)
    config = configs.of_conv("conv_update", kind_of(layer), sizes_of(rows, shape), shape.ins, weight.device)
    blocks_out = triton.cdiv(channels, config["BLOCK_OUT"])
    tiles = triton.cdiv(shape.outs, config["BLOCK_OUT"]) * shape.groups * triton.cdiv(columns, config["BLOCK_IN"])
    blocks = triton.cdiv(len(rows.x) * places_of(shape), config["BLOCK_K"])
    splits = count_splits(tiles, blocks, processors(weight.device))
    parts = Parts()
    if splits > 1:
        parts = Parts(
            weight.new_empty(splits, channels, columns), weight.new_empty(splits, channels) if has_bias else None
        )
    with device_of(weight):
        conv_update_kernel[(tiles + (blocks_out if has_bias else 0), splits)](
            images=images_of(rows),
            maps=kept,
            first=first,
            second=second,
            weight=by_weight,
            bias=by_bias,
            parts=parts,
            peers=Pull(),
            SHAPE=shape,
            ACTIVATION=layer.activation,
            WITHIN=ends_with_image(shape, config["BLOCK_K"]),
            **arithmetic(layer),
            **config,
        )
        if splits > 1:
            block = FINISH_BLOCK[interpreted()]
            blocks_out = triton.cdiv(channels, block["BLOCK_OUT"])
            finish_kernel[(blocks_out * triton.cdiv(columns, block["BLOCK_IN"]) + blocks_out,)](
                parts=parts,
                loss=None,
                splits=splits,
                peers=Pull(),
                in_features=columns,
                out_features=channels,
                weight=by_weight,
                bias=by_bias,
                RULE="grad",
                **block,
            )
    return made, of_bias


def windows_in_tile(shape: Shape, block: int) -> int:
    """How many windows of an image are in a tile of so many places: as few images share it as fill it."""
    windows = shape.pooled_height * shape.pooled_width
    return min(block // (shape.pool_height * shape.pool_width), triton.next_power_of_2(windows))


def ends_with_image(shape: Shape, block: int) -> bool:
    """Whether blocks of so many places end with their image, so that slopes are of one row: not where that leaves more
    than a quarter of them empty."""
    places = places_of(shape)
    return 4 * places >= 3 * block * triton.cdiv(places, block)


def places_of(shape: Shape) -> int:
    """How many places of an image lie in windows of the pool."""
    return shape.pooled_height * shape.pooled_width * shape.pool_height * shape.pool_width


def images_of(rows: MapRows) -> Images:
    """The rows for a launch."""
    return Images(rows.x.contiguous(memory_format=torch.channels_last), packed(rows.scale), len(rows.x))


def kernels_of(layer: Layer) -> Tensor:
    """The weight `[out, taps, in]` in the compute dtype, rounded and turned once for all tiles."""
    return layer.weight.permute(0, 2, 3, 1).to(layer.compute_dtype).contiguous()


def kept_of(maps: Maps) -> KeptMaps:
    """What a forward has left, for a launch."""
    where, before, pivot = (t if t.numel() else None for t in (maps.where, maps.before, maps.pivot))
    return KeptMaps(maps.p.contiguous(memory_format=torch.channels_last), where, before, pivot)


def slopes_of(slopes: MapSlopes, channels: int) -> tuple[Slope, Slope]:
    """The slopes for a launch."""
    return operands.slope_of(slopes.first, channels), operands.slope_of(slopes.second, channels)


def packed(values: Tensor | None) -> Tensor | None:
    return operands.packed(values)


def kind_of(layer: Layer) -> str:
    """Which of `configs.KINDS`: both operands of a convolution come in the compute dtype."""
    return operands.kind_of(layer.compute_dtype)


def sizes_of(rows: MapRows, shape: Shape) -> tuple[int, int, int]:
    """Rows, columns and channels of a group's product."""
    columns = shape.kernel_height * shape.kernel_width * shape.ins
    return len(rows.x) * shape.before_height * shape.before_width, columns, shape.outs


def arithmetic(layer: Layer) -> dict[str, Any]:
    """Constants of the products, whose precision in float32 is that of PyTorch's own convolutions."""
    precision = "ieee"
    if torch.version.hip is None and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        precision = "tf32"
    return {**operands.arithmetic(layer), "PRECISION": precision}
