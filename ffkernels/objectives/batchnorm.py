"""Batch normalisation behind a layer: its activities standardised over the rows, before an objective reads them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..spec import Maps


class Standardised(NamedTuple):
    """`u = weight x + bias` `[rows, units]`, of the standardised activities `x`; and what its gradient needs.

    Attributes:
        scale: `[units]` weight over deviation.
        mean, variance: `[units]` of the batch; None where the running ones counted.
    """

    u: Tensor
    x: Tensor
    scale: Tensor
    mean: Tensor | None
    variance: Tensor | None

    @property
    def samples(self) -> int:
        """How many numbers of each unit the statistics are of."""
        return len(self.x)


class StandardisedMoments(NamedTuple):
    """`u = weight x + bias` of maps `p` `[rows, channels, h, w]`, `x = (p - pivot - rest) / deviation`: its moments.

    Attributes:
        first, second: `[rows, channels]` sums over places of `u`, and of `u^2`.
        x_first, x_second: likewise of `x`.
        places: how many a row has.
        rest, deviation, weight, bias: `[channels]`.
        mean, variance: as in `Standardised`.
    """

    first: Tensor
    second: Tensor
    x_first: Tensor
    x_second: Tensor
    places: int
    rest: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    variance: Tensor | None

    @property
    def samples(self) -> int:
        """How many numbers of each channel the statistics are of."""
        return len(self.first) * self.places

    def line(self) -> tuple[Tensor, Tensor]:
        """`gain` and `shift` `[channels]` of `u = gain (p - pivot) + shift`."""
        gain = self.weight / self.deviation
        return gain, self.bias - self.rest * gain


def standardise(y: Tensor, norm: nn.BatchNorm1d) -> Standardised:
    """What `norm` makes of activities `y` `[rows, units]`; its running statistics stay as they are."""
    mean, variance = norm.running_mean, norm.running_var
    is_of_batch = norm.training or mean is None or variance is None
    if is_of_batch:
        # Of no rows there are no statistics, and nothing to standardise.
        variance, mean = torch.var_mean(y, 0, correction=0) if len(y) else y.new_zeros(2, y.shape[1])
    assert mean is not None and variance is not None
    deviation = (variance + norm.eps).sqrt()
    x = (y - mean) / deviation
    u, scale = x, deviation.reciprocal()
    if norm.weight is not None:
        u, scale = x * norm.weight, scale * norm.weight
    if norm.bias is not None:
        u = u + norm.bias
    return Standardised(u, x, scale, *((mean, variance) if is_of_batch else (None, None)))


def standardise_moments(maps: Maps, norm: nn.BatchNorm2d) -> StandardisedMoments:
    """What `norm` makes of maps, by their moments."""
    mean, variance = norm.running_mean, norm.running_var
    is_of_batch = norm.training or mean is None or variance is None
    places = maps.p.shape[2] * maps.p.shape[3]
    count = max(len(maps.p) * places, 1)
    rest = maps.first.sum(0) / count
    if not is_of_batch:
        assert mean is not None
        rest = mean - maps.pivot
    # Sums about the mean, from those about the pivot.
    first = maps.first - places * rest
    second = maps.spread - 2 * rest * maps.first + places * rest.square()
    # Rounding must not leave less than any numbers of that sum have.
    second = torch.maximum(second, first.square() / places)
    if is_of_batch:
        mean, variance = maps.pivot + rest, second.sum(0) / count
    assert variance is not None
    deviation = (variance + norm.eps).sqrt()
    x_first, x_second = first / deviation, second / deviation.square()
    weight = torch.ones_like(deviation) if norm.weight is None else norm.weight
    bias = torch.zeros_like(deviation) if norm.bias is None else norm.bias
    u_first = torch.addcmul(places * bias, x_first, weight)
    u_second = weight.square() * x_second + 2 * weight * bias * x_first + places * bias.square()
    of_batch = (mean, variance) if is_of_batch else (None, None)
    moments = (u_first, u_second, x_first, x_second)
    return StandardisedMoments(*moments, places, rest, deviation, weight, bias, *of_batch)


def pivot_of(norm: nn.BatchNorm2d | None) -> tuple[bool, Tensor | None]:
    """Whether moments are about a pivot, and which if it is known: no row has a part in running statistics."""
    if norm is None:
        return False, None
    return True, None if norm.training else norm.running_mean


def through_moments(
    of: StandardisedMoments, first: Tensor | None, second: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From `du = first + 2 second u`, slopes `[rows, channels]` or `[rows, 1]`: `dp = offset + gain (p - pivot)`.

    Returns:
        `offset` and `gain` `[rows, channels]`, and the gradients of the weight and the bias `[channels]`.
    """
    zero = torch.zeros_like(of.first)
    first, second = (zero if slope is None else zero + slope for slope in (first, second))
    # `du = by_one + by_x x`.
    by_one, by_x = first + 2 * second * of.bias, 2 * second * of.weight
    by_bias = (of.places * by_one + by_x * of.x_first).sum(0)
    by_weight = (by_one * of.x_first + by_x * of.x_second).sum(0)
    if of.mean is not None:
        count = max(of.samples, 1)
        by_one, by_x = by_one - by_bias / count, by_x - by_weight / count
    scale = of.weight / of.deviation
    gain = by_x * (scale / of.deviation)
    return by_one * scale - gain * of.rest, gain, by_weight, by_bias


def through(of: Standardised, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From `du` `[rows, units]`: dLoss/dy, and the gradients of the weight and the bias `[units]`."""
    by_bias, by_weight = du.sum(0), (du * of.x).sum(0)
    dy = du
    if of.mean is not None:
        rows = max(len(du), 1)
        dy = du - (by_bias / rows) - of.x * (by_weight / rows)
    return dy * of.scale, by_weight, by_bias


class OfBatch(Protocol):
    """Statistics that running ones follow: `mean` and `variance` `[units]` or None, and how many numbers each is of."""

    @property
    def mean(self) -> Tensor | None: ...
    @property
    def variance(self) -> Tensor | None: ...
    @property
    def samples(self) -> int: ...


def move(norm: nn.BatchNorm1d | nn.BatchNorm2d, of: OfBatch) -> None:
    """Moves the running statistics towards those of the batch, as `norm` does in a forward pass."""
    mean, variance = norm.running_mean, norm.running_var
    if of.mean is None or of.variance is None or mean is None or variance is None or not norm.track_running_stats:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    samples = of.samples
    if samples < 2:
        return
    momentum = norm.momentum
    if momentum is None:
        assert norm.num_batches_tracked is not None
        momentum = 1 / float(norm.num_batches_tracked)
    mean.lerp_(of.mean, momentum)
    variance.lerp_(of.variance * (samples / (samples - 1)), momentum)
