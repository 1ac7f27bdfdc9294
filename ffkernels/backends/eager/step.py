"""The two operators, put together from the layer, the objective and the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...objective import Objective
from .batch import Block, blocks, input_parts, may_share
from .gradient import Gradient
from .layer import Layer
from .peers import Peers

if TYPE_CHECKING:
    from ..select import Request

# Elements of the activities in one block of rows (4 MB of float32): what later passes over them read from cache.
BLOCK_ELEMENTS = 1 << 20
# A batch of up to this many elements is one block, so that its weight gradient need not be summed over blocks.
SINGLE_BLOCK_ELEMENTS = 1 << 22
# Below this many rows a product no longer runs at its full rate.
MIN_BLOCK_ROWS = 64


def unsupported(request: Request) -> str | None:
    """Eager PyTorch runs everything."""
    return None


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
    layer = Layer(weight, bias, norm, eps, eps_mode, activation, compute_dtype)
    n_pos, n = x_pos.shape[0], x_pos.shape[0] + x_neg.shape[0]
    for block in blocks(n_pos, n - n_pos, _block_rows(n, layer.width), _twins(x_pos, x_neg, label_field)):
        in_place = block.take(y) if compute_dtype == weight.dtype and len(block.ranges) == 1 else None
        parts = input_parts(block, x_pos, x_neg)
        rows = layer.rows(parts, block.take(input_sumsq), label_field, _of_first_side(block, parts, product))
        activity, _, q = layer.forward(rows, in_place)
        block.put(q, sumsq)
        if y is not None and activity is not in_place:
            block.put(activity, y)


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
    objective = Objective(goodness, (threshold_pos, threshold_neg), loss, maximize, reduction, temperature, alpha)
    layer = Layer(weight, bias, norm, eps, eps_mode, activation, compute_dtype)
    n_pos, n = x_pos.shape[0], x_pos.shape[0] + x_neg.shape[0]
    counts: tuple[float | Tensor, float | Tensor] = (n_pos, n - n_pos)
    if is_positive is None:
        is_positive = torch.arange(n, device=weight.device) < n_pos
    else:
        counts = (is_positive.sum(), (~is_positive).sum())
    per_row_threshold = threshold is not None and threshold.dim() == 1

    peers = None
    if peer_mean is not None:
        peers = Peers(peer_mean, peer_strength, peer_momentum, peer_gated, layer, counts[0])
    gradient = Gradient(layer, weight, bias, peers)
    loss_out.zero_()
    block_rows = n if peer_gated else _block_rows(n, layer.width)
    in_pairs = objective.paired or (n > block_rows and _twins(x_pos, x_neg, label_field))
    for block in blocks(n_pos, n - n_pos, block_rows, in_pairs):
        parts = input_parts(block, x_pos, x_neg)
        rows = layer.rows(parts, block.take(input_sumsq), label_field, _of_first_side(block, parts, product))
        activity, z, q = layer.forward(rows)
        block.put(q, sumsq)
        if y is not None:
            block.put(activity, y)
        side = block.take(is_positive)
        assert side is not None
        terms = objective.terms(
            q,
            layer.width,
            side,
            counts,
            # A pair loss has one weight for each pair, and the block's first range is that of its pairs.
            block.first_half(sample_weight) if objective.paired else block.take(sample_weight),
            block.take(threshold) if per_row_threshold else threshold,
            skip_below,
        )
        loss_out.add_(terms.loss)
        gradient.add(rows, activity, z, terms.coefficient, side)

    gradient.apply(
        rule,
        weight_state,
        weight_hyper,
        _rate(weight_hyper, weight_lr, weight.dtype),
        bias_state,
        bias_hyper,
        _rate(bias_hyper, bias_lr, weight.dtype),
    )
    if peers is not None:
        peers.finish()
    if weight_rounded is not None:
        weight_rounded.copy_(weight)


def _rate(hyper: list[float], lr: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The learning rate as a number, as `torch.optim` takes it; one on a device stays there, in the weight's dtype."""
    if lr is None:
        return hyper[0] if hyper else 0.0
    return float(lr) if lr.device.type == "cpu" else lr.to(dtype)


def _twins(x_pos: Tensor, x_neg: Tensor, label_field: int) -> bool:
    return len(x_neg) > 0 and (label_field > 0 or may_share(x_pos, x_neg))


def _of_first_side(block: Block, parts: list[Tensor], product: Tensor | None) -> Tensor | None:
    """`product` for the rows of the block's first part."""
    if product is None:
        return None
    start = block.ranges[0].start
    return product[start : start + len(parts[0])]


def _block_rows(rows: int, width: int) -> int:
    return rows if rows * width <= SINGLE_BLOCK_ELEMENTS else max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // width)
