"""The two operators, put together from the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...normalisation import row_sumsq
from . import launch


def linear_forward(
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
) -> tuple[Tensor, Tensor]:
    """See `ops.SCHEMAS`."""
    layer = launch.Layer(weight, bias, norm, eps, eps_mode, activation, compute_dtype)
    rows = _rows(x_pos, x_neg, input_sumsq, layer)
    y = weight.new_empty(rows.total, weight.shape[0], dtype=compute_dtype)
    partials = launch.forward(rows, layer, y, z=None, row_scale=None)
    # Adding them in the kernel's last program would need counters set to zero first: a launch as well.
    return y, partials.sum(0) if len(partials) > 1 else partials[0]


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
    y: Tensor | None,
    sumsq: Tensor,
    loss_out: Tensor,
) -> None:
    """See `ops.SCHEMAS`."""
    layer = launch.Layer(weight, bias, norm, eps, eps_mode, activation, compute_dtype)
    rows = _rows(x_pos, x_neg, input_sumsq, layer)
    n, width = rows.total, weight.shape[0]
    kept = y if y is not None and not layer.keeps_z else weight.new_empty(n, width, dtype=compute_dtype)
    row_scale = weight.new_empty(n) if norm != "none" else None
    if layer.keeps_z:
        partials = launch.forward(rows, layer, y, kept, row_scale)
    else:
        partials = launch.forward(rows, layer, kept, None, row_scale)
    terms = launch.terms(
        rows, is_positive, sample_weight, goodness, threshold_pos, threshold_neg, threshold, loss, maximize, reduction,
        temperature, alpha,
    )  # fmt: skip
    parameters = launch.parameter_arguments(
        rule, weight, weight_state, weight_hyper, weight_lr, bias, bias_state, bias_hyper, bias_lr
    )
    launch.update(
        rows, layer, launch.Activities(kept, row_scale, partials), terms, rule, parameters, sumsq, loss_out
    )  # fmt: skip


def _rows(x_pos: Tensor, x_neg: Tensor, sumsq: Tensor | None, layer: launch.Layer) -> launch.Rows:
    rows = launch.joint(x_pos, x_neg, sumsq)
    if rows.sumsq is None and layer.scales_first(rows):
        # The one case in which normalising costs a pass of its own: float16 products of raw float32 rows.
        rows = rows._replace(sumsq=torch.cat([row_sumsq(x, torch.float32) for x in (rows.x_pos, rows.x_neg)]))
    return rows
