"""The objective's loss alone, for layers of any kind."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .. import validation as check
from ..autograd import GivenSlope, is_transformed
from ..objective import DEFAULT_OBJECTIVE, Objective


def goodness_loss(
    goodness: Tensor,
    is_positive: Tensor,
    objective: Objective = DEFAULT_OBJECTIVE,
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """The objective's loss of rows of any layer, ours or not, from their goodness; autograd-compatible.

    For activities `y` `[rows, ...]` of a convolution, a graph layer or a transformer block the goodness is yours to
    form (`y.float().square().flatten(1).mean(1)`; squares of float16 overflow from 256 on), so of the objective's
    fields `goodness` is not read. Loss and slope are finite at any goodness, and in closed form: the backward is one
    multiplication.

    Args:
        goodness: `[rows]`, floating point; computed on in float32 if it is narrower.
        is_positive: `[rows]` bool, on the same device. A pair loss compares the i-th positive with the i-th negative
            row, and finding them waits for the device.
        objective: threshold, loss, reduction. A threshold per row is in the rows' order.
        sample_weight: `[rows]` factors of the rows' losses (`[pairs]` for pair losses), in the loss's dtype.

    Returns:
        0-dim loss. Its gradient reaches `goodness` only.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        RuntimeError: in a backward with `create_graph=True`.
    """
    values = check.goodness_values(goodness)
    rows = len(values)
    check.vector("is_positive", is_positive, rows, torch.bool, values.device, "goodness")
    check.objective_object(objective)
    check.objective_for(objective, rows, None, values, "goodness")
    if sample_weight is not None:
        entries = rows // 2 if objective.paired else rows
        check.vector("sample_weight", sample_weight, entries, values.dtype, values.device, "goodness")
        check.constant("sample_weight", sample_weight)
    threshold = objective.threshold if isinstance(objective.threshold, Tensor) else None
    if threshold is not None:
        check.constant("threshold", threshold)
        threshold = threshold.to(values.dtype)
    given = (goodness, is_positive, sample_weight, threshold)
    transformed = not torch.compiler.is_compiling() and is_transformed(*given)
    with nullcontext() if transformed else torch.no_grad():
        order = None
        counts: tuple[float | Tensor, float | Tensor]
        if transformed:
            values = goodness.to(values.dtype)
        if objective.paired:
            order, n_pos = sides_in_order(is_positive)
            values, counts = values[order], (n_pos, n_pos)
        else:
            counts = (is_positive.sum(), (~is_positive).sum())
        slope, loss = objective.slope_and_loss(values, is_positive, counts, sample_weight, threshold)
        if transformed:
            return loss
        if order is not None:
            slope = slope[order.argsort()]
    return GivenSlope.apply(goodness, slope, loss)


def sides_in_order(is_positive: Tensor) -> tuple[Tensor, int]:
    """Indices that put positives before negatives, each side in its order; and the number of positives."""
    positive, negative = is_positive.nonzero().squeeze(1), (~is_positive).nonzero().squeeze(1)
    if len(positive) != len(negative):
        raise ValueError(
            f"is_positive marks {len(positive)} positive and {len(negative)} negative rows, which a pair loss "
            "cannot pair; accepted: equally many"
        )
    return torch.cat([positive, negative]), len(positive)
