"""A convolutional layer: maps in, activities and moments out; and from slopes by these to the parameters' gradients.

Maps are channels-last throughout. There is no graph, and no gradient of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec import Geometry, Layer, MapGradients, MapRows, Maps, MapSlopes
from .gradient import unsaturated_rows
from .layer import ACTIVATIONS, LEAKY_SLOPE

# Whose maximum over a window is that of the window's maximum, ties and all: pooling first leaves less to activate.
POOLED_FIRST = ("relu", "identity")
ONEDNN_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(rows: MapRows, layer: Layer, geometry: Geometry) -> Tensor:
    """`conv(x)`, channels-last in the compute dtype; with the bias where no scale stands between them."""
    compute = layer.compute_dtype
    x, weight = _operands(rows.x, layer.weight.to(compute))
    bias = None if layer.bias is None or rows.scale is not None else layer.bias.to(compute).to(x.dtype)
    z = F.conv2d(x, weight, bias, geometry.stride, _padding(geometry), 1, geometry.groups)
    return z.to(compute).contiguous(memory_format=torch.channels_last)


def _operands(*narrow: Tensor) -> tuple[Tensor, ...]:
    """Operands as PyTorch multiplies them best: bfloat16 ones widened on a CPU that oneDNN has no such products for,
    where PyTorch's own take six to eight times as long as those of float32."""
    of = narrow[0]
    if of.dtype != torch.bfloat16 or of.device.type != "cpu" or ONEDNN_HAS_BFLOAT16:
        return narrow
    return tuple([operand.float() for operand in narrow])


def activities(rows: MapRows, layer: Layer, geometry: Geometry) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`p`, `where` and `before` of `spec.Maps`; autograd-compatible by weight and bias."""
    return behind(scaled_product(rows, layer, geometry), layer.activation, geometry)


def scaled_product(rows: MapRows, layer: Layer, geometry: Geometry) -> Tensor:
    """`z = r conv(x) + b`, channels-last in the compute dtype."""
    z = product(rows, layer, geometry)
    if rows.scale is not None:
        z.mul_(rows.scale[:, None, None, None])
        if layer.bias is not None:
            z.add_(layer.bias[:, None, None])
    return z


def behind(z: Tensor, of: str, geometry: Geometry) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the activation `of` and the pool make of `z`: `p`, `where` and `before` of `spec.Maps`."""
    activation = ACTIVATIONS[of]
    if geometry.pool == "max" and of in POOLED_FIRST:
        p, where = _max_pool(z, geometry)
        return activation.forward(p), where, None
    a = activation.forward(z)
    before = None
    if is_told_before(of, geometry):
        before = z if activation.keeps_z else a
    if geometry.pool == "none":
        return a, None, before
    if geometry.pool == "max":
        p, where = _max_pool(a, geometry)
        return p, where, before
    return F.avg_pool2d(a, geometry.pool_size, geometry.pool_stride), None, before


def is_told_before(activation: str, geometry: Geometry) -> bool:
    """Whether the activation's slope is told by what is in front of the pool, and not by what is behind it."""
    return ACTIVATIONS[activation].keeps_z or (geometry.pool == "average" and activation != "identity")


def conv2d_forward(rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None) -> Maps:
    """See `ops.SCHEMAS`."""
    return maps_of(*activities(rows, layer, geometry), layer.weight, is_centred, pivot)


def maps_of(
    p: Tensor, where: Tensor | None, before: Tensor | None, weight: Tensor, is_centred: bool, pivot: Tensor | None
) -> Maps:
    """The record of activities, with their moments in the weight's dtype."""
    before, where = (p.new_empty(0) if kept is None else kept for kept in (before, where))
    wide = p.to(weight.dtype)
    if pivot is not None:
        pivot = pivot.clone()
    elif is_centred:
        pivot = wide.sum((0, 2, 3)) / max(len(p) * p.shape[2] * p.shape[3], 1)
    if pivot is not None:
        wide = wide - pivot[:, None, None]
    about = weight.new_empty(0) if pivot is None else pivot
    return Maps(p, wide.sum((2, 3)), wide.square().sum((2, 3)), about, where, before)


# It runs on tensors without numbers too.
conv2d_forward_like = conv2d_forward


def unsaturated(rows: MapRows, maps: Maps, slopes: MapSlopes) -> tuple[MapRows, Maps, MapSlopes]:
    """What is left where rows have slopes of exactly zero alone, if these are worth leaving out."""
    given = [slope for slope in (slopes.first, slopes.second, slopes.of_place) if slope is not None]
    kept = unsaturated_rows(torch.stack([(slope != 0).flatten(1).any(1) for slope in given]).any(0))
    if kept is None:
        return rows, maps, slopes
    first, second = (None if slope is None else slope[kept] for slope in (slopes.first, slopes.second))
    scale = None if rows.scale is None else rows.scale[kept]
    where, before = (take(t, kept) if t.numel() else t for t in (maps.where, maps.before))
    of_place = None if slopes.of_place is None else take(slopes.of_place, kept)
    return (
        MapRows(take(rows.x, kept), scale),
        maps._replace(p=take(maps.p, kept), where=where, before=before),
        slopes._replace(first=first, second=second, of_place=of_place),
    )


