"""What the kernels are given: rows, layer, objective, parameters, each as arguments and constants of a launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...spec import Goal, Layer, Rows, Update
from . import rules
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


def row_arguments(rows: Rows) -> dict[str, Any]:
    """Both sides' rows."""
    return {
        "x_pos": rows.x_pos,
        "x_neg": rows.x_neg,
        "n_pos": rows.x_pos.shape[0],
        "rows": total(rows),
        "x_pos_row": rows.x_pos.stride(0),
        "x_neg_row": rows.x_neg.stride(0),
        "x_col": rows.x_pos.stride(1),
    }


def mask(rows: Rows) -> Tensor | None:
    """`[rows]` bytes: which rows are positive; None for the first side."""
    return None if rows.is_positive is None else rows.is_positive.view(torch.uint8)


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


class Terms(NamedTuple):
    """What turns sums of squares into coefficients: tensors and numbers for `row_terms`, and its constants."""

    arguments: dict[str, Any]
    constants: dict[str, Any]

    @property
    def leaves_rows_out(self) -> bool:
        """Whether many coefficients may be exactly zero: a mean goodness hardly ever saturates a loss in float32."""
        return self.constants["GOODNESS"] == "sum" or self.arguments["skip_below"] > 0


# Those of a loss that is given as slopes.
NO_TERMS = Terms(
    dict.fromkeys(("n_positive", "sample_weight", "threshold"))
    | dict.fromkeys(("threshold_pos", "threshold_neg", "logit_scale", "share_pos", "share_neg", "skip_below"), 0.0),
    {"GOODNESS": "sum", "LOSS": "logistic", "THRESHOLD_PER_ROW": False},
)


def terms(rows: Rows, goal: Goal) -> Terms:
    """The objective as `coefficient.row_terms` takes it."""
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
        if rows.is_positive is not None:
            # How many rows a mask marks is known on the device only, and stays there.
            n_positive = rows.is_positive.sum()
    if threshold is not None and threshold.device != rows.x_pos.device:
        threshold_pos = threshold_neg = float(threshold)
        threshold = None
    arguments = {
        "n_positive": n_positive,
        "sample_weight": rows.sample_weight,
        "threshold": packed(threshold),
        "threshold_pos": threshold_pos,
        "threshold_neg": threshold_neg,
        "logit_scale": (goal.alpha if paired else 1.0 / goal.temperature) * (1.0 if goal.maximize else -1.0),
        "share_pos": 1.0 / max(counts[0], 1),
        "share_neg": 1.0 / max(counts[1], 1),
        "skip_below": goal.skip_below,
    }
    constants = {
        "GOODNESS": goal.goodness,
        "LOSS": goal.loss,
        "THRESHOLD_PER_ROW": threshold is not None and threshold.dim() == 1,
    }
    return Terms(arguments, constants)


class Parameters(NamedTuple):
    """Parameters, their state and the rule's numbers, and the rule's compiled form."""

    arguments: dict[str, Any]
    rule: str


def parameters(layer: Layer, update: Update, weight_rounded: Tensor | None = None) -> Parameters:
    """What a rule is applied to, and with. Counts Adam's step."""
    weight, bias = layer.weight, layer.bias
    weight_state, bias_state = update.weight.state, update.bias.state
    arguments: dict[str, Any] = {"weight": weight, "bias": bias, "weight_rounded": weight_rounded}
    arguments |= {"weight_row": weight.stride(0), "weight_col": weight.stride(1)}
    arguments["bias_stride"] = bias.stride(0) if bias is not None else 0
    for slot in range(2):
        # Of Adam's state the third tensor is the step count, which `rules.numbers` sees to.
        state = weight_state[slot] if slot < len(weight_state) else None
        row, column = state.stride() if state is not None else (0, 0)
        name = f"weight_state{slot}"
        arguments |= {name: state, f"{name}_row": row, f"{name}_col": column}
        state = bias_state[slot] if slot < len(bias_state) else None
        name = f"bias_state{slot}"
        arguments |= {name: state, f"{name}_stride": state.stride(0) if state is not None else 0}
    arguments |= rules.numbers("weight", update.rule, update.weight)
    arguments |= rules.numbers("bias", update.rule if bias is not None else "grad", update.bias)
    return Parameters(arguments, rules.compiled(update))
