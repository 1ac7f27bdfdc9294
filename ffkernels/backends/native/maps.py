"""A convolutional layer: compiled whole, or products by PyTorch with one compiled pass each before and behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import Geometry, Layer, MapGradients, MapRows, Maps, MapSlopes
from ..eager.conv import POOLED_FIRST, by_weight, nothing, product, size_of, summed, unsaturated
from ..eager.layer import ACTIVATIONS
from .library import BFLOAT16_UNITS, instruction_set, load
from .records import MEMBERS, PASS_LAYOUT, MapsPass

MOST_PLACES = 256  # of a window, whose places are numbered by bytes
# The library's own products: groups of few channels are multiplied together until they fill a vector, and what is
# between them is zero. Their forward pass packs the weight for too few places of a small map, and the products of a
# large one leave the cache; few channels leave most of a tile empty.
VECTOR, MOST_MERGED, FEWEST_PRODUCTS, MOST_PRODUCTS, NARROW = 16, 4, 8 * 8, 64 * 64, 8
# On AVX2 a forward pass gains by what is saved around short products, a gradient everywhere but on the smallest maps.
MOST_INPUTS, FEWEST_BACK = 32, 4 * 4
# Activations whose maximum over a window is compiled.
_POOLED = [name for name, activation in ACTIVATIONS.items() if name in POOLED_FIRST or activation.keeps_z]


def unsupported(geometry: Geometry, activation: str) -> str | None:
    """Why the compiled passes cannot run a convolution, or None."""
    (height, width), (down, across) = geometry.pool_size, geometry.pool_stride
    if down < height or across < width:
        return "windows of a pool that overlap: has those that lie apart"
    if height * width > MOST_PLACES:
        return f"a pool of {height} x {width}: has windows of up to {MOST_PLACES} places"
    if geometry.pool == "max" and activation not in _POOLED:
        return f"maximum pooling of {activation}: has it of {', '.join(_POOLED)}"
    return None


def conv2d_forward(rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None) -> Maps:
    """See `ops.SCHEMAS`."""
    given: dict[str, Any] = {"finds_pivot": is_centred and pivot is None}
    if multiplies(rows, layer, geometry):
        maps = _room(rows, layer, geometry, is_centred, pivot)
        name, z = "ffk_convolution_forward", maps.before
        given |= {**_of_product(rows, layer, geometry), "bias": layer.bias}
    else:
        z = product(rows, layer, geometry)
        maps = _maps_of(z, layer, geometry, is_centred, pivot)
        name = "ffk_maps_forward"
    given |= {"first": maps.first, "spread": maps.spread}
    _run(name, _pass(z, rows, layer, geometry, maps, size_of(rows, layer, geometry), **given))
    return maps


def conv2d_forward_like(
    rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None
) -> Maps:
    """What `conv2d_forward` returns, of tensors without numbers."""
    if multiplies(rows, layer, geometry):
        return _room(rows, layer, geometry, is_centred, pivot)
    return _maps_of(product(rows, layer, geometry), layer, geometry, is_centred, pivot)


def conv2d_gradients_(rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes) -> MapGradients:
    """See `ops.SCHEMAS`."""
    memory = maps.before
    only_memory = geometry.pool == "max" and not ACTIVATIONS[layer.activation].keeps_z
    if only_memory:
        maps = maps._replace(before=memory[:0])
    if slopes.gain is None:
        rows, maps, slopes = unsaturated(rows, maps, slopes)
    (count, channels), size = maps.p.shape[:2], size_of(rows, layer, geometry)
    if count == 0:
        return nothing(rows, layer, geometry, slopes)
    given: dict[str, Any] = {**_given(slopes, channels), "dz_sums": maps.first.new_empty(count, channels)}
    dw = _by_weight(rows, layer, geometry, maps, given, not slopes.by_place)
    if dw is not None and not slopes.by_place:
        return MapGradients(dw, given["dz_sums"].sum(0), layer.weight.new_empty(0))
    if only_memory and len(memory):
        dz = memory[:count]
    # A gradient takes the place of what it reads, but where there are places in no window.
    elif maps.before.numel() and not _has_gaps(geometry, size):
        dz = maps.before
    else:
        dz = _channels_last(maps.p, size)
    _run("ffk_maps_backward", _pass(maps.before, rows, layer, geometry, maps, size, **given, dz=dz))
    if dw is None:
        dw = by_weight(dz, rows.x, layer, geometry, slopes.by_place)
    return MapGradients(dw, given["dz_sums"].sum(0), summed(dz, layer.weight, slopes))


def in_front(
    rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes, unrounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient in front of activation and pool, in the compute dtype, its sums `[channels]` over all places, and
    the weight's of it and `rows`.

    `unrounded`: as of `by_weight`.
    """
    (count, channels), size = maps.p.shape[:2], size_of(rows, layer, geometry)
    dz, sums = _channels_last(maps.p, size), maps.first.new_empty(count, channels)
    taken: dict[str, Any] = {**_given(slopes, channels), "dz_sums": sums}
    dw = None
    if count:
        dw = _by_weight(rows, layer, geometry, maps, taken, False)
        _run("ffk_maps_backward", _pass(maps.before, rows, layer, geometry, maps, size, **taken, dz=dz))
    if dw is None:
        dw = by_weight(dz, rows.x, layer, geometry, unrounded)
    return dz, sums.sum(0), dw


