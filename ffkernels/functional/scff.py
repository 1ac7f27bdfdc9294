"""Self-contrastive Forward-Forward: a convolution whose goodness is of each place, by one product in place of four.

Chen, Liu, Laydevant and Grollier, "Self-Contrastive Forward-Forward Algorithm", 2025. A positive row is a pair of an
image and itself, a negative one that of an image and another; the two halves pass through the same kernels, and their
sum counts. With `K` the product of the padded images, `m` and `r` mean and 1 / deviation of a padded pair `(i, j)`,
that sum is `z = r (K_i + K_j - 2 m sum W) + 2 b`. So one product gives all of them, and one weight gradient, that of
`T_i = 2 r+ dz+_i + r- dz-_i + (r- dz- of the pairs in which i is the other)`, the whole of `dW`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from .. import interrupts
from .. import validation as check
from ..autograd import is_transformed, without_autocast
from ..backends.eager import conv, rules
from ..compiling import never_compiled
from ..objectives import softplus
from ..spec import Geometry, Layer, MapRows, PaddingMode, Rows
from .conv import update_of
from .maps import Size, checked_geometry, compute_dtype_of, conv_tensors, maps_of

EPS = 1e-10


class ScffResult(NamedTuple):
    """What a step of `scff_step_` leaves behind, of before its update.

    Attributes:
        z: `[rows, out, h, w]` the positive pairs in front of the activation, in the weight's dtype: what a layer hands
            on is made of it.
        goodness_pos, goodness_neg: `[rows]`, means over places.
        loss: 0-dim.
    """

    z: Tensor
    goodness_pos: Tensor
    goodness_neg: Tensor
    loss: Tensor


class Pairs(NamedTuple):
    """What pairs of padded images are standardised by: `[rows]` mean and 1 / deviation."""

    mean: Tensor
    scale: Tensor


def scff_step_(
    x: Tensor,
    partners: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer | None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    padding_mode: PaddingMode = "reflect",
    thresholds: tuple[float, float] = (0.0, 1.0),
    penalty: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> ScffResult:
    """One self-contrastive step of a convolution: updates `weight` and `bias` in place, without autograd.

    With `s(u) = (u - mean(u)) / (1e-10 + std(u))` over a whole row, the deviation that of a sample, and `P` the
    padding: `(a, c) = s(P(s(x_i), s(x_j)))` of the pair as one row, `z = conv(a) + conv(c)` (the bias counts twice),
    `y = relu(z)`, and the goodness of a place is the mean of `y^2` over its channels. Positive pairs are `(i, i)`,
    negative ones `(i, partners_i)`. The loss is the mean over rows and places of `softplus(threshold_pos - g+)`, that
    of `softplus(g- - threshold_neg)`, and `penalty` times the mean over rows of the length of `g+` over places.

    Args:
        x: `[rows, in, H, W]` in the weight's dtype or the compute dtype.
        partners: `[rows]` int64, the row that stands beside each in its negative pair.
        weight: `[out, in, k, k]` float32 or float64 parameter.
        bias: `[out]` parameter, or None.
        optimizer: as in `conv2d_step_`.
        stride, padding, padding_mode, compute_dtype: as in `conv2d_step_`.
        thresholds: of positive and of negative pairs.
        penalty: weight of the length of the positive goodness; >= 0.

    Raises:
        ValueError, TypeError: for an argument that does not fit, before anything is written.
    """
    step = _step_never_compiled if torch.compiler.is_compiling() else _step
    geometry = checked_geometry(stride, padding, padding_mode, 1, None)
    return step(x, partners, weight, bias, optimizer, geometry, thresholds, penalty, compute_dtype)


def scff_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    padding_mode: PaddingMode = "reflect",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`z` of the positive pairs of rows `x`, `[rows, out, h, w]` in the weight's dtype; see `scff_step_`.

    A gradient reaches weight and bias, by PyTorch's own operations, and not `x`.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    geometry = checked_geometry(stride, padding, padding_mode, 1, None)
    layer = _layer(x, weight, bias, geometry, compute_dtype)
    with without_autocast(weight.device):
        padded = _padded(x.detach(), layer, geometry)
        return _z(_product(padded, layer, geometry), None, _pairs(padded, None, weight.dtype), layer)


def _layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, compute_dtype: torch.dtype | None
) -> Layer:
    conv_tensors(weight, bias, geometry)
    compute = compute_dtype_of(compute_dtype, weight)
    maps_of("x", x, weight, compute, geometry)
    return Layer(weight, bias, "none", 0.0, "add", "relu", compute)


def _step(
    x: Tensor,
    partners: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer | None,
    geometry: Geometry,
    thresholds: tuple[float, float],
    penalty: float,
    compute_dtype: torch.dtype | None,
) -> ScffResult:
    layer = _layer(x, weight, bias, geometry, compute_dtype)
    check_objective(thresholds, penalty)
    check.vector("partners", partners, len(x), torch.int64, weight.device)
    if len(x) and partners.device.type == "cpu":
        least, largest = (int(v) for v in partners.aminmax())
        if least < 0 or largest >= len(x):
            wrong = least if least < 0 else largest
            raise ValueError(f"partners hold {wrong}; accepted: 0..{len(x) - 1}, the rows of x")
    check.optimizer_object(optimizer)
    if is_transformed(x, weight, bias):
        raise ValueError(
            "scff_step_ was called on tensors of a torch.func transform or with a forward-mode tangent; accepted: "
            "plain tensors, or scff_forward"
        )
    learning = {"weight": weight, **({} if bias is None else {"bias": bias})}
    update = update_of(optimizer, learning, Rows(x, x[:0]))
    held = interrupts.hold()
    try:
        with torch.no_grad(), without_autocast(weight.device):
            padded = _padded(x, layer, geometry)
            k = _product(padded, layer, geometry)
            alike, apart = _pairs(padded, None, weight.dtype), _pairs(padded, partners, weight.dtype)
            z_pos, z_neg = _z(k, None, alike, layer), _z(k, partners, apart, layer)
            del k
            # The positive ones are handed on as they are; the others give their memory to what follows.
            y_pos, y_neg = z_pos.relu(), z_neg.relu_()
            g_pos, g_neg = y_pos.square().mean(1), y_neg.square().mean(1)
            loss, by_pos, by_neg = judged(g_pos, g_neg, thresholds, penalty)
            share = 2 / len(weight)
            dz_pos, dz_neg = y_pos.mul_(share * by_pos[:, None]), y_neg.mul_(share * by_neg[:, None])
            gradients = _gradients(padded, partners, alike, apart, dz_pos, dz_neg, layer, geometry)
            for name, part in zip(learning, update.parts, strict=True):
                rules.step(update.rule, part.parameter, gradients[name], part.slot)
            torch.autograd.graph.increment_version(update.written())
            update.finish(optimizer)
    finally:
        interrupts.release(held)
    return ScffResult(z_pos, g_pos.mean((1, 2)), g_neg.mean((1, 2)), loss)


@never_compiled("a self-contrastive step writes by the caller's optimizer in its midst")
def _step_never_compiled(*arguments: Any) -> ScffResult:
    return _step(*arguments)


def check_objective(thresholds: object, penalty: object) -> None:
    """Raises ValueError unless they are two finite numbers, and one of at least 0."""
    both = thresholds if isinstance(thresholds, tuple | list) else ()
    if len(both) != 2 or not all(_is_finite(value) for value in both):
        raise ValueError(
            f"thresholds={thresholds!r}; accepted: a pair of finite numbers, of positive and negative ones"
        )
    if not _is_finite(penalty) or penalty < 0:  # type: ignore[operator]
        raise ValueError(f"penalty={penalty!r} is not a finite number >= 0")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def judged(
    g_pos: Tensor, g_neg: Tensor, thresholds: tuple[float, float], penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of goodnesses `[rows, h, w]`, and its slopes by both."""
    count = max(g_pos.numel(), 1)
    above, below = thresholds[0] - g_pos, g_neg - thresholds[1]
    loss = (softplus(above).sum() + softplus(below).sum()) / count
    by_pos, by_neg = torch.sigmoid(above).div_(-count), torch.sigmoid(below).div_(count)
    if penalty:
        length = torch.linalg.vector_norm(g_pos, dim=(1, 2), keepdim=True)
        loss = loss + penalty * length.sum() / max(len(length), 1)
        # A row without goodness has no direction to shrink in.
        by_pos += g_pos * (penalty / (max(len(length), 1) * length.masked_fill(length == 0, 1)))
    return loss, by_pos, by_neg


