"""A convolutional layer: maps in, activities out; and from slopes by their moments to the parameters' gradients.

Maps are channels-last throughout. There is no graph, and no gradient of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...normalisation import row_scale, row_sumsq
from ...spec import Geometry, Layer
from .gradient import unsaturated_rows
from .layer import ACTIVATIONS, LEAKY_SLOPE

# Whose maximum over a window is that of the window's maximum, ties and all: pooling first leaves less to activate.
POOLED_FIRST = ("relu", "identity")


class Maps(NamedTuple):
    """What a forward pass leaves, all of it in the compute dtype but the scale.

    Attributes:
        p: `[rows, channels, h, w]` activities, behind the pool.
        x: the convolution's own input; where padding reflects, with it.
        scale: `[rows]` row scales, or None.
        where: `[rows, channels, h, w]` the winners of maximum pooling, or None.
        before: `[rows, channels, h', w']` what the activation's slope is read from, in front of the pool: its input or
            its output; None where `p` says it.
        size: `(h', w')`.
    """

    p: Tensor
    x: Tensor
    scale: Tensor | None
    where: Tensor | None
    before: Tensor | None
    size: tuple[int, int]


def forward(x: Tensor, layer: Layer, geometry: Geometry, input_sumsq: Tensor | None = None) -> Maps:
    """`p = pool(act(r conv(x) + b))` of maps `x` `[rows, in, H, W]`; autograd-compatible by weight and bias.

    The row scale `r` commutes with the convolution, padding included: but where it is rounded, the normalised input is
    never there.
    `input_sumsq`: `[rows]` sums of squares of `x` where they are known.
    """
    weight, compute = layer.weight, layer.compute_dtype
    scale = None
    if layer.norm != "none":
        sumsq = row_sumsq(x, weight.dtype) if input_sumsq is None else input_sumsq
        scale = row_scale(sumsq, x.shape[1:].numel(), layer.norm, layer.eps, layer.eps_mode)
        if compute != weight.dtype:
            # A sum that is rounded before its bias is added loses what the two leave of each other.
            x, scale = x * scale[:, None, None, None], None
    x = x.to(compute).contiguous(memory_format=torch.channels_last)
    if geometry.padding_mode == "reflect":
        (down, across) = geometry.padding
        x = F.pad(x, (across, across, down, down), mode="reflect").contiguous(memory_format=torch.channels_last)
    kernel = weight.to(compute)
    bias = None if layer.bias is None or scale is not None else layer.bias.to(compute)
    z = F.conv2d(x, kernel, bias, geometry.stride, _padding(geometry), 1, geometry.groups)
    z = z.contiguous(memory_format=torch.channels_last)
    if scale is not None:
        z.mul_(scale[:, None, None, None])
        if layer.bias is not None:
            z.add_(layer.bias[:, None, None])
    size = (z.shape[2], z.shape[3])
    activation = ACTIVATIONS[layer.activation]
    before = where = None
    if geometry.pool == "max" and layer.activation in POOLED_FIRST:
        p, where = _max_pool(z, geometry)
        return Maps(activation.forward(p), x, scale, where, None, size)
    a = activation.forward(z)
    if activation.keeps_z:
        before = z
    elif geometry.pool == "average" and layer.activation != "identity":
        before = a
    if geometry.pool == "none":
        return Maps(a, x, scale, None, before, size)
    if geometry.pool == "max":
        p, where = _max_pool(a, geometry)
    else:
        p = F.avg_pool2d(a, geometry.pool_size, geometry.pool_stride)
    return Maps(p, x, scale, where, before, size)


def moments(p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[rows, channels]` sums over the places of maps `p`, and of their squares, summed in `dtype`."""
    wide = p.to(dtype)
    return wide.sum((2, 3)), wide.square().sum((2, 3))


