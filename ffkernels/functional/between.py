"""A batch normalisation between a convolution and its activation: all places of a channel are standardised together.

With `z` the product, `u = weight x + bias` of `x = (z - mean) / deviation`, and `p = pool(act(u))`. The gradient in
front of the activation goes through the statistics on to `dz`, which is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import validation as check
from ..backends.eager import conv
from ..objectives import Standardised, standardise, through
from ..spec import Geometry, Layer, MapGradients, MapRows, Maps, MapSlopes


def check_module(norm: object, weight: Tensor, backend: str | None) -> None:
    """Raises unless `norm` can stand behind the product of this weight."""
    if norm is None:
        return
    check.batch_norm_alone("product_norm", norm, len(weight), weight, nn.BatchNorm2d)
    if backend not in (None, "eager"):
        raise ValueError(f"backend={backend!r} came with product_norm, which runs in PyTorch; accepted: None, 'eager'")


def activities(
    rows: MapRows, layer: Layer, geometry: Geometry, norm: nn.BatchNorm2d
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Standardised]:
    """`conv.activities` with the normalisation, and what it has made; its running statistics stay as they are."""
    z = conv.scaled_product(rows, layer, geometry)
    standardised = standardise(_places(z).to(layer.weight.dtype), norm)
    u = _maps(standardised.u, z.shape).to(z.dtype)
    return conv.behind(u, layer.activation, geometry), standardised


def gradients(
    rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes, of: Standardised
) -> tuple[MapGradients, dict[str, Tensor]]:
    """`ops.conv2d_gradients_` through the normalisation, and the gradients of its weight and bias by name."""
    size = conv.size_of(rows, layer, geometry)
    du = conv.in_front(maps, slopes, layer.activation, geometry, size)
    shape = du.shape
    by_place, by_weight, by_bias = through(of, _places(du.contiguous(memory_format=torch.channels_last)).to(of.u.dtype))
    dz = _maps(by_place, shape)
    db = dz.sum((0, 2, 3))
    if rows.scale is not None:
        dz = dz * rows.scale[:, None, None, None]
    dz = dz.to(layer.compute_dtype)
    dw = conv.by_weight(dz, rows.x, layer, geometry, slopes.by_place)
    found = MapGradients(dw, db, conv.summed(dz, layer.weight, slopes))
    if slopes.gain is not None and slopes.shift is not None:
        conv.hand_on_(maps, slopes.gain, slopes.shift)
    return found, {"product_norm.weight": by_weight, "product_norm.bias": by_bias}


def _places(maps: Tensor) -> Tensor:
    """`[rows * h * w, channels]`, in the memory of channels-last maps."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(places: Tensor, shape: torch.Size) -> Tensor:
    """`_places` undone."""
    rows, channels, height, width = shape
    return places.view(rows, height, width, channels).permute(0, 3, 1, 2)