def _padded(x: Tensor, layer: Layer, geometry: Geometry) -> Tensor:
    """Each row standardised and padded, in the compute dtype."""
    x = x.to(layer.weight.dtype)
    if len(x):
        deviation, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        x = (x - mean) / (deviation + EPS)
    (down, across) = geometry.padding
    if down or across:
        x = F.pad(x, (across, across, down, down), mode="reflect" if geometry.padding_mode == "reflect" else "constant")
    return x.to(layer.compute_dtype).contiguous(memory_format=torch.channels_last)


def _pairs(padded: Tensor, partners: Tensor | None, dtype: torch.dtype) -> Pairs:
    size = padded[0].numel() if len(padded) else 1
    first, second = padded.sum((1, 2, 3), dtype=dtype), padded.to(dtype).square().sum((1, 2, 3))
    beside = (first, second) if partners is None else (first[partners], second[partners])
    mean = (first + beside[0]) / (2 * size)
    variance = (second + beside[1] - 2 * size * mean.square()) / (2 * size - 1)
    return Pairs(mean, 1 / (variance.clamp(min=0).sqrt() + EPS))


def _unpadded(geometry: Geometry) -> Geometry:
    return geometry._replace(padding=(0, 0))


def _product(padded: Tensor, layer: Layer, geometry: Geometry) -> Tensor:
    """The only one: of the images, without bias, in the weight's dtype."""
    k = conv.product(MapRows(padded, None), layer._replace(bias=None), _unpadded(geometry))
    return k.to(layer.weight.dtype)