def gradients(
    maps: Maps,
    layer: Layer,
    geometry: Geometry,
    first: Tensor | None,
    second: Tensor | None,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dW` `[out, in, k, k]` and `db` `[out]`, of `dLoss/dp = first + 2 second (p - centre)`.

    Slopes are `[rows, channels]` or `[rows, 1]` in the weight's dtype, None for zero; `centre` is `[channels]` or None.
    Rows all of whose slopes are exactly zero are left out.
    """
    weight = layer.weight
    slopes = [slope for slope in (first, second) if slope is not None]
    kept = unsaturated_rows(torch.stack([(slope != 0).any(1) for slope in slopes]).any(0))
    if kept is not None:
        p, x, scale, where, before, size = maps
        scale, where, before = (_rows(t, kept) for t in (scale, where, before))
        maps = Maps(_take(p, kept), _take(x, kept), scale, where, before, size)
        first, second = _rows(first, kept), _rows(second, kept)
    if not len(maps.p):
        return torch.zeros_like(weight), weight.new_zeros(len(weight))
    dz = _by_activity(maps.p, first, second, centre)
    if maps.before is None and not (layer.activation == "relu" and first is None and centre is None):
        dz = _gated(dz, maps.p, layer.activation)
    if maps.before is not None:
        dz = _in_front_of_pool(dz, maps, geometry)
        if ACTIVATIONS[layer.activation].keeps_z:
            z = maps.before.to(dz.dtype)
            dz = dz * ACTIVATIONS[layer.activation].slope(z, z)
        else:
            dz = _gated(dz, maps.before, layer.activation)
    db = dz.sum((0, 2, 3))
    if maps.scale is not None:
        dz = dz * maps.scale[:, None, None, None]
    dz = dz.to(layer.compute_dtype)
    if maps.before is None:
        dz = _in_front_of_pool(dz, maps, geometry)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dz.contiguous(memory_format=torch.channels_last), maps.x, weight.to(layer.compute_dtype), None, geometry.stride,
        _padding(geometry), [1, 1], False, [0, 0], geometry.groups, [False, True, False],
    )  # fmt: skip
    # PyTorch's fused rules walk memory in order, and the gradient comes channels-last.
    return dw.to(weight.dtype).contiguous(), db


def _by_activity(p: Tensor, first: Tensor | None, second: Tensor | None, centre: Tensor | None) -> Tensor:
    """dLoss/dp in the slopes' dtype."""
    if second is None:
        assert first is not None
        return first[:, :, None, None].expand(p.shape)
    factor = 2 * second[:, :, None, None]
    apart = p if centre is None else p - centre[:, None, None]
    return apart * factor if first is None else torch.addcmul(first[:, :, None, None], apart.to(factor.dtype), factor)


def _gated(dz: Tensor, a: Tensor, activation: str) -> Tensor:
    """`dz` times the activation's slope, as activities `a` tell it."""
    if activation == "identity":
        return dz
    shut = a <= 0
    return dz.masked_fill(shut, 0) if activation == "relu" else torch.where(shut, LEAKY_SLOPE * dz, dz)


def _in_front_of_pool(dp: Tensor, maps: Maps, geometry: Geometry) -> Tensor:
    """The gradient in front of the pool of one behind it, `[rows, channels, h, w]`."""
    if geometry.pool == "none":
        return dp
    dp = dp.contiguous(memory_format=torch.channels_last)
    # Of the pool's input only shape and layout are read.
    like = torch.empty(*dp.shape[:2], *maps.size, dtype=dp.dtype, device=dp.device, memory_format=torch.channels_last)
    sizes = (geometry.pool_size, geometry.pool_stride, [0, 0])
    if geometry.pool == "max":
        return torch.ops.aten.max_pool2d_with_indices_backward(dp, like, *sizes, [1, 1], False, maps.where)
    return torch.ops.aten.avg_pool2d_backward(dp, like, *sizes, False, True, None)


def _max_pool(a: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(a, geometry.pool_size, geometry.pool_stride, return_indices=True)


def _padding(geometry: Geometry) -> tuple[int, int]:
    """What the convolution itself pads."""
    return geometry.padding if geometry.padding_mode == "zeros" else (0, 0)


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """These rows; of maps, channels-last."""
    return values[rows] if values.dim() < 4 else values.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else _take(values, rows)
