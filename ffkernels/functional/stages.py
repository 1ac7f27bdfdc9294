"""A step whose loss is the caller's own: forward, loss and slopes in plain PyTorch, update with these slopes."""

from __future__ import annotations

import torch

from .. import ops
from ..autograd import ACTIVATIONS, NEEDS_Z
from ..given import GivenLoss
from ..normalisation import row_sumsq
from ..spec import Layer, Outputs, PeerPull, Rows, Slopes, Update


def step_by_stages(
    rows: Rows, layer: Layer, loss: GivenLoss, pull: PeerPull, update: Update, outputs: Outputs, backend: str
) -> None:
    """What `ops.linear_step_` does, with a loss that no backend has to know. Runs under `no_grad`."""
    total = rows.x_pos.shape[0] + rows.x_neg.shape[0]
    kept = layer.weight.new_empty(total, layer.weight.shape[0])
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
    value, first, second = loss.slopes(y, outputs.sumsq, is_positive)
    outputs.loss_out.copy_(value)
    if outputs.y is not None:
        outputs.y.copy_(y)
    ops.linear_update_(rows, layer, Slopes(kept, first, second), pull, update, backend)
    if outputs.rounded is not None:
        outputs.rounded.copy_(layer.weight)
