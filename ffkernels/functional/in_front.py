"""What stands in front of a convolution: a normalisation of its input, and what the convolution's update tells of it.

With `x = (u - mean) / deviation` of maps `u`, batch normalisation hands `weight x + bias` to the convolution. Let `V`
be the convolution's weight gradient on `x`, and `S` that on maps of ones, which is of `sum_rows dz` alone. Then by
channel of the input `dW = weight V + bias S`, and without any gradient of the input `dbias = sum W S`,
`dweight = sum W V`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation as check
from ..backends.eager.conv import by_weight
from ..objectives import joint_statistics, summed
from ..spec import Geometry, Layer, MapRows, MapSlopes

InputNorm = nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | None
# How much larger than a variance a mean square may be that it is taken from.
MOST_OF_VARIANCE = 8
_ROW_NORMS = (nn.GroupNorm, nn.LayerNorm)


class Standardising(NamedTuple):
    """How the batch normalisation `module` standardises maps `[rows, channels, H, W]`.

    Attributes:
        mean, variance: `[channels]` of the batch's `samples` for each; None where the running ones count.
    """

    module: nn.BatchNorm2d
    mean: Tensor | None
    variance: Tensor | None
    samples: int

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and variance that count, the running ones as they are now; 0 and 1 of no rows without them."""
        norm, mean, variance = self.module, self.mean, self.variance
        if mean is None:
            mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            return torch.zeros_like(norm.weight), torch.ones_like(norm.weight)
        return mean, variance

    def standardised(self, u: Tensor) -> Tensor:
        """`(u - mean) / deviation`."""
        if len(u) == 0:
            return u
        mean, variance = self.statistics
        return F.batch_norm(_wide(u, mean.dtype), mean, variance, None, None, False, 0.0, self.module.eps)


def check_module(norm: object, channels: int, weight: Tensor, row_norm: str) -> None:
    """Raises unless `norm` can stand in front of a convolution of so many channels."""
    if norm is None:
        return
    if row_norm != "none":
        raise ValueError(f"norm={row_norm!r} came with input_norm, which normalises already; accepted: one of the two")
    if isinstance(norm, nn.BatchNorm2d):
        check.batch_norm_alone("input_norm", norm, channels, weight, nn.BatchNorm2d)
        return
    if not isinstance(norm, _ROW_NORMS):
        raise TypeError(
            f"input_norm is a {type(norm).__name__}; accepted: a torch.nn.BatchNorm2d, GroupNorm or LayerNorm, or None"
        )
    check.plain_module("input_norm", norm, type(norm))
    if next(norm.parameters(), None) is not None:
        raise ValueError(
            "input_norm has parameters of its own for each place or channel, whose gradient would be the input's; "
            "accepted: affine=False, elementwise_affine=False, or a BatchNorm2d"
        )
    if isinstance(norm, nn.GroupNorm) and norm.num_channels != channels:
        raise ValueError(f"input_norm has {norm.num_channels} channels; accepted: {channels}, those of x")


def check_fits(norm: InputNorm, x: Tensor, weight: Tensor, row_norm: str) -> None:
    """Raises unless `norm` can stand in front of a convolution of maps `x`."""
    check_module(norm, x.shape[1], weight, row_norm)
    if isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) != tuple(x.shape[1:]):
        raise ValueError(
            f"input_norm has normalized_shape={tuple(norm.normalized_shape)}; accepted: {tuple(x.shape[1:])}, a row's"
        )


def check_enough(norm: InputNorm, *sides: Tensor) -> None:
    """Raises unless these maps have a variance for `norm`, where it takes one of the batch."""
    if isinstance(norm, nn.BatchNorm2d):
        check.enough_for_statistics(norm, sum(map(len, sides)), sides[0].shape[2:].numel(), "input_norm")