def conv2d_gradients_(rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes) -> MapGradients:
    """See `ops.SCHEMAS`."""
    whole, weight = maps, layer.weight
    rows, maps, slopes = unsaturated(rows, maps, slopes)
    if len(maps.p):
        dz, db = _gradient(rows, layer, geometry, maps, slopes)
        gradients = MapGradients(
            by_weight(dz, rows.x, layer, geometry, slopes.by_place), db, summed(dz, weight, slopes)
        )
    else:
        gradients = nothing(rows, layer, geometry, slopes)
    if slopes.gain is not None and slopes.shift is not None:
        hand_on_(whole, slopes.gain, slopes.shift)
    return gradients


def hand_on_(maps: Maps, gain: Tensor, shift: Tensor) -> None:
    """Writes `gain (p - pivot) + shift` over the activities."""
    p = maps.p
    if p.dtype == gain.dtype:
        p.sub_(maps.pivot[:, None, None]).mul_(gain[:, None, None]).add_(shift[:, None, None])
    else:
        # One pass, whose sums are as wide as its parameters.
        p.copy_(F.batch_norm(p, maps.pivot, torch.ones_like(gain), gain, shift, False, 0.0, 0.0))


def summed(dz: Tensor, weight: Tensor, slopes: MapSlopes) -> Tensor:
    """`MapGradients.by_place`."""
    return over_rows(dz, weight.dtype) if slopes.by_place else weight.new_empty(0)


