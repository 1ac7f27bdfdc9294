"""The two operators, put together from the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...normalisation import row_sumsq
from . import launch, operands, rules


def linear_forward_(
    x_pos: Tensor,
    x_neg: Tensor,
    input_sumsq: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    activation: str,
    compute_dtype: torch.dtype,
    product: Tensor | None,
    label_field: int,
    y: Tensor | None,
    sumsq: Tensor,
) -> None:
    """See `ops.SCHEMAS`."""
    layer = operands.Layer(weight, bias, norm, eps, eps_mode, activation, compute_dtype)
    shared = None if product is None else (product, label_field)
    rows = _rows(x_pos, x_neg, input_sumsq, layer, shared is not None)
    if y is None:
        y = weight.new_empty(rows.total, weight.shape[0], dtype=compute_dtype)
    partials, _ = launch.forward(rows, layer, y, shared=shared, sumsq=sumsq)
    if len(partials) != 1:
        # Adding them in the kernel's last program would need counters set to zero first: a launch as well.
        torch.sum(partials, 0, out=sumsq)


def linear_step_(
    x_pos: Tensor,
    x_neg: Tensor,
    is_positive: Tensor | None,
    input_sumsq: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    activation: str,
    compute_dtype: torch.dtype,
    goodness: str,
    threshold_pos: float,
    threshold_neg: float,
    threshold: Tensor | None,
    loss: str,
    maximize: bool,
    reduction: str,
    temperature: float,
    alpha: float,
    skip_below: float,
    product: Tensor | None,
    label_field: int,
    peer_mean: Tensor | None,
    peer_strength: float,
    peer_momentum: float,
    peer_gated: bool,
    rule: str,
    weight_state: list[Tensor],
    weight_hyper: list[float],
    weight_lr: Tensor | None,
    bias_state: list[Tensor],
    bias_hyper: list[float],
    bias_lr: Tensor | None,
    weight_rounded: Tensor | None,
    y: Tensor | None,
    sumsq: Tensor,
    loss_out: Tensor,
) -> None:
    """See `ops.SCHEMAS`."""
    layer = operands.Layer(weight, bias, norm, eps, eps_mode, activation, compute_dtype)
    shared = None if product is None else (product, label_field)
    rows = _rows(x_pos, x_neg, input_sumsq, layer, shared is not None)
    is_positive = operands.vector(is_positive)
    n, width = rows.total, weight.shape[0]
    kept = y if y is not None and not layer.keeps_z else weight.new_empty(n, width, dtype=compute_dtype)
    row_scale = weight.new_empty(n) if norm != "none" else None
    activity, z = (y, kept) if layer.keeps_z else (kept, None)
    partials, units = launch.forward(rows, layer, activity, z, row_scale, shared, peer_mean is not None, is_positive)
    peers = None
    if peer_mean is not None and units is not None:
        peers = launch.pull(
            rows, layer, units, row_scale, is_positive, peer_mean, peer_strength, peer_momentum, peer_gated
        )  # fmt: skip
    terms = operands.terms(
        rows, is_positive, sample_weight, goodness, threshold_pos, threshold_neg, threshold, loss, maximize, reduction,
        temperature, alpha, skip_below,
    )  # fmt: skip
    parameters = operands.parameter_arguments(
        rule, weight, weight_state, weight_hyper, weight_lr, bias, bias_state, bias_hyper, bias_lr, weight_rounded
    )
    activities = launch.Activities(kept, row_scale, partials)
    form = rules.compiled(rule, weight_hyper, bias_hyper)
    launch.update(rows, layer, activities, terms, peers, form, parameters, sumsq, loss_out)


def _rows(x_pos: Tensor, x_neg: Tensor, sumsq: Tensor | None, layer: operands.Layer, shares: bool) -> operands.Rows:
    rows = operands.joint(x_pos, x_neg, sumsq)
    if rows.sumsq is None and layer.norm != "none" and (shares or layer.scales_first(rows)):
        # Normalising costs a pass of its own where float32 rows go into a float16 product, which must know their
        # lengths first, and where the product does not read the whole of them.
        rows = rows._replace(sumsq=torch.cat([row_sumsq(x, torch.float32) for x in (rows.x_pos, rows.x_neg)]))
    return rows
