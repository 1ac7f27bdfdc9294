"""What comes with each step: its rows, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import validation as check
from ..objectives import AnyObjective
from ..spec import Rows


def checked_rows(
    weight: Tensor,
    compute: torch.dtype,
    objective: AnyObjective,
    x_pos: Tensor,
    x_neg: Tensor | None,
    is_positive: Tensor | None = None,
    input_sumsq: Tensor | None = None,
    sample_weight: Tensor | None = None,
    product: Tensor | None = None,
    label_field: int | None = None,
    labels: Tensor | None = None,
    rows_of: Callable[[str, Tensor, Tensor, torch.dtype], None] = check.rows_of,
) -> Rows:
    """The rows of a step on a layer with this weight: arguments of `linear_step_`.

    `rows_of`: checks the rows of a side against weight and compute dtype.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    rows_of("x_pos", x_pos, weight, compute)
    if objective.classes is not None:
        for excess, value in (("x_neg", x_neg), ("is_positive", is_positive), ("label_field", label_field)):
            if value is not None:
                raise ValueError(
                    f"{excess} came with an objective of classes, whose rows are positive; accepted: {excess}=None"
                )
        check.labels(labels, x_pos.shape[0], objective.classes, weight.device)
        x_neg = x_pos[:0]
    elif labels is not None:
        raise ValueError(check.WITHOUT_CLASSES)
    elif (x_neg is None) != (is_positive is not None):
        came = "neither x_neg nor is_positive" if x_neg is None else "both x_neg and is_positive"
        raise ValueError(
            f"{came} came; accepted: one of the two (without negative rows: an objective of classes, and labels)"
        )
    if x_neg is None:
        x_neg = x_pos[:0]
    else:
        rows_of("x_neg", x_neg, weight, compute)
        if x_neg.dtype != x_pos.dtype:
            raise TypeError(f"x_neg is {x_neg.dtype}; accepted: {x_pos.dtype}, as x_pos is")
    n_pos, total = x_pos.shape[0], x_pos.shape[0] + x_neg.shape[0]
    field = 0 if label_field is None else check.label_field(label_field, weight, x_pos, x_neg)
    if product is not None:
        check.shared_product(product, field, n_pos, weight)
    if is_positive is not None:
        check.vector("is_positive", is_positive, total, torch.bool, weight.device)
    check.objective_for(objective, total, n_pos if is_positive is None else None, weight)
    if sample_weight is not None:
        check.sample_weight(sample_weight, objective, total, weight)
    if input_sumsq is not None:
        check.vector("input_sumsq", input_sumsq, total, weight.dtype, weight.device)
    return Rows(x_pos, x_neg, is_positive, input_sumsq, sample_weight, product, field, labels)
