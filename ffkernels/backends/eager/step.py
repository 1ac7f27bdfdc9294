"""The two operators, put together from the layer, the objective and the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...objectives import Objective
from ...spec import Goal, Layer, Outputs, PeerPull, Rows, Slopes, Update
from .batch import Block, blocks, input_parts, may_share
from .gradient import Gradient
from .layer import Operands, ReadyLayer
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


def linear_forward_(rows: Rows, layer: Layer, y: Tensor | None, sumsq: Tensor) -> None:
    """See `ops.SCHEMAS`."""
    ready = ReadyLayer(layer)
    for block in blocks(*_sides(rows), _block_rows(_total(rows), ready.width), _has_copies(rows)):
        in_place = block.take(y) if y is not None and y.dtype == ready.dtype and len(block.ranges) == 1 else None
        activity, _, q = ready.forward(_operands(ready, rows, block), in_place)
        block.put(q, sumsq)
        if y is not None and activity is not in_place:
            block.put(activity, y)


def linear_step_(rows: Rows, layer: Layer, goal: Goal, pull: PeerPull, update: Update, outputs: Outputs) -> None:
    """See `ops.SCHEMAS`."""
    objective = Objective.of(goal)
    ready = ReadyLayer(layer)
    is_positive, counts = _positives(rows, layer.weight.device)
    per_row_threshold = goal.threshold is not None and goal.threshold.dim() == 1

    peers = None if pull.mean is None else Peers(pull, ready, counts[0])
    gradient = Gradient(ready, layer.weight, layer.bias, peers)
    outputs.loss_out.zero_()
    block_rows = _total(rows) if pull.gated else _block_rows(_total(rows), ready.width)
    in_pairs = objective.paired or (_total(rows) > block_rows and _has_copies(rows))
    for block in blocks(*_sides(rows), block_rows, in_pairs):
        operands = _operands(ready, rows, block)
        activity, z, q = ready.forward(operands)
        block.put(q, outputs.sumsq)
        if outputs.y is not None:
            block.put(activity, outputs.y)
        side = block.take(is_positive)
        assert side is not None
        terms = objective.terms(
            q,
            ready.width,
            side,
            counts,
            # A pair loss has one weight for each pair, and the block's first range is that of its pairs.
            block.first_half(rows.sample_weight) if objective.paired else block.take(rows.sample_weight),
            block.take(goal.threshold) if per_row_threshold else goal.threshold,
            goal.skip_below,
        )
        outputs.loss_out.add_(terms.loss)
        gradient.add(operands, activity, z, terms.coefficient, side)

    _write(gradient, peers, update)
    if outputs.rounded is not None:
        outputs.rounded.copy_(layer.weight)


def linear_update_(rows: Rows, layer: Layer, slopes: Slopes, pull: PeerPull, update: Update) -> None:
    """See `ops.SCHEMAS`."""
    ready = ReadyLayer(layer)
    is_positive, counts = _positives(rows, layer.weight.device)
    peers = None if pull.mean is None else Peers(pull, ready, counts[0])
    gradient = Gradient(ready, layer.weight, layer.bias, peers)
    block_rows = _total(rows) if pull.gated else _block_rows(_total(rows), ready.width)
    for block in blocks(*_sides(rows), block_rows, _total(rows) > block_rows and _has_copies(rows)):
        side, known, first = (block.take(t) for t in (is_positive, slopes.activity, slopes.first))
        assert side is not None and known is not None
        if first is not None and slopes.basis is not None:
            first = first @ slopes.basis
        z = known if ready.activation.keeps_z else None
        y = known.clone() if z is None else ready.activation.forward(z)
        gradient.add_given(_operands(ready, rows, block), y, z, first, block.take(slopes.second), side)
    _write(gradient, peers, update)


def _write(gradient: Gradient, peers: Peers | None, update: Update) -> None:
    gradient.apply(update)
    if peers is not None:
        peers.finish()


def _sides(rows: Rows) -> tuple[int, int]:
    return rows.x_pos.shape[0], rows.x_neg.shape[0]


def _total(rows: Rows) -> int:
    return sum(_sides(rows))


def _positives(rows: Rows, device: torch.device) -> tuple[Tensor, tuple[float | Tensor, float | Tensor]]:
    """`[rows]` bool, and how many rows are positive and negative."""
    n_pos, n_neg = _sides(rows)
    if rows.is_positive is None:
        return torch.arange(n_pos + n_neg, device=device) < n_pos, (n_pos, n_neg)
    return rows.is_positive, (rows.is_positive.sum(), (~rows.is_positive).sum())


def _operands(layer: ReadyLayer, rows: Rows, block: Block) -> Operands:
    """A block's rows as the products take them."""
    parts = input_parts(block, rows.x_pos, rows.x_neg)
    product = None
    if rows.product is not None:
        start = block.ranges[0].start
        product = rows.product[start : start + len(parts[0])]
    return layer.rows(parts, block.take(rows.input_sumsq), rows.label_field, product)


def _has_copies(rows: Rows) -> bool:
    return len(rows.x_neg) > 0 and (rows.label_field > 0 or may_share(rows.x_pos, rows.x_neg))


def _block_rows(rows: int, width: int) -> int:
    return rows if rows * width <= SINGLE_BLOCK_ELEMENTS else max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // width)