def normalised(norm: InputNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `norm` makes of maps `x`; autograd-compatible, its running statistics stay as they are.

    `dtype`: of the weight, in which the arithmetic is.
    """
    return _normalised(norm, x, dtype)


def standardising(
    norm: InputNorm, x: Tensor, dtype: torch.dtype, sums: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Standardising | None]:
    """`normalised`, and how a batch normalisation has standardised.

    `sums`: `[rows, channels]` over the places of `x` and of its squares, if they are known.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return normalised(norm, x, dtype), None
    line = standardising_of(norm, x, dtype, sums)
    if line.mean is None or len(x) == 0:
        return normalised(norm, x, dtype), line
    return _through(norm, x, dtype, line.mean, line.variance), line


def standardising_of(
    norm: nn.BatchNorm2d, x: Tensor, dtype: torch.dtype, sums: tuple[Tensor, Tensor] | None = None
) -> Standardising:
    """How a batch normalisation standardises maps `x`; `sums` as in `standardising`."""
    samples, together = len(x) * x.shape[2:].numel(), summed(norm)
    if _of_batch(norm) and together is not None:
        places = _wide(x, dtype).movedim(1, -1).flatten(0, -2)
        return Standardising(norm, *joint_statistics(places.to(dtype), together))
    if not _of_batch(norm) or samples == 0:
        return Standardising(norm, None, None, samples)
    known = None if sums is None or x.device.type != "cpu" else _by_sums(*sums, samples)
    return Standardising(norm, *(_statistics(x, dtype) if known is None else known), samples)


def _normalised(norm: InputNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    if norm is None or len(x) == 0:
        return x
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(_wide(x, dtype), norm.num_groups, eps=norm.eps)
    if isinstance(norm, nn.LayerNorm):
        # Over a whole row, and by one group it keeps maps channels-last.
        return F.group_norm(_wide(x, dtype), 1, eps=norm.eps)
    if not _of_batch(norm):
        return _through(norm, x, dtype, norm.running_mean, norm.running_var)
    return _through(norm, x, dtype, *_statistics(x, dtype))


def _statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[channels]` mean and variance over rows and places, in `dtype`.

    By rows first: PyTorch's own, of maps channels-last, are running sums in float32, and of 50,000 numbers a variance
    keeps four digits.
    """
    count = len(x) * x.shape[2:].numel()
    mean = x.sum((2, 3), dtype=dtype).sum(0) / count
    return mean, (x - mean[:, None, None]).square().sum((2, 3)).sum(0) / count


def _by_sums(first: Tensor, second: Tensor, samples: int) -> tuple[Tensor, Tensor] | None:
    """`_statistics` by sums over places; None where squares about zero would lose digits of a variance."""
    mean, square = (of.double().sum(0) / samples for of in (first, second))
    variance = square - mean.square()
    if (square > MOST_OF_VARIANCE * variance).any():
        return None
    return mean.to(first.dtype), variance.to(first.dtype)


def _through(
    norm: nn.BatchNorm2d, x: Tensor, dtype: torch.dtype, mean: Tensor | None, variance: Tensor | None
) -> Tensor:
    """What the batch normalisation makes of maps by these statistics."""
    return F.batch_norm(_wide(x, dtype), mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Maps that PyTorch's normalisations take beside numbers of `dtype`."""
    return x if dtype == torch.float32 else x.to(dtype)


def _of_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def has_line(norm: InputNorm) -> bool:
    """Whether a weight or a bias stands between what is standardised and the convolution."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.weight is not None or norm.bias is not None)


def through_line(
    norm: nn.BatchNorm2d, v: Tensor, dz: Tensor, rows: MapRows, layer: Layer, geometry: Geometry
) -> dict[str, Tensor]:
    """The gradients of the convolution's weight and of the line's by their names.

    Args:
        v: the convolution's weight gradient on the standardised input `rows`.
        dz: `[1, out, h, w]` the sum over rows of the gradient in front of the activation.
    """
    weight, groups = layer.weight, geometry.groups
    # The same for each of a group's inputs: of one map of ones for each group.
    ones = dz.new_ones(1, groups, *rows.x.shape[2:])
    s = by_weight(dz, ones, layer._replace(weight=weight[:, :1], compute_dtype=dz.dtype), geometry)
    by_group = weight.unflatten(0, (groups, -1))
    v, s = v.view_as(by_group), s.unflatten(0, (groups, -1))
    gradients = {}
    dw = v
    if norm.weight is not None:
        gradients["input_norm.weight"] = (by_group * v).sum((1, 3, 4)).flatten()
        dw = dw * _by_input(norm.weight, groups)
    if norm.bias is not None:
        gradients["input_norm.bias"] = (by_group * s).sum((1, 3, 4)).flatten()
        dw = dw + s * _by_input(norm.bias, groups)
    return {"weight": dw.reshape(weight.shape), **gradients}


def through_statistics(
    line: Standardising, sums: Tensor, products: Tensor, du: Tensor
) -> tuple[dict[str, Tensor], MapSlopes]:
    """The gradients of the line's weight and bias by their names, and the slopes of what it takes, about their mean.

    Args:
        sums, products: `[channels]` over rows and places of the gradient `du` behind the normalisation, and of `du`
            times what lies in front of it, about the mean.
    """
    norm, (_, variance) = line.module, line.statistics
    deviation = (variance + norm.eps).sqrt()
    by_weight, scale = products / deviation, norm.weight / deviation
    found = {"input_norm.weight": by_weight, "input_norm.bias": sums}
    if line.mean is None:
        return found, MapSlopes(None, None, of_place=du, scale=scale)
    through_mean, through_deviation = (-scale * of / max(line.samples, 1) for of in (sums, by_weight / deviation))
    first, second = (of.expand(len(du), -1) for of in (through_mean, through_deviation / 2))
    return found, MapSlopes(first, second, of_place=du, scale=scale)


def _by_input(values: Tensor, groups: int) -> Tensor:
    """Numbers of the input's channels as they stand in `[groups, out / groups, in / groups, k, k]`."""
    return values.view(groups, 1, -1, 1, 1)