def over_rows(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum `[1, channels, h, w]` over rows.

    Of maps whose memory is walked in order: PyTorch's own sum of channels-last ones takes 15 to 40 times as long.
    """
    by_place = maps.permute(0, 2, 3, 1)
    return by_place.flatten(1).sum(0, dtype=dtype).view(1, *by_place.shape[1:]).permute(0, 3, 1, 2)


def nothing(rows: MapRows, layer: Layer, geometry: Geometry, slopes: MapSlopes) -> MapGradients:
    """The gradients of no rows."""
    new, channels = layer.weight.new_zeros, len(layer.weight)
    by_place = new(1, channels, *size_of(rows, layer, geometry)) if slopes.by_place else new(0)
    return MapGradients(new(layer.weight.shape), new(channels), by_place)


def _gradient(rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes) -> tuple[Tensor, Tensor]:
    """`dz` in the compute dtype, and the bias's gradient."""
    size = size_of(rows, layer, geometry)
    dz, is_behind = _through_activation(maps, slopes, layer.activation, geometry, size)
    db = dz.sum((0, 2, 3))
    if rows.scale is not None:
        dz = dz * rows.scale[:, None, None, None]
    dz = dz.to(layer.compute_dtype)
    return (_in_front_of_pool(dz, maps.where, geometry, size) if is_behind else dz), db


def in_front(maps: Maps, slopes: MapSlopes, activation: str, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """The gradient in front of activation and pool, `[rows, channels, *size]` in the slopes' dtype."""
    dz, is_behind = _through_activation(maps, slopes, activation, geometry, size)
    return _in_front_of_pool(dz, maps.where, geometry, size) if is_behind else dz


def _through_activation(
    maps: Maps, slopes: MapSlopes, of: str, geometry: Geometry, size: tuple[int, int]
) -> tuple[Tensor, bool]:
    """`dp` times the activation's slope, and whether it is still behind the pool, which then passes it on as it is."""
    activation = ACTIVATIONS[of]
    centre = maps.pivot if maps.pivot.numel() else None
    dz = by_places(maps.p, slopes, centre)
    is_multiple = slopes.first is None and slopes.of_place is None and centre is None
    if not is_told_before(of, geometry):
        # What a ReLU has shut off is zero, and so is its multiple.
        if of != "relu" or not is_multiple:
            dz = _gated(dz, maps.p, of)
        return dz, True
    dz = _in_front_of_pool(dz, maps.where, geometry, size)
    if activation.keeps_z:
        z = maps.before.to(dz.dtype)
        return dz * activation.slope(z, z), False
    return _gated(dz, maps.before, of), False


def by_places(p: Tensor, slopes: MapSlopes, pivot: Tensor | None) -> Tensor:
    """`dLoss/dp` of maps `p`, in the slopes' dtype."""
    first, second, of_place, scale = slopes.first, slopes.second, slopes.of_place, slopes.scale
    if of_place is not None and scale is not None:
        of_place = of_place * scale[:, None, None]
    if first is not None:
        first = first[:, :, None, None]
        of_place = first if of_place is None else of_place + first
    if second is None:
        assert of_place is not None
        return of_place.expand(p.shape)
    factor = 2 * second[:, :, None, None]
    apart = p if pivot is None else p - pivot[:, None, None]
    return apart * factor if of_place is None else torch.addcmul(of_place, apart.to(factor.dtype), factor)


def products(of_place: Tensor, p: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `[channels]` of maps over rows and places, and of their products with maps `p` about a `pivot`."""
    of_products = of_place * (p.to(of_place.dtype) - pivot[:, None, None])
    # Sums that cancel for the most part; not every GPU has float64, and theirs are of trees.
    wide = torch.float64 if p.device.type == "cpu" else None
    sums, of_products = (of.sum((2, 3)).sum(0, dtype=wide).to(of.dtype) for of in (of_place, of_products))
    return sums, of_products


def by_weight(dz: Tensor, x: Tensor, layer: Layer, geometry: Geometry, unrounded: bool = False) -> Tensor:
    """`dW` of the gradient `dz` in front of the activation, and of that alone.

    unrounded: what PyTorch makes of narrow operands is rounded to their dtype. A sum over `dW` in which most of it
        cancels, as is the gradient of a normalisation's weight in front, would be of little more than that rounding:
        then the same operands are multiplied in the weight's dtype.
    """
    weight = layer.weight
    if unrounded:
        dz, x, layer = dz.to(weight.dtype), x.to(weight.dtype), layer._replace(compute_dtype=weight.dtype)
    if weight.shape[2:] == (1, 1) and geometry.stride != (1, 1) and _padding(geometry) == (0, 0):
        # oneDNN's own gathering of these places writes beyond its memory where channels are few (PyTorch 2.13).
        down, across = geometry.stride
        x = x[:, :, ::down, ::across].contiguous(memory_format=torch.channels_last)
        geometry = geometry._replace(stride=(1, 1))
    _, dw, _ = _backward(dz, x, layer, geometry, [False, True, False])
    # PyTorch's fused rules walk memory in order, and the gradient comes channels-last.
    return dw.to(weight.dtype).contiguous()


def by_input(dz: Tensor, x: Tensor, layer: Layer, geometry: Geometry) -> Tensor:
    """`dx` of maps `x` without reflected edges, in the weight's dtype, of the gradient `dz` alone."""
    dx, _, _ = _backward(dz, x, layer, geometry, [True, False, False])
    return dx.to(layer.weight.dtype)


def _backward(dz: Tensor, x: Tensor, layer: Layer, geometry: Geometry, wanted: list[bool]) -> tuple[Tensor, ...]:
    """The gradients of input, weight and bias that are `wanted`."""
    dz, x, weight = _operands(dz.contiguous(memory_format=torch.channels_last), x, layer.weight.to(layer.compute_dtype))
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, geometry.stride, _padding(geometry), [1, 1], False, [0, 0], geometry.groups, wanted
    )


def _gated(dz: Tensor, a: Tensor, activation: str) -> Tensor:
    """`dz` times the activation's slope, as activities `a` tell it."""
    if activation == "identity":
        return dz
    shut = a <= 0
    return dz.masked_fill(shut, 0) if activation == "relu" else torch.where(shut, LEAKY_SLOPE * dz, dz)


def size_of(rows: MapRows, layer: Layer, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the maps in front of the pool."""
    kernel = (layer.weight.shape[2], layer.weight.shape[3])
    within = geometry._replace(padding=_padding(geometry))
    return within.maps_of(rows.x.shape[2], rows.x.shape[3], kernel)[0]


def _in_front_of_pool(dp: Tensor, where: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """The gradient in front of the pool of one behind it, `[rows, channels, h, w]`."""
    if geometry.pool == "none":
        return dp
    dp = dp.contiguous(memory_format=torch.channels_last)
    # Of the pool's input only shape and layout are read.
    like = torch.empty(*dp.shape[:2], *size, dtype=dp.dtype, device=dp.device, memory_format=torch.channels_last)
    sizes = (geometry.pool_size, geometry.pool_stride, [0, 0])
    if geometry.pool == "max":
        return torch.ops.aten.max_pool2d_with_indices_backward(dp, like, *sizes, [1, 1], False, where)
    return torch.ops.aten.avg_pool2d_backward(dp, like, *sizes, False, True, None)


def _max_pool(a: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(a, geometry.pool_size, geometry.pool_stride, return_indices=True)


def _padding(geometry: Geometry) -> tuple[int, int]:
    """What the convolution itself pads."""
    return geometry.padding if geometry.padding_mode == "zeros" else (0, 0)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """These rows, channels-last."""
    return values.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)
