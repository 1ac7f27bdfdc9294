"""From tensors to launches: what each kernel is given, on how large a grid, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, rules
from .coefficient import coefficient_kernel
from .finish import finish_kernel
from .forward import forward_kernel
from .support import interpreted
from .update import update_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# From this many rows on, rounding the weight once costs less than rounding its tiles for every block of rows.
ROUND_WEIGHT_ROWS = 512
# The list of rows in doubt costs one program a walk over the rows, and may save most of the update's product.
LIST_ROWS = 512
LIST_ELEMENTS = 1 << 20
# Up to this many column blocks are added in every program of the update; more are added once, for the list.
PARTIALS_ON_THE_FLY = 64
LIST_BLOCK = {False: 1024, True: 16}
FINISH_BLOCK = {False: {"BLOCK_OUT": 16, "BLOCK_IN": 128}, True: {"BLOCK_OUT": 16, "BLOCK_IN": 16}}
# A split of the batch has at least this many blocks of rows.
MIN_BLOCKS_PER_SPLIT = 4


class Rows(NamedTuple):
    """The joint batch: both sides with the same column stride, and the rows' sums of squares where they are known."""

    x_pos: Tensor
    x_neg: Tensor
    sumsq: Tensor | None

    @property
    def total(self) -> int:
        return self.x_pos.shape[0] + self.x_neg.shape[0]

    def arguments(self) -> dict[str, Any]:
        return {
            "x_pos": self.x_pos,
            "x_neg": self.x_neg,
            "n_pos": self.x_pos.shape[0],
            "rows": self.total,
            "x_pos_row": self.x_pos.stride(0),
            "x_neg_row": self.x_neg.stride(0),
            "x_col": self.x_pos.stride(1),
        }


class Layer(NamedTuple):
    """How rows turn into activities."""

    weight: Tensor
    bias: Tensor | None
    norm: str
    eps: float
    eps_mode: str
    activation: str
    compute_dtype: torch.dtype

    @property
    def keeps_z(self) -> bool:
        """Whether the activation's slope needs `z`; of the others `y` is enough."""
        return self.activation in ("gelu", "silu")

    def scales_first(self, rows: Rows) -> bool:
        """Whether rows are scaled before they are rounded: float16 has no room for rows of any length."""
        return self.norm != "none" and self.compute_dtype == torch.float16 and rows.x_pos.dtype == torch.float32

    def arithmetic(self) -> dict[str, Any]:
        """Constants of the products."""
        precision = "ieee"
        # On AMD devices TF32 is emulated where it exists at all.
        if torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32":
            precision = "tf32"
        return {
            "COMPUTE": DTYPES[self.compute_dtype],
            "PRECISION": precision,
            "WIDEN": interpreted() and self.compute_dtype == torch.bfloat16,
        }


class Activities(NamedTuple):
    """What a forward leaves for the update; `kept` is `y`, or `z` where the slope needs it."""

    kept: Tensor
    row_scale: Tensor | None
    partials: Tensor


def joint(x_pos: Tensor, x_neg: Tensor, sumsq: Tensor | None) -> Rows:
    """The joint batch as the kernels take it; sides whose column strides differ are copied."""
    if x_pos.stride(1) != x_neg.stride(1) and x_neg.shape[0]:
        x_pos, x_neg = x_pos.contiguous(), x_neg.contiguous()
    return Rows(x_pos, x_neg, vector(sumsq))


def vector(values: Tensor | None) -> Tensor | None:
    """A vector as the kernels take it: without gaps."""
    return None if values is None else values.contiguous()


def kind_of(compute_dtype: torch.dtype, *operands: Tensor) -> str:
    """Which of `configs.KINDS` a product is."""
    if compute_dtype == torch.float32:
        return "float32"
    return "half" if all(t.dtype == compute_dtype for t in operands) else "mixed"


