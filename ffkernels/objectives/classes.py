"""Class groups: from the goodness of each class to the loss, and to one slope for each row and class.

A layer's units are divided among the classes, consecutive ones to each, and no negative data is needed: a row's own
class is its positive, the others are its negatives. Plain PyTorch on `[rows, classes]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import ClassLoss, Goodness, Slopes

if TYPE_CHECKING:
    from .objective import Objective

CLASS_LOSSES = get_args(ClassLoss)
CLASS_GOODNESS = ("mean", "sum", "activity")
# CwC's logits are clamped to this, and this is added to its exponentials (Papachristodoulou et al., 2024).
CWC_CLAMP, CWC_EPS = 50.0, 1e-9


def group_sizes(units: int, classes: int) -> list[int]:
    """How many units each class has: they differ by one at most, the larger groups first."""
    size, larger = divmod(units, classes)
    return [size + 1] * larger + [size] * (classes - larger)


def group_sums(values: Tensor, classes: int) -> Tensor:
    """`[rows, classes]` sums of `values` `[rows, units]` over the units of each class."""
    size, larger = divmod(values.shape[1], classes)
    edge = larger * (size + 1)
    parts = [values[:, edge:].unflatten(1, (classes - larger, size)).sum(2)]
    if larger:
        parts.insert(0, values[:, :edge].unflatten(1, (larger, size + 1)).sum(2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def class_goodness(y: Tensor, classes: int, goodness: Goodness) -> Tensor:
    """`[rows, classes]` goodness of activities `y` `[rows, units]`: "sum", "mean" of squares, or mean "activity"."""
    sums = group_sums(y if goodness == "activity" else y.square(), classes)
    return goodness_of_sums(sums, y.shape[1], goodness)


def goodness_of_sums(sums: Tensor, units: int, goodness: Goodness, places: int = 1) -> Tensor:
    """`class_goodness` from sums over the groups `[rows, classes]`: of activities for "activity", else of squares.

    `places`: how many numbers of each unit the sums hold, in a layer that has several.
    """
    return sums if goodness == "sum" else sums / (_sizes_like(sums, units) * places)


def moments_goodness(first: Tensor, second: Tensor | None, classes: int, goodness: Goodness, places: int = 1) -> Tensor:
    """`class_goodness` from `[rows, units]` sums over places of activities, and of squares (None: `first^2`)."""
    if second is None:
        return class_goodness(first, classes, goodness)
    sums = group_sums(first if goodness == "activity" else second, classes)
    return goodness_of_sums(sums, first.shape[1], goodness, places)


def slopes_by_activity(
    slope: Tensor, units: int, goodness: Goodness, places: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """`spec.Slopes` first and second, from slopes by the goodness of each class `[rows, classes]`."""
    if goodness != "sum":
        slope = slope / (_sizes_like(slope, units) * places)
    return (slope, None) if goodness == "activity" else (None, slope)


def dense(slopes: Slopes, y: Tensor) -> Tensor:
    """dLoss/dy `[rows, units]` of slopes in any form; `y` `[rows, units]` are the activities."""
    total = torch.zeros_like(y)
    if slopes.first is not None:
        total += by_unit(slopes.first, y.shape[1]) if slopes.basis is None else slopes.first @ slopes.basis
    if slopes.second is not None:
        total += by_unit(slopes.second, y.shape[1]) * (2 * y)
    return total


def by_unit(slope: Tensor, units: int) -> Tensor:
    """`[rows, groups]` as `[rows, units]`, or as it is where it is one number a row or a unit."""
    groups = slope.shape[1]
    if groups in (1, units):
        return slope
    return slope.repeat_interleave(torch.tensor(group_sizes(units, groups), device=slope.device), dim=1)


def class_terms(
    objective: Objective,
    goodness: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    skip_below: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`[rows, classes]` slopes dLoss/dgoodness, and the loss, the mean over rows.

    Where labels are not looked at, as on a device, a row whose label is outside of the classes gets no slope and makes
    the loss NaN.

    Args:
        goodness: `[rows, classes]`.
        labels: `[rows]` int64.
        sample_weight: `[rows]` factors of the rows' losses.
        skip_below: rows none of whose slopes by `g / temperature` reaches this get none (those of "pvn" are at most
            1/2 under "mean", and the others' share that).
    """
    rows, classes = goodness.shape
    own = labels.unsqueeze(1) == torch.arange(classes, device=labels.device)
    sign = 1.0 if objective.maximize else -1.0
    slope, losses = _LOSSES[objective.loss](objective, sign * goodness, own)
    seen = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if not seen or torch._C._functorch.peek_interpreter_stack() is not None:
        known = own.any(1)
        slope, losses = slope.masked_fill(~known.unsqueeze(1), 0), losses.masked_fill(~known, torch.nan)
    if skip_below:
        slope = slope.masked_fill((slope.abs() < skip_below).all(1, keepdim=True), 0)
    slope = slope * (sign / (objective.temperature * max(rows, 1)))
    if sample_weight is not None:
        slope, losses = slope * sample_weight.unsqueeze(1), losses * sample_weight
    return slope, losses.sum() / max(rows, 1)


