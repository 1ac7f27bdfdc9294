"""The operators, put together from the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import spec
from ...normalisation import row_sumsq
from . import launch, operands


def linear_forward_(rows: spec.Rows, layer: spec.Layer, y: Tensor | None, sumsq: Tensor) -> None:
    """See `ops.SCHEMAS`."""
    ready = operands.Layer(*layer)
    shared = None if rows.product is None else (rows.product, rows.label_field)
    joint = _rows(rows, ready)
    if y is None:
        y = layer.weight.new_empty(joint.total, layer.weight.shape[0], dtype=layer.compute_dtype)
    partials, _ = launch.forward(joint, ready, y, shared=shared, sumsq=sumsq)
    if len(partials) != 1:
        # Adding them in the kernel's last program would need counters set to zero first: a launch as well.
        torch.sum(partials, 0, out=sumsq)


def linear_step_(
    rows: spec.Rows,
    layer: spec.Layer,
    goal: spec.Goal,
    pull: spec.PeerPull,
    update: spec.Update,
    outputs: spec.Outputs,
) -> None:
    """See `ops.SCHEMAS`."""
    ready = operands.Layer(*layer)
    shared = None if rows.product is None else (rows.product, rows.label_field)
    joint = _rows(rows, ready)
    weight, y = layer.weight, outputs.y
    n, width = joint.total, weight.shape[0]
    kept = y if y is not None and not ready.keeps_z else weight.new_empty(n, width, dtype=layer.compute_dtype)
    row_scale = weight.new_empty(n) if layer.norm != "none" else None
    activity, z = (y, kept) if ready.keeps_z else (kept, None)
    partials, units = launch.forward(joint, ready, activity, z, row_scale, shared, pull.mean is not None)
    peers = None
    if pull.mean is not None and units is not None:
        peers = launch.pull(joint, ready, units, row_scale, pull)
    terms = operands.terms(joint, rows.sample_weight, goal)
    parameters = operands.parameters(layer, update, outputs.rounded)
    activities = launch.Activities(kept, row_scale, partials)
    launch.update(joint, ready, activities, terms, peers, parameters, outputs.sumsq, outputs.loss_out)


def linear_update_(
    rows: spec.Rows, layer: spec.Layer, slopes: spec.Slopes, pull: spec.PeerPull, update: spec.Update
) -> None:
    """See `ops.SCHEMAS`."""
    ready = operands.Layer(*layer)
    joint = operands.joint(rows)
    row_scale = launch.row_scale(joint, ready)
    peers = None
    if pull.mean is not None:
        units = launch.unit_sums(joint, ready, slopes.activity)
        peers = launch.pull(joint, ready, units, row_scale, pull)
    launch.update_given(joint, ready, slopes, row_scale, peers, operands.parameters(layer, update))


def _rows(rows: spec.Rows, layer: operands.Layer) -> operands.Rows:
    joint = operands.joint(rows)
    if joint.sumsq is None and layer.norm != "none" and (rows.product is not None or layer.scales_first(joint)):
        # Normalising costs a pass of its own where float32 rows go into a float16 product, which must know their
        # lengths first, and where the product does not read the whole of them.
        joint = joint._replace(sumsq=torch.cat([row_sumsq(x, torch.float32) for x in (joint.x_pos, joint.x_neg)]))
    return joint
