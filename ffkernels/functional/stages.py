"""A step in three stages, for losses that its backend does not know: forward, loss and slopes, update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..autograd import ACTIVATIONS, NEEDS_Z
from ..backends import select
from ..normalisation import row_sumsq
from ..objectives import (
    AnyObjective,
    GivenLoss,
    Judged,
    Objective,
    ProjectionHead,
    Standardised,
    class_terms,
    dense,
    goodness_of_sums,
    moments_goodness,
    slopes_by_activity,
    standardise,
    through,
)
from ..spec import Goal, Layer, Outputs, PeerPull, Rows, Slopes, Update

NO_PULL = PeerPull(None, 0.0, 0.0, False)


def step_by_stages(
    rows: Rows,
    layer: Layer,
    objective: AnyObjective,
    goal: Goal,
    pull: PeerPull,
    update: Update,
    others: tuple[Update, ...],
    outputs: Outputs,
    backend: str,
    batch_norm: nn.BatchNorm1d | None = None,
) -> Standardised | None:
    """What `ops.linear_step_` does, with a loss that no backend has to know. Runs under `no_grad`.

    `others`: the updates of what a head and a batch normalisation learn, which follow those of the layer.

    Returns:
        What a batch normalisation has made, by which its running statistics are to be moved.
    """
    total, width = rows.x_pos.shape[0] + rows.x_neg.shape[0], layer.weight.shape[0]
    kept = layer.weight.new_empty(total, width)
    y, sums = kept, None
    if layer.activation in NEEDS_Z:
        ops.linear_forward_(rows, layer._replace(activation="identity"), kept, outputs.sumsq, backend)
        y = ACTIVATIONS[layer.activation](kept)
        outputs.sumsq.copy_(row_sumsq(y, y.dtype))
    else:
        sums = _class_sums(objective, layer.weight, total, backend) if batch_norm is None else None
        squares = isinstance(objective, Objective) and objective.goodness != "activity"
        ops.linear_forward_(rows, layer, kept, outputs.sumsq, backend, sums, squares)
    standardised = None
    if batch_norm is not None:
        standardised = standardise(y, batch_norm)
        y = standardised.u
        outputs.sumsq.copy_(row_sumsq(y, y.dtype))
    gradients: list[tuple[Tensor | None, Tensor]] = []
    if isinstance(objective, ProjectionHead):
        assert rows.labels is not None
        judged, gradient = objective.judge(y, outputs.sumsq, rows.labels, rows.sample_weight, goal.skip_below)
        gradients.append((objective.weight, gradient))
    else:
        judged = judged_of(objective, y, rows, goal, outputs.sumsq, sums)
    slopes = Slopes(kept, judged.first, judged.second, judged.basis)
    if batch_norm is not None and standardised is not None:
        dy, by_weight, by_bias = through(standardised, dense(slopes, y))
        slopes = Slopes(kept, dy, None)
        learned = ((batch_norm.weight, by_weight), (batch_norm.bias, by_bias))
        gradients += [(parameter, gradient) for parameter, gradient in learned if parameter is not None]
    # All have their memory before anything is written.
    further = [_by_gradient(p, g, own) for (p, g), own in zip(gradients, others, strict=True)]
    outputs.loss_out.copy_(judged.loss)
    if outputs.y is not None:
        outputs.y.copy_(y)
    if outputs.goodness_out is not None:
        assert judged.goodness is not None
        outputs.goodness_out.copy_(judged.goodness)
    ops.linear_update_(rows, layer, slopes, pull, update, backend)
    for records in further:
        ops.linear_update_(*records, backend)
    if outputs.rounded is not None:
        outputs.rounded.copy_(layer.weight)
    return standardised


def _class_sums(objective: AnyObjective, weight: Tensor, rows: int, backend: str) -> Tensor | None:
    """`[rows, classes]` for the forward to fill in where it can, and the objective reads no more than that."""
    fewest = select.SUMS_CLASSES.get(backend)
    if fewest is None or not isinstance(objective, Objective) or objective.classes is None:
        return None
    return weight.new_empty(rows, objective.classes) if len(weight) // objective.classes >= fewest else None


def judged_of(
    objective: Objective | GivenLoss,
    y: Tensor,
    rows: Rows,
    goal: Goal,
    sumsq: Tensor,
    class_sums: Tensor | None = None,
    second: Tensor | None = None,
    places: int = 1,
    maps: Tensor | None = None,
) -> Judged:
    """The second stage: activities `y` `[rows, units]` and their sums to loss, goodness and slopes.

    `second`, `places`, `maps`: as in `GivenLoss.judge`; the slopes are then those by the moments `y` and `second`.
    """
    units, side = y.shape[1], rows.is_positive if rows.labels is None else rows.labels
    if side is None:
        side = torch.arange(len(y), device=y.device) < rows.x_pos.shape[0]
    if isinstance(objective, GivenLoss):
        return objective.judge(y, sumsq, side, second, places, maps)
    if objective.classes is not None:
        if class_sums is None:
            goodness = moments_goodness(y, second, objective.classes, objective.goodness, places)
        else:
            goodness = goodness_of_sums(class_sums, units, objective.goodness)
        slope, loss = class_terms(objective, goodness, side, rows.sample_weight, goal.skip_below)
        return Judged(loss, goodness, *slopes_by_activity(slope, units, objective.goodness, places))
    counts: tuple[int | Tensor, int | Tensor] = (rows.x_pos.shape[0], rows.x_neg.shape[0])
    if rows.is_positive is not None:
        counts = (side.sum(), (~side).sum())
    threshold = None if goal.threshold is None else goal.threshold.to(y.dtype)
    terms = objective.terms(sumsq, units * places, side, counts, rows.sample_weight, threshold, goal.skip_below)
    # The coefficient of a row is twice its slope: dy = 2 s2 y.
    return Judged(terms.loss, None, None, (terms.coefficient / 2).unsqueeze(1))


def _by_gradient(
    parameter: Tensor | None, gradient: Tensor, update: Update
) -> tuple[Rows, Layer, Slopes, PeerPull, Update]:
    """Wraps a finished gradient so that `linear_update_` applies the rule: one unit, one row, which is the gradient."""
    assert parameter is not None
    # In compiled code the last tensor of the state holds the rule's numbers.
    count = len(update.weight.state) - (update.rule != "grad" and not update.weight.numbers)
    state = [t.view(1, -1) if t.dim() and i < count else t for i, t in enumerate(update.weight.state)]
    update = update._replace(weight=update.weight._replace(state=state))
    x = gradient.reshape(1, -1)
    layer = Layer(parameter.view(1, -1), None, "none", 0.0, "add", "identity", parameter.dtype)
    one = x.new_ones(1, 1)
    return Rows(x, x[:0]), layer, Slopes(one, one, None), NO_PULL, update