def forward(rows: Rows, layer: Layer, y: Tensor | None, z: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """Launches the forward, which writes what it is given; returns sums of squares `[column blocks, rows]`."""
    weight = layer.weight
    if layer.compute_dtype != weight.dtype and rows.total >= ROUND_WEIGHT_ROWS:
        weight = weight.to(layer.compute_dtype)
    out_features, in_features = weight.shape
    kind = kind_of(layer.compute_dtype, rows.x_pos, weight)
    config = configs.choose("forward", kind, (rows.total, in_features, out_features), weight.device)
    column_blocks = triton.cdiv(out_features, config["BLOCK_N"])
    partials = weight.new_empty(column_blocks, rows.total, dtype=torch.float32)
    grid = (triton.cdiv(rows.total, config["BLOCK_M"]) * column_blocks,)
    if not grid[0]:
        return partials
    with _device_of(weight):
        forward_kernel[grid](
            **rows.arguments(),
            input_sumsq=rows.sumsq if layer.norm != "none" else None,
            weight=weight,
            bias=layer.bias,
            y=y,
            kept=z,
            row_scale=row_scale,
            partials=partials,
            in_features=in_features,
            out_features=out_features,
            weight_row=weight.stride(0),
            weight_col=weight.stride(1),
            bias_stride=layer.bias.stride(0) if layer.bias is not None else 0,
            y_row=y.stride(0) if y is not None else 0,
            y_col=y.stride(1) if y is not None else 0,
            eps=layer.eps,
            NORM=layer.norm,
            EPS_MODE=layer.eps_mode,
            ACTIVATION=layer.activation,
            SCALE_FIRST=layer.scales_first(rows),
            **layer.arithmetic(),
            **config,
        )
    return partials


class Terms(NamedTuple):
    """What turns sums of squares into coefficients: tensors and numbers for `row_terms`, and its constants."""

    arguments: dict[str, Any]
    constants: dict[str, Any]


def terms(
    rows: Rows,
    is_positive: Tensor | None,
    sample_weight: Tensor | None,
    goodness: str,
    threshold_pos: float,
    threshold_neg: float,
    threshold: Tensor | None,
    loss: str,
    maximize: bool,
    reduction: str,
    temperature: float,
    alpha: float,
) -> Terms:
    """The objective as `coefficient.row_terms` takes it."""
    paired = loss != "logistic"
    n_pos, n = rows.x_pos.shape[0], rows.total
    n_positive = None
    if paired:
        counts = (n_pos, n_pos)
    elif reduction == "mean":
        counts = (n, n)
    else:
        counts = (n_pos, n - n_pos)
        if is_positive is not None:
            # How many rows a mask marks is known on the device only, and stays there.
            n_positive = is_positive.sum()
    if threshold is not None and threshold.device != rows.x_pos.device:
        threshold_pos = threshold_neg = float(threshold)
        threshold = None
    arguments = {
        "is_positive": None if is_positive is None else is_positive.contiguous().view(torch.uint8),
        "n_positive": n_positive,
        "sample_weight": vector(sample_weight),
        "threshold": vector(threshold),
        "threshold_pos": threshold_pos,
        "threshold_neg": threshold_neg,
        "logit_scale": (alpha if paired else 1.0 / temperature) * (1.0 if maximize else -1.0),
        "share_pos": 1.0 / max(counts[0], 1),
        "share_neg": 1.0 / max(counts[1], 1),
    }
    constants = {
        "GOODNESS": goodness,
        "LOSS": loss,
        "THRESHOLD_PER_ROW": threshold is not None and threshold.dim() == 1,
    }
    return Terms(arguments, constants)


def update(
    rows: Rows,
    layer: Layer,
    activities: Activities,
    terms: Terms,
    rule: str,
    parameters: dict[str, Any],
    sumsq: Tensor,
    loss: Tensor,
) -> None:
    """Launches the update: after the list of rows in doubt where that pays, split where its tiles are too few."""
    weight, kept = layer.weight, activities.kept
    out_features, in_features = weight.shape
    kind = "float32" if layer.compute_dtype == torch.float32 else kind_of(layer.compute_dtype, rows.x_pos)
    config = configs.choose("update", kind, (rows.total, in_features, out_features), weight.device)
    n_partials = activities.partials.shape[0]
    splits = count_splits(
        triton.cdiv(out_features, config["BLOCK_OUT"]) * triton.cdiv(in_features, config["BLOCK_IN"]),
        triton.cdiv(rows.total, config["BLOCK_K"]),
        processors(weight.device),
    )
    index = coefficient = count = partial_weight = partial_bias = None
    partial_loss = loss
    with _device_of(weight):
        listed = lists_rows(rows.total, in_features, out_features, n_partials)
        if listed:
            index = weight.new_empty(rows.total, dtype=torch.int32)
            coefficient = weight.new_empty(rows.total)
            count = weight.new_empty((), dtype=torch.int32)
            coefficient_kernel[(1,)](
                **terms.arguments,
                partials=activities.partials,
                n_partials=n_partials,
                n_pos=rows.x_pos.shape[0],
                rows=rows.total,
                width=out_features,
                sumsq=sumsq,
                loss=loss,
                index=index,
                coefficient=coefficient,
                count=count,
                **terms.constants,
                BLOCK=LIST_BLOCK[interpreted()],
                num_warps=8,
            )
        if splits > 1:
            partial_weight = weight.new_empty(splits, out_features, in_features)
            partial_bias = weight.new_empty(splits, out_features) if layer.bias is not None else None
            partial_loss = weight.new_empty(splits)
        blocks_out = triton.cdiv(out_features, config["BLOCK_OUT"])
        # Without a bias one program more than there are tiles is enough: the one that sums up the loss.
        row_programs = blocks_out if layer.bias is not None else 1
        grid = (blocks_out * triton.cdiv(in_features, config["BLOCK_IN"]) + row_programs, splits)
        update_kernel[grid](
            **rows.arguments(),
            kept=kept,
            row_scale=activities.row_scale,
            in_features=in_features,
            out_features=out_features,
            kept_row=kept.stride(0),
            kept_col=kept.stride(1),
            index=index,
            coefficient=coefficient,
            count=count,
            partials=activities.partials,
            n_partials=n_partials,
            **terms.arguments,
            sumsq=sumsq,
            loss=partial_loss,
            **parameters,
            partial_weight=partial_weight,
            partial_bias=partial_bias,
            RULE=rule,
            ACTIVATION=layer.activation,
            **terms.constants,
            PARTIALS=triton.next_power_of_2(n_partials) if not listed else 0,
            HAS_BIAS=layer.bias is not None,
            SCALE_X=layer.scales_first(rows),
            **layer.arithmetic(),
            **config,
        )
        if splits > 1:
            block = FINISH_BLOCK[interpreted()]
            tiles = triton.cdiv(out_features, block["BLOCK_OUT"]) * triton.cdiv(in_features, block["BLOCK_IN"])
            finish_kernel[(tiles + triton.cdiv(out_features, block["BLOCK_OUT"]),)](
                partial_weight=partial_weight,
                partial_bias=partial_bias,
                partial_loss=None if listed else partial_loss,
                loss=loss,
                splits=splits,
                in_features=in_features,
                out_features=out_features,
                **parameters,
                RULE=rule,
                HAS_BIAS=layer.bias is not None,
                **block,
            )


def parameter_arguments(
    rule: str,
    weight: Tensor,
    weight_state: list[Tensor],
    weight_hyper: list[float],
    weight_lr: Tensor | None,
    bias: Tensor | None,
    bias_state: list[Tensor],
    bias_hyper: list[float],
    bias_lr: Tensor | None,
) -> dict[str, Any]:
    """Parameters, their state and the rule's numbers. Counts Adam's step."""
    arguments: dict[str, Any] = {"weight": weight, "bias": bias}
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
    arguments |= rules.numbers("weight", rule, weight_state, weight_hyper, weight_lr)
    return arguments | rules.numbers("bias", rule if bias is not None else "grad", bias_state, bias_hyper, bias_lr)


def lists_rows(rows: int, in_features: int, out_features: int, n_partials: int) -> bool:
    """Whether a launch of its own makes the coefficients once and lists the rows in doubt."""
    pays = rows >= LIST_ROWS and in_features * out_features >= LIST_ELEMENTS
    return pays or n_partials > PARTIALS_ON_THE_FLY


def count_splits(tiles: int, row_blocks: int, programs: int) -> int:
    """In how many parts the batch goes through the update so that `programs` programs can run at a time."""
    return max(1, min(programs // tiles, row_blocks // MIN_BLOCKS_PER_SPLIT))


@lru_cache
def processors(device: torch.device) -> int:
    """Processors of a device; the interpreter's one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@contextmanager
def _device_of(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors' own."""
    if tensor.device.type != "cuda":
        yield
        return
    with torch.cuda.device(tensor.device):
        yield
