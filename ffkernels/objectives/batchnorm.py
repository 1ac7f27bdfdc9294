"""Batch normalisation behind a layer: its activities standardised over the rows, before an objective reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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


def through(of: Standardised, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From `du` `[rows, units]`: dLoss/dy, and the gradients of the weight and the bias `[units]`."""
    by_bias, by_weight = du.sum(0), (du * of.x).sum(0)
    dy = du
    if of.mean is not None:
        rows = max(len(du), 1)
        dy = du - (by_bias / rows) - of.x * (by_weight / rows)
    return dy * of.scale, by_weight, by_bias


def move(norm: nn.BatchNorm1d, of: Standardised) -> None:
    """Moves the running statistics towards those of the batch, as `norm` does in a forward pass."""
    mean, variance = norm.running_mean, norm.running_var
    if of.mean is None or of.variance is None or mean is None or variance is None or not norm.track_running_stats:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    rows = len(of.x)
    if rows < 2:
        return
    momentum = norm.momentum
    if momentum is None:
        assert norm.num_batches_tracked is not None
        momentum = 1 / float(norm.num_batches_tracked)
    mean.lerp_(of.mean, momentum)
    variance.lerp_(of.variance * (rows / (rows - 1)), momentum)
