"""What a convolution is asked for: its geometry, its parameters and its maps, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation as check
from ..normalisation import row_scale, row_sumsq
from ..spec import Activation, EpsMode, Geometry, Layer, MapRows, Norm, PaddingMode, Pool
from .in_front import InputNorm

Size = int | tuple[int, int]
# A size is that of maximum pooling, as `nn.MaxPool2d(size)` has it.
PoolOf = Size | nn.MaxPool2d | nn.AvgPool2d | None


class ConvOptions(NamedTuple):
    """What the caller says of a convolutional layer's forward pass: these arguments of `conv2d_step_`, unchecked."""

    stride: Size
    padding: Size
    padding_mode: PaddingMode
    groups: int
    pool: PoolOf
    norm: Norm
    eps: float
    eps_mode: EpsMode
    activation: Activation
    input_norm: InputNorm
    product_norm: nn.BatchNorm2d | None
    compute_dtype: torch.dtype | None
    backend: str | None

    def geometry(self) -> Geometry:
        """The record of those that say where a window lies, checked."""
        return checked_geometry(self.stride, self.padding, self.padding_mode, self.groups, self.pool)

    def checked(self, weight: Tensor, bias: Tensor | None) -> tuple[Layer, Geometry]:
        """The records of a layer with these parameters; raises ValueError or TypeError for what does not fit."""
        check.layer_options(self.norm, self.eps, self.eps_mode, self.activation)
        geometry = self.geometry()
        conv_tensors(weight, bias, geometry)
        compute = compute_dtype_of(self.compute_dtype, weight)
        return Layer(weight, bias, self.norm, float(self.eps), self.eps_mode, self.activation, compute), geometry


def checked_geometry(stride: Size, padding: Size, padding_mode: PaddingMode, groups: int, pool: PoolOf) -> Geometry:
    """The record of these arguments of `conv2d_step_`.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    check.one_of("padding_mode", padding_mode, ("zeros", "reflect"))
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups={groups!r} is not an integer >= 1")
    return Geometry(pair("stride", stride, 1), pair("padding", padding, 0), padding_mode, groups, *_pooling(pool))


def _pooling(pool: object) -> tuple[Pool, tuple[int, int], tuple[int, int]]:
    """Kind, size and stride."""
    if pool is None:
        return "none", (1, 1), (1, 1)
    if not isinstance(pool, nn.MaxPool2d | nn.AvgPool2d):
        size = pair("pool", pool, 1, "None, nn.MaxPool2d, nn.AvgPool2d, or ")
        return "max", size, size
    extras = {"padding": (0, (0, 0)), "dilation": (1, (1, 1)), "ceil_mode": (False,), "divisor_override": (None,)}
    for name, accepted in {**extras, "return_indices": (False,)}.items():
        value = getattr(pool, name, accepted[0])
        if value not in accepted:
            raise ValueError(f"pool has {name}={value!r}; accepted: {accepted[0]}")
    stride = pool.kernel_size if pool.stride is None else pool.stride
    kind: Pool = "max" if isinstance(pool, nn.MaxPool2d) else "average"
    return kind, pair("pool.kernel_size", pool.kernel_size, 1), pair("pool.stride", stride, 1)


def pair(name: str, value: object, least: int, others: str = "") -> tuple[int, int]:
    """An integer or a pair of them as a pair.

    Raises:
        ValueError: unless both are at least `least`.
    """
    both = value if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in both):
        raise ValueError(f"{name}={value!r}; accepted: {others}an integer >= {least} or a pair of them")
    return both[0], both[1]


def conv_tensors(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """Raises unless weight `[out, in / groups, k, k]` and bias `[out]` are a convolution's."""
    check.tensor("weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: [out, in / groups, height, width]")
    if weight.dtype not in check.MASTER_DTYPES:
        raise TypeError(f"weight is {weight.dtype}; accepted: torch.float32 or torch.float64")
    if len(weight) % geometry.groups:
        raise ValueError(f"groups={geometry.groups} does not divide the {len(weight)} output channels of weight")
    if bias is not None:
        check.vector("bias", bias, len(weight), weight.dtype, weight.device)


def compute_dtype_of(compute_dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    """As for linear layers, but for float16."""
    compute = check.compute_dtype_of(compute_dtype, weight)
    if compute == torch.float16:
        raise TypeError(
            "compute_dtype=torch.float16 came to a convolution, whose sums and gradients leave that range; accepted: "
            "None or torch.bfloat16"
        )
    return compute


def maps_of(name: str, x: Tensor, weight: Tensor, compute_dtype: torch.dtype, geometry: Geometry) -> None:
    """Raises unless `x` is `[rows, in, height, width]`, in dtype, device and size what this convolution takes."""
    check.tensor(name, x)
    channels = weight.shape[1] * geometry.groups
    if x.dim() != 4 or x.shape[1] != channels:
        hint = f", as {name}.view(-1, {channels}, height, width) makes of flat rows" if x.dim() == 2 else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: [rows, {channels}, height, width]{hint}")
    check.dtype_of_rows(name, x, weight, compute_dtype)
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device} but weight is on {weight.device}; accepted: the same device")
    sides, kernel = (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])
    before, behind = geometry.maps_of(*sides, kernel)
    if min(before) < 1:
        raise ValueError(
            f"{name} has maps of {sides}, smaller than the kernel {kernel} with padding {geometry.padding}; accepted: "
            "larger ones"
        )
    if min(behind) < 1:
        raise ValueError(
            f"the pool {geometry.pool_size} is larger than the maps {before} of {name}; accepted: a smaller one"
        )
    if geometry.padding_mode == "reflect" and any(p >= s for p, s in zip(geometry.padding, sides, strict=True)):
        raise ValueError(
            f"padding={geometry.padding} reflects more than the maps {sides} of {name} hold; accepted: less"
        )


def rows_for(x: Tensor, layer: Layer, geometry: Geometry, input_sumsq: Tensor | None) -> MapRows:
    """Maps `x` `[rows, in, H, W]` as the product takes them; `input_sumsq`: `[rows]` their sums of squares, if known.

    The row scale commutes with the convolution, padding included: but where it is rounded, the normalised input is
    never there.
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
    return MapRows(x, scale)
