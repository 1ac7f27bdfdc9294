"""A step in three stages, for losses that its backend does not know: forward, loss and slopes, update."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..autograd import ACTIVATIONS, NEEDS_Z
from ..given import GivenLoss
from ..normalisation import row_sumsq
from ..objective import Objective
from ..spec import Goal, Layer, Outputs, PeerPull, Rows, Slopes, Update


def step_by_stages(
    rows: Rows,
    layer: Layer,
    objective: Objective | GivenLoss,
    goal: Goal,
    pull: PeerPull,
    update: Update,
    outputs: Outputs,
    backend: str,
) -> None:
    """What `ops.linear_step_` does, with a loss that no backend has to know. Runs under `no_grad`."""
    total, width = rows.x_pos.shape[0] + rows.x_neg.shape[0], layer.weight.shape[0]
    kept = layer.weight.new_empty(total, width)
    y = kept
    if layer.activation in NEEDS_Z:
        ops.linear_forward_(rows, layer._replace(activation="identity"), kept, outputs.sumsq, backend)
        y = ACTIVATIONS[layer.activation](kept)
        outputs.sumsq.copy_(row_sumsq(y, y.dtype))
    else:
        ops.linear_forward_(rows, layer, kept, outputs.sumsq, backend)
    is_positive = rows.is_positive
    if is_positive is None:
        is_positive = torch.arange(total, device=y.device) < rows.x_pos.shape[0]
    first: Tensor | None = None
    second: Tensor | None
    if isinstance(objective, GivenLoss):
        loss, first, second = objective.slopes(y, outputs.sumsq, is_positive)
    else:
        counts: tuple[int | Tensor, int | Tensor] = (rows.x_pos.shape[0], rows.x_neg.shape[0])
        if rows.is_positive is not None:
            counts = (is_positive.sum(), (~is_positive).sum())
        threshold = None if goal.threshold is None else goal.threshold.to(y.dtype)
        terms = objective.terms(
            outputs.sumsq, width, is_positive, counts, rows.sample_weight, threshold, goal.skip_below
        )
        # The coefficient of a row is twice its slope: dy = 2 s2 y.
        loss, second = terms.loss, (terms.coefficient / 2).unsqueeze(1)
    outputs.loss_out.copy_(loss)
    if outputs.y is not None:
        outputs.y.copy_(y)
    ops.linear_update_(rows, layer, Slopes(kept, first, second), pull, update, backend)
    if outputs.rounded is not None:
        outputs.rounded.copy_(layer.weight)