def products(of_place: Tensor, p: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `[channels]` of float32 maps over rows and places, and of their products with maps `p` about a `pivot`."""
    p = p if p.dtype in (torch.float32, torch.bfloat16) else p.float()
    p = p.contiguous(memory_format=torch.channels_last)
    sums, of_products = (of_place.new_empty(p.shape[:2]) for _ in range(2))
    sizes = (*p.shape, *p.shape[2:], 1, 1, 1, 1)
    given: dict[str, Any] = dict(zip(MapsPass._fields, sizes, strict=False)) | _of_places(of_place, None)
    given |= {"has_gaps": False, "pool": "none", "activation": "identity", "dtype": p.dtype}
    given |= {"z": p, "p": p, "where": None, "scale": None, "bias": None, "pivot": pivot.contiguous()}
    _run("ffk_maps_products", MapsPass(**given, first=sums, spread=of_products))
    sums, of_products = (of.sum(0, dtype=torch.float64).float() for of in (sums, of_products))
    return sums, of_products


def _by_weight(
    rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, given: dict[str, Any], is_last: bool
) -> Tensor | None:
    """The weight's gradient by the library's own products, without a `dz` in memory and never rounded to a dtype of
    operands; None where PyTorch's are to be. Only the last pass over the activities may hand them on."""
    if not multiplies_back(rows, layer, geometry):
        return None
    dw = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
    given = {**given, **_of_product(rows, layer, geometry), "dw": dw}
    if not is_last:
        given |= {"gain": None, "shift": None}
    size = size_of(rows, layer, geometry)
    _run("ffk_convolution_gradient", _pass(maps.before, rows, layer, geometry, maps, size, **given))
    return dw


def multiplies(rows: MapRows, layer: Layer, geometry: Geometry) -> bool:
    """Whether the library multiplies a layer's maps itself in a forward pass; by shape and machine alone.

    csrc/README.md says where PyTorch's products are the faster ones.
    """
    places = _places_of_products(rows, layer, geometry)
    if _has_no_unit(layer):
        return places > 0
    is_narrow = geometry.groups == 1 and len(layer.weight) <= NARROW
    has_many_inputs = _is_avx2(layer) and layer.weight.shape[1] > MOST_INPUTS
    return FEWEST_PRODUCTS <= places <= MOST_PRODUCTS and not (is_narrow or has_many_inputs)


def multiplies_back(rows: MapRows, layer: Layer, geometry: Geometry) -> bool:
    """`multiplies`, for the weight's gradient."""
    if not _is_avx2(layer):
        return multiplies(rows, layer, geometry)
    return _places_of_products(rows, layer, geometry) >= FEWEST_BACK


def _has_no_unit(layer: Layer) -> bool:
    return layer.compute_dtype == torch.bfloat16 and instruction_set("bfloat16") not in BFLOAT16_UNITS


def _is_avx2(layer: Layer) -> bool:
    return layer.compute_dtype == torch.float32 and instruction_set() == "avx2"


def _places_of_products(rows: MapRows, layer: Layer, geometry: Geometry) -> int:
    """How many places a map of products has; 0 where the library cannot or should not multiply."""
    if geometry.stride != (1, 1) or (layer.compute_dtype == torch.bfloat16 and instruction_set("bfloat16") == "amx"):
        return 0
    height, width = size_of(rows, layer, geometry)
    merged = min(geometry.groups, VECTOR // (len(layer.weight) // geometry.groups))
    return height * width if merged <= MOST_MERGED else 0


def _of_product(rows: MapRows, layer: Layer, geometry: Geometry) -> dict[str, Any]:
    """What the library's own products take."""
    padding = geometry.padding if geometry.padding_mode == "zeros" else (0, 0)
    sizes = (*rows.x.shape[1:], *layer.weight.shape[2:], *padding, geometry.groups)
    names = MapsPass._fields[-len(sizes) :]
    # The parameter's own layout.
    operands = {"x": rows.x.contiguous(memory_format=torch.channels_last), "weight": layer.weight.contiguous()}
    return {**operands, **dict(zip(names, sizes, strict=True))}


def _room(rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None) -> Maps:
    """Room for what the library's own forward pass makes."""
    size, weight = size_of(rows, layer, geometry), layer.weight
    like = rows.x.new_empty(len(rows.x), len(weight), 1, 1)
    keeps_z = geometry.pool == "average" or ACTIVATIONS[layer.activation].keeps_z
    before = _channels_last(like, size) if keeps_z else like.new_empty(0)
    p = _channels_last(like, _behind_pool(size, geometry))
    where = torch.empty_like(p, dtype=torch.uint8) if geometry.pool == "max" else p.new_empty(0, dtype=torch.uint8)
    return Maps(p, *_moments(like, weight, is_centred, pivot), where, before)


def _given(slopes: MapSlopes, channels: int) -> dict[str, Any]:
    """The slopes as a pass reads them, `[rows, channels]`, and the line without gaps."""
    wide = {"slope_first": slopes.first, "slope_second": slopes.second}
    line = {"gain": slopes.gain, "shift": slopes.shift}
    given = {name: None if slope is None else slope.expand(-1, channels) for name, slope in wide.items()} | line
    found = {name: None if value is None else value.to(torch.float32).contiguous() for name, value in given.items()}
    return found if slopes.of_place is None else found | _of_places(slopes.of_place, slopes.scale)


def _of_places(slope: Tensor, scale: Tensor | None) -> dict[str, Any]:
    """Slopes of each place as a pass reads them."""
    scale = slope.new_ones(slope.shape[1]) if scale is None else scale
    slope = slope.to(torch.float32).contiguous(memory_format=torch.channels_last)
    return {"place_slope": slope, "place_scale": scale.to(torch.float32).contiguous()}


def _maps_of(z: Tensor, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None) -> Maps:
    """Room for what a forward pass makes of products `z`; without a pool activities come in their place, unless the
    slope is read from them."""
    p, before, where = z, z.new_empty(0), z.new_empty(0, dtype=torch.uint8)
    if geometry.pool == "none" and ACTIVATIONS[layer.activation].keeps_z:
        p, before = torch.empty_like(z), z
    elif geometry.pool != "none":
        p, before = _channels_last(z, _behind_pool((z.shape[2], z.shape[3]), geometry)), z
        if geometry.pool == "max":
            where = torch.empty_like(p, dtype=torch.uint8)
    return Maps(p, *_moments(z, layer.weight, is_centred, pivot), where, before)


def _moments(maps: Tensor, weight: Tensor, is_centred: bool, pivot: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the moments of maps `[rows, channels, h, w]`, and what they are about."""
    rows, channels = maps.shape[:2]
    about = weight.new_zeros(channels if is_centred else 0) if pivot is None else pivot.clone()
    return weight.new_empty(rows, channels), weight.new_empty(rows, channels), about


def _behind_pool(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    sides = zip(size, geometry.pool_size, geometry.pool_stride, strict=True)
    height, width = [(side - of) // step + 1 for side, of, step in sides]
    return height, width


def _channels_last(like: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.empty(*like.shape[:2], *size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _has_gaps(geometry: Geometry, size: tuple[int, int]) -> bool:
    """Whether maps of this size have places in no window of the pool."""
    sides = zip(size, geometry.pool_size, geometry.pool_stride, strict=True)
    return geometry.pool != "none" and any(of != step or side % of for side, of, step in sides)


def _pass(
    z: Tensor, rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, size: tuple[int, int], **given: Any
) -> MapsPass:
    """`size`: of the maps in front of the pool."""
    scale = None if rows.scale is None else rows.scale.contiguous()
    # A product has the bias where no scale stands between them.
    bias = given.pop("bias", None if scale is None else layer.bias)
    sizes = (*maps.p.shape[:2], *size, *maps.p.shape[2:], *geometry.pool_size, *geometry.pool_stride)
    pivot = maps.pivot if maps.pivot.numel() else None
    members: dict[str, Any] = {
        **dict(zip(MapsPass._fields, sizes, strict=False)),
        "has_gaps": _has_gaps(geometry, size),
        "pool": geometry.pool,
        "activation": layer.activation,
        "dtype": maps.p.dtype,
    }
    return MapsPass(
        **members,
        z=z,
        p=maps.p,
        where=maps.where,
        scale=scale,
        bias=None if bias is None else bias.contiguous(),
        pivot=pivot,
        **given,
    )


def _run(name: str, call: MapsPass) -> None:
    library = load().library
    assert library is not None
    values = []
    for member, value in zip(MEMBERS[MapsPass], call, strict=True):
        if type(member.kind) is dict:
            values.append(member.kind[value])
        elif isinstance(value, Tensor):
            values.append(value.data_ptr())
        else:
            values.append(0 if value is None else value)
    if getattr(library, name)(PASS_LAYOUT.pack(*values, torch.get_num_threads())):
        raise MemoryError("no memory for the step's own copies of rows and weight")
