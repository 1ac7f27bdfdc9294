"""Batch normalisation behind a layer: its activities standardised over the rows, before an objective reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..spec import Maps

# Sums of a tensor over the processes that have parts of a batch.
Sums = Callable[[Tensor], Tensor]


def summed(norm: nn.Module) -> Sums | None:
    """How what a batch normalisation sums over rows becomes the sum over the rows of all processes; None: it is that.

    Whoever divides a batch among processes says so in the module's attribute `together`.
    """
    return getattr(norm, "together", None)


class Standardised(NamedTuple):
    """`u = weight x + bias` `[rows, units]`, of the standardised activities `x`; and what its gradient needs.

    Attributes:
        scale: `[units]` weight over deviation.
        mean, variance: `[units]` of the batch; None where the running ones counted.
        samples: how many numbers of each unit the statistics are of.
        together: as `summed` has it.
    """

    u: Tensor
    x: Tensor
    scale: Tensor
    mean: Tensor | None
    variance: Tensor | None
    samples: int
    together: Sums | None = None


class StandardisedMoments(NamedTuple):
    """`u = weight x + bias` of maps `p` `[rows, channels, h, w]`, `x = (p - pivot - rest) / deviation`: its moments.

    Attributes:
        first, second: `[rows, channels]` sums over places of `u`, and of `u^2`.
        x_first, x_second: likewise of `x`.
        places: how many a row has.
        rest, deviation, weight, bias: `[channels]`.
        mean, variance, samples, together: as in `Standardised`.
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
    samples: int
    together: Sums | None = None

    def line(self) -> tuple[Tensor, Tensor]:
        """`gain` and `shift` `[channels]` of `u = gain (p - pivot) + shift`."""
        gain = self.weight / self.deviation
        return gain, self.bias - self.rest * gain


def standardise(y: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Standardised:
    """What `norm` makes of activities `y` `[rows, units]`; its running statistics stay as they are."""
    mean, variance = norm.running_mean, norm.running_var
    is_of_batch = norm.training or mean is None or variance is None
    together, samples = summed(norm), len(y)
    if is_of_batch and together is not None:
        mean, variance, samples = joint_statistics(y, together)
    elif is_of_batch:
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
    if not is_of_batch:
        return Standardised(u, x, scale, None, None, samples)
    return Standardised(u, x, scale, mean, variance, samples, together)


def joint_statistics(y: Tensor, together: Sums) -> tuple[Tensor, Tensor, int]:
    """Means and variances `[units]` of all processes' activities, each of which has some rows `y`; and their number."""
    samples = int(together(y.new_tensor([float(len(y))], dtype=torch.float64)))
    mean = together(y.sum(0)) / max(samples, 1)
    variance = together((y - mean).square().sum(0)) / max(samples, 1)
    return mean, variance, samples


def standardise_moments(maps: Maps, norm: nn.BatchNorm2d) -> StandardisedMoments:
    """What `norm` makes of maps, by their moments."""
    mean, variance = norm.running_mean, norm.running_var
    is_of_batch = norm.training or mean is None or variance is None
    places = maps.p.shape[2] * maps.p.shape[3]
    samples, together = len(maps.p) * places, summed(norm)
    count = max(samples, 1)
    rest = maps.first.sum(0) / count
    if not is_of_batch:
        assert mean is not None
        rest = mean - maps.pivot
    elif together is not None:
        # Each process has a pivot of its own.
        samples = int(together(maps.first.new_tensor([float(samples)], dtype=torch.float64)))
        own = maps.first.sum(0) + len(maps.p) * places * maps.pivot
        count = max(samples, 1)
        rest = together(own) / count - maps.pivot
    # Sums about the mean, from those about the pivot.
    first = maps.first - places * rest
    second = maps.spread - 2 * rest * maps.first + places * rest.square()
    # Rounding must not leave less than any numbers of that sum have.
    second = torch.maximum(second, first.square() / places)
    if is_of_batch:
        of_all = second.sum(0) if together is None else together(second.sum(0))
        mean, variance = maps.pivot + rest, of_all / count
    assert variance is not None
    deviation = (variance + norm.eps).sqrt()
    x_first, x_second = first / deviation, second / deviation.square()
    weight = torch.ones_like(deviation) if norm.weight is None else norm.weight
    bias = torch.zeros_like(deviation) if norm.bias is None else norm.bias
    u_first = torch.addcmul(places * bias, x_first, weight)
    u_second = weight.square() * x_second + 2 * weight * bias * x_first + places * bias.square()
    if not is_of_batch:
        mean = variance = None
    return StandardisedMoments(
        u_first, u_second, x_first, x_second, places, rest, deviation, weight, bias, mean, variance, samples, together
    )  # fmt: skip


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
        joint_bias, joint_weight = (t if of.together is None else of.together(t) for t in (by_bias, by_weight))
        by_one, by_x = by_one - joint_bias / count, by_x - joint_weight / count
    scale = of.weight / of.deviation
    gain = by_x * (scale / of.deviation)
    return by_one * scale - gain * of.rest, gain, by_weight, by_bias


def through(of: Standardised, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From `du` `[rows, units]`: dLoss/dy, and the gradients of the weight and the bias `[units]`."""
    by_bias, by_weight = du.sum(0), (du * of.x).sum(0)
    dy = du
    if of.mean is not None:
        rows = max(of.samples, 1)
        joint_bias, joint_weight = (t if of.together is None else of.together(t) for t in (by_bias, by_weight))
        dy = du - (joint_bias / rows) - of.x * (joint_weight / rows)
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
