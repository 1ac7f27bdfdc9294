"""The operators, put together from the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...normalisation import row_sumsq
from ...spec import Goal, Layer, Outputs, PeerPull, Rows, Slopes, Update
from . import launch, operands, rules
from .records import Pull, Written


def linear_forward_(
    rows: Rows,
    layer: Layer,
    y: Tensor | None,
    sumsq: Tensor,
    class_sums: Tensor | None = None,
    squares: bool = True,
) -> None:
    """See `ops.SCHEMAS`; and `launch.forward` for sums over class groups, which no operator asks for as yet."""
    rows = _ready(rows, layer)
    if y is None:
        y = layer.weight.new_empty(operands.total(rows), layer.weight.shape[0], dtype=layer.compute_dtype)
    partials, _ = launch.forward(rows, layer, y, sumsq=sumsq, class_sums=class_sums, squares=squares)
    if len(partials) != 1:
        # Adding them in the kernel's last program would need counters set to zero first: a launch as well.
        torch.sum(partials, 0, out=sumsq)


def linear_step_(rows: Rows, layer: Layer, goal: Goal, pull: PeerPull, update: Update, outputs: Outputs) -> None:
    """See `ops.SCHEMAS`."""
    rows = _ready(rows, layer)
    keeps_z, weight, y = operands.keeps_z(layer), layer.weight, outputs.y
    n, width = operands.total(rows), weight.shape[0]
    kept = y if y is not None and not keeps_z else weight.new_empty(n, width, dtype=layer.compute_dtype)
    row_scale = weight.new_empty(n) if layer.norm != "none" else None
    activity, z = (y, kept) if keeps_z else (kept, None)
    partials, units = launch.forward(rows, layer, activity, z, row_scale, sum_units=pull.mean is not None)
    peers = Pull() if units is None else launch.pull(rows, layer, units, row_scale, pull)
    parameters = launch.Parameters(rules.compiled(update), *operands.parameters(layer, update, outputs.rounded))
    activities = launch.Activities(kept, row_scale, partials)
    written = Written(outputs.sumsq, outputs.loss_out)
    launch.update(rows, layer, activities, goal, peers, parameters, written)


def linear_update_(rows: Rows, layer: Layer, slopes: Slopes, pull: PeerPull, update: Update) -> None:
    """See `ops.SCHEMAS`."""
    rows = operands.joint(rows)
    row_scale = launch.row_scale(rows, layer)
    peers = Pull()
    if pull.mean is not None:
        peers = launch.pull(rows, layer, launch.unit_sums(rows, layer, slopes.activity), row_scale, pull)
    parameters = launch.Parameters(rules.compiled(update), *operands.parameters(layer, update))
    launch.update_given(rows, layer, slopes, row_scale, peers, parameters)


def _ready(rows: Rows, layer: Layer) -> Rows:
    rows = operands.joint(rows)
    first = rows.product is not None or operands.scales_first(layer, rows)
    if rows.input_sumsq is None and layer.norm != "none" and first:
        # Normalising costs a pass of its own where float32 rows go into a float16 product, which must know their
        # lengths first, and where the product does not read the whole of them.
        rows = rows._replace(input_sumsq=torch.cat([row_sumsq(x, torch.float32) for x in rows[:2]]))
    return rows