def _z(k: Tensor, partners: Tensor | None, pairs: Pairs, layer: Layer) -> Tensor:
    """What the pairs of these products come to in front of the activation."""
    weight, bias = layer.weight, layer.bias
    if layer.compute_dtype != weight.dtype:
        weight = weight.to(layer.compute_dtype).to(weight.dtype)
    both = 2 * k if partners is None else k + conv.take(k, partners)
    line = -2 * (pairs.scale * pairs.mean)[:, None] * weight.sum((1, 2, 3))
    if bias is not None:
        line = line + 2 * bias
    return torch.addcmul(line[:, :, None, None], both, pairs.scale[:, None, None, None])


def _gradients(
    padded: Tensor,
    partners: Tensor,
    alike: Pairs,
    apart: Pairs,
    dz_pos: Tensor,
    dz_neg: Tensor,
    layer: Layer,
    geometry: Geometry,
) -> dict[str, Tensor]:
    """Of weight and bias; writes over `dz_pos` and `dz_neg`."""
    sums = dz_pos.sum((2, 3)), dz_neg.sum((2, 3))
    through_mean = sum(((2 * p.scale * p.mean)[:, None] * s).sum(0) for p, s in zip((alike, apart), sums, strict=True))
    scaled = dz_neg.mul_(apart.scale[:, None, None, None])
    total = dz_pos.mul_(2 * alike.scale[:, None, None, None]).add_(scaled)
    total.permute(0, 2, 3, 1).index_add_(0, partners, scaled.permute(0, 2, 3, 1))
    total = total.to(layer.compute_dtype)
    dw = conv.by_weight(total, padded, layer, _unpadded(geometry))
    assert isinstance(through_mean, Tensor)
    return {"weight": dw - through_mean[:, None, None, None], "bias": 2 * (sums[0] + sums[1]).sum(0)}