def _cross_entropy(objective: Objective, goodness: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """`-sum_k q_k log softmax(g/T)_k`, `q` the smoothed label: slopes by `g/T`, and losses."""
    log_p = F.log_softmax(goodness / objective.temperature, dim=1)
    smoothing, p = objective.label_smoothing, log_p.exp()
    losses = -log_p.masked_fill(~own, 0).sum(1)
    others = p.masked_fill(own, 0)
    # `p - 1` of the own class, without its cancellation.
    slope = torch.where(own, -others.sum(1, keepdim=True), p)
    if smoothing:
        share = smoothing / goodness.shape[1]
        losses = (1 - smoothing) * losses - smoothing * log_p.mean(1)
        # Of the two ways to write the own class's slope, the one that cancels less.
        direct = p - (1 - smoothing) - share
        slope = torch.where(own & (p < 0.5), direct, slope + (own.to(slope.dtype) * smoothing - share))
    return slope, losses


def _cwc(objective: Objective, goodness: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """`-log((e^t + 1e-9) / (sum_k e^t_k + 1e-9))` of `t = g/T` within +-50: slopes by `g/T`, and losses."""
    logit = goodness / objective.temperature
    power = logit.clamp(-CWC_CLAMP, CWC_CLAMP).exp()
    mine, total = power.masked_fill(~own, 0).sum(1, keepdim=True), power.sum(1, keepdim=True) + CWC_EPS
    others = power.masked_fill(own, 0).sum(1, keepdim=True)
    slope = torch.where(own, -mine / (mine + CWC_EPS) * (others / total), power / total)
    losses = (total.log() - (mine + CWC_EPS).log()).squeeze(1)
    return slope.masked_fill(logit.abs() > CWC_CLAMP, 0), losses


def _pvn(objective: Objective, goodness: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The own class above the threshold, the mean of the others below it: slopes by `g/T`, and losses."""
    theta = objective.thresholds()[0] * (1.0 if objective.maximize else -1.0)
    share = 0.5 if objective.reduction == "mean" else 1.0
    others = goodness.shape[1] - 1
    above = (theta - goodness.masked_fill(~own, 0).sum(1, keepdim=True)) / objective.temperature
    losses = -F.logsigmoid(-above)
    slope = own * (-share * torch.sigmoid(above))
    if others:
        below = (goodness.masked_fill(own, 0).sum(1, keepdim=True) / others - theta) / objective.temperature
        losses = losses - F.logsigmoid(-below)
        slope = torch.where(own, slope, torch.sigmoid(below) * (share / others))
    return slope, share * losses.squeeze(1)


_LOSSES = {"cross_entropy": _cross_entropy, "cwc": _cwc, "pvn": _pvn}


def _sizes_like(like: Tensor, units: int) -> float | Tensor:
    """The groups' sizes, as a number where they are all the same."""
    size, larger = divmod(units, like.shape[1])
    return like.new_tensor(group_sizes(units, like.shape[1])) if larger else size
