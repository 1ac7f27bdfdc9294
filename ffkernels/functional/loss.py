"""The objective's loss alone, for layers of any kind."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .. import validation as check
from ..autograd import GivenSlope, is_transformed
from ..objectives import DEFAULT_OBJECTIVE, Objective, class_terms


def goodness_loss(
    goodness: Tensor,
    is_positive: Tensor | None,
    objective: Objective = DEFAULT_OBJECTIVE,
    *,
    labels: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """The objective's loss of rows of any layer, ours or not, from their goodness; autograd-compatible.

    For activities `y` `[rows, ...]` of a convolution, a graph layer or a transformer block the goodness is yours to
    form (`y.float().square().flatten(1).mean(1)`; squares of float16 overflow from 256 on), so of the objective's
    fields `goodness` is not read. Loss and slope are finite at any goodness, and in closed form: the backward is one
    multiplication.

    Args:
        goodness: `[rows]`, floating point; computed on in float32 if it is narrower. `[rows, classes]` with an
            objective of classes.
        is_positive: `[rows]` bool, on the same device. A pair loss compares the i-th positive with the i-th negative
            row, and finding them waits for the device. None with an objective of classes.
        objective: threshold, loss, reduction. A threshold per row is in the rows' order.
        labels: `[rows]` int64, with an objective of classes alone.
        sample_weight: `[rows]` factors of the rows' losses (`[pairs]` for pair losses), in the loss's dtype.

    Returns:
        0-dim loss. Its gradient reaches `goodness` only.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        RuntimeError: in a backward with `create_graph=True`.
    """
    check.objective_object(objective)
    values = check.goodness_values(goodness, objective.classes)
    rows = len(values)
    if objective.classes is not None:
        return _loss_of_classes(goodness, values, is_positive, objective, labels, sample_weight)
    if labels is not None:
        raise ValueError(check.WITHOUT_CLASSES)
    check.vector("is_positive", is_positive, rows, torch.bool, values.device, "goodness")
    assert is_positive is not None
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


def _loss_of_classes(
    goodness: Tensor,
    values: Tensor,
    is_positive: Tensor | None,
    objective: Objective,
    labels: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """`values`: the goodness without its gradient, not narrower than float32."""
    if is_positive is not None:
        raise ValueError("is_positive came with an objective of classes, which knows positive rows alone: None")
    assert objective.classes is not None
    check.labels(labels, len(values), objective.classes, values.device, "goodness")
    assert labels is not None
    if sample_weight is not None:
        check.vector("sample_weight", sample_weight, len(values), values.dtype, values.device, "goodness")
        check.constant("sample_weight", sample_weight)
    if not torch.compiler.is_compiling() and is_transformed(goodness, labels, sample_weight):
        return class_terms(objective, goodness.to(values.dtype), labels, sample_weight)[1]
    with torch.no_grad():
        slope, loss = class_terms(objective, values, labels, sample_weight)
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
