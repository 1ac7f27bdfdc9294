"""From the records of `spec` to those of the kernels, `records`, and their constants."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...spec import Goal, Layer, Rows, Slot, Update
from . import rules
from .records import Batch, Kept, Parameter, Slope, Terms
from .support import interpreted

NEEDS_Z = ("gelu", "silu")
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def joint(rows: Rows) -> Rows:
    """The joint batch as the kernels take it: vectors without gaps, and sides with the same column stride."""
    x_pos, x_neg = rows.x_pos, rows.x_neg
    if x_pos.stride(1) != x_neg.stride(1) and x_neg.shape[0]:
        x_pos, x_neg = x_pos.contiguous(), x_neg.contiguous()
    known = (packed(rows.is_positive), packed(rows.input_sumsq), packed(rows.sample_weight), packed(rows.product))
    return Rows(x_pos, x_neg, *known, rows.label_field)


def total(rows: Rows) -> int:
    """How many rows there are on both sides."""
    return rows.x_pos.shape[0] + rows.x_neg.shape[0]


def as_one(rows: Rows) -> Tensor | None:
    """All rows `[rows, in]` as one tensor, where they lie together in memory."""
    a, b = rows.x_pos, rows.x_neg
    if not b.shape[0]:
        return a
    storage = a.untyped_storage()
    end = a.storage_offset() + a.shape[0] * a.stride(0)
    if b.untyped_storage().data_ptr() != storage.data_ptr() or b.storage_offset() != end:
        return None
    return a.as_strided((total(rows), a.shape[1]), a.stride()) if a.stride() == b.stride() else None


def batch(rows: Rows) -> Batch:
    """The rows for a launch."""
    x_pos, x_neg, is_positive = rows[:3]
    mask = None if is_positive is None else is_positive.view(torch.uint8)
    strides = (x_pos.stride(0), x_neg.stride(0), x_pos.stride(1))
    return Batch(x_pos, x_neg, mask, x_pos.shape[0], total(rows), *strides)


def keeps_z(layer: Layer) -> bool:
    """Whether the activation's slope needs `z`; of the others `y` is enough."""
    return layer.activation in NEEDS_Z


def scales_first(layer: Layer, rows: Rows) -> bool:
    """Whether rows are scaled before they are rounded: float16 has no room for rows of any length."""
    return layer.norm != "none" and layer.compute_dtype == torch.float16 and rows.x_pos.dtype == torch.float32


def arithmetic(layer: Layer) -> dict[str, Any]:
    """Constants of the products."""
    precision = "ieee"
    # On AMD devices TF32 is emulated where it exists at all.
    if torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    return {
        "COMPUTE": DTYPES[layer.compute_dtype],
        "PRECISION": precision,
        "WIDEN": interpreted() and layer.compute_dtype == torch.bfloat16,
    }


def packed(values: Tensor | None) -> Tensor | None:
    """A tensor as the kernels take it that have no strides for it: without gaps."""
    return None if values is None else values.contiguous()


def kind_of(compute_dtype: torch.dtype, *operands: Tensor) -> str:
    """Which of `configs.KINDS` a product is."""
    if compute_dtype == torch.float32:
        return "float32"
    return "half" if all(t.dtype == compute_dtype for t in operands) else "mixed"


def objective(rows: Rows, partials: Tensor, goal: Goal) -> tuple[Terms, dict[str, Any]]:
    """A goal as `coefficient.row_terms` takes it, and its constants."""
    paired = goal.loss != "logistic"
    threshold, threshold_pos, threshold_neg = goal.threshold, goal.threshold_pos, goal.threshold_neg
    n_pos, n = rows.x_pos.shape[0], total(rows)
    n_positive = None
    if paired:
        counts = (n_pos, n_pos)
    elif goal.reduction == "mean":
        counts = (n, n)
    else:
        counts = (n_pos, n - n_pos)
        n_positive = count_positive(rows)
    if threshold is not None and threshold.device != rows.x_pos.device:
        threshold_pos = threshold_neg = float(threshold)
        threshold = None
    made = Terms(
        partials=partials,
        n_partials=partials.shape[0],
        n_positive=n_positive,
        sample_weight=rows.sample_weight,
        threshold=packed(threshold),
        threshold_pos=threshold_pos,
        threshold_neg=threshold_neg,
        logit_scale=(goal.alpha if paired else 1.0 / goal.temperature) * (1.0 if goal.maximize else -1.0),
        share_pos=1.0 / max(counts[0], 1),
        share_neg=1.0 / max(counts[1], 1),
        skip_below=goal.skip_below,
    )
    per_row = threshold is not None and threshold.dim() == 1
    return made, {"GOODNESS": goal.goodness, "LOSS": goal.loss, "THRESHOLD_PER_ROW": per_row}


def leaves_rows_out(goal: Goal) -> bool:
    """Whether many coefficients may be exactly zero: a mean goodness hardly ever saturates a loss in float32."""
    return goal.goodness == "sum" or goal.skip_below > 0


def count_positive(rows: Rows) -> Tensor | None:
    """How many rows a mask marks, which is known on the device only, and stays there; None for the first side."""
    return None if rows.is_positive is None else rows.is_positive.sum()


def kept(values: Tensor, row_scale: Tensor | None) -> Kept:
    """What a forward has kept, for a launch."""
    return Kept(values, values.stride(0), values.stride(1), row_scale)


def slope_of(given: Tensor | None, units: int) -> Slope:
    """Slopes of one order as `slopes.by_slopes` takes them: where there is one a row, it is every unit's."""
    if given is None:
        return Slope()
    row, column = given.stride()
    if given.shape[1] == 1:
        return Slope(given, row, 0, None)
    return Slope(given, row, column, None if given.shape[1] == units else given.shape[1])


def parameters(layer: Layer, update: Update, rounded: Tensor | None = None) -> tuple[Parameter, Parameter]:
    """Weight and bias with their state and the rule's numbers. Counts Adam's step."""
    weight, bias = layer.weight, layer.bias
    of_weight = _parameter(weight, update.rule, update.weight, rounded)
    return of_weight, Parameter() if bias is None else _parameter(bias, update.rule, update.bias, None)


def gradient_of(written: Tensor) -> Parameter:
    """A parameter of which nothing but its gradient is written, under the rule "grad"."""
    return _parameter(written, "grad", Slot([written], ()), None)


def _parameter(values: Tensor, rule: str, slot: Slot, rounded: Tensor | None) -> Parameter:
    # Of Adam's state the third tensor is the step count, which `rules.numbers` sees to.
    first, second = (slot.state[n] if n < len(slot.state) else None for n in range(2))
    numbers = rules.numbers(rule, slot)
    return Parameter(
        numbers, values, *_strides(values), first, *_strides(first), second, *_strides(second), rounded
    )  # fmt: skip


def _strides(t: Tensor | None) -> tuple[int, int]:
    if t is None:
        return 0, 0
    return (t.stride(0), t.stride(1)) if t.dim() == 2 else (t.stride(0), 1)
