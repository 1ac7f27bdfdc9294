"""A network's step, or its forward pass, where nothing has changed since the last one: kept plans, one by one.

Whatever is not so, or is wrong, makes of it a step or a pass that `FFNetwork` checks anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import interrupts, ops, optim
from .. import validation as check
from ..autograd import is_transformed, without_autocast
from ..backends import select
from ..functional import StepResult
from ..functional.plan import OF_LAYER, Forward, Moment, forward_plan, kept_plan
from ..functional.rows import checked_rows
from ..functional.step import Planned, run, run_together
from ..spec import Rows
from .layer import FFLinear, watched
from .stack import Layer

# A program may put another in its place, to measure it say.
OWN_STEP, OWN_ACTIVITY, OWN_RUN = FFLinear.step, FFLinear.activity, FFLinear._run
# Methods that make of a layer something else where an object has its own.
REPLACED = frozenset({"step", "forward", "activity", "goodness", "__call__"})
# Options of a network's step under which it may be one of these.
OPTIONS = frozenset({"sample_weight", "skip_below", "labels"})
_OPTIONS_OF = itemgetter(*OF_LAYER, "outputs")
# Steps with more of them take so long that a call for each layer is nothing beside it.
FEW_ACTIVITIES = 1 << 18

_forward: WeakKeyDictionary[Layer, Forward] = WeakKeyDictionary()


def step(
    layers: Sequence[Layer],
    x_pos: Tensor,
    x_neg: Tensor | None,
    optimizers: Sequence[Optimizer | None],
    *,
    keep: bool,
    skip_below: float = 0.0,
    product: Tensor | None = None,
    **of_rows: Any,
) -> list[StepResult] | None:
    """`FFNetwork.step` of linear layers with nothing between them, or None before anything is written."""
    if torch.compiler.is_compiling() or not isinstance(x_pos, Tensor) or FFLinear.step is not OWN_STEP:
        return None
    stack: list[Planned] = []
    moment = Moment(x_pos.device)
    try:
        for layer, optimizer in zip(layers, optimizers, strict=True):
            ends, shares = not keep and layer is layers[-1], product is not None and not stack
            planned = _planned(layer, optimizer, ends, skip_below, shares, moment)
            if planned is None:
                return None
            stack.append(planned)
        rows = _rows(stack, x_pos, x_neg, product=product, **of_rows)
    except (TypeError, ValueError, KeyError):
        return None
    return None if rows is None else _climb(stack, rows, keep)


def _planned(
    layer: Layer, optimizer: Optimizer | None, ends: bool, skip_below: float, shares: bool, moment: Moment
) -> Planned | None:
    """`ends`: whether nobody takes what the layer would hand on."""
    if optimizer is None or type(optimizer) not in optim.FUSED or type(layer) is not FFLinear:
        return None
    plain = _plain(layer)
    if plain is None:
        return None
    weight, bias = plain
    *of_layer, outputs = _OPTIONS_OF(vars(layer))
    if outputs == "none" and not ends:
        return None
    options = (*of_layer, "none" if ends else outputs, skip_below, shares, None)
    peer_mean = None if layer.peer is None else layer.peer_mean
    kept = kept_plan(weight, bias, optimizer, peer_mean, options, moment)
    return None if kept is None or not kept.plan.is_whole else Planned(kept.plan, kept.options, optimizer)


def _plain(layer: FFLinear) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that is nothing but its closed form, or None."""
    own = vars(layer)
    parameters = own["_parameters"]
    weight = parameters.get("weight")
    if any(own["_modules"].values()) or watched(layer) or not own.keys().isdisjoint(REPLACED) or weight is None:
        return None
    return (weight, parameters["bias"]) if len(parameters) == 2 else None


class Passed(NamedTuple):
    """What a forward pass leaves.

    Attributes:
        activities: of every layer `[rows, out]`, and their sums of squares `[rows]`.
        product: `shared_product` of the first layer, or None.
    """

    activities: list[tuple[Tensor, Tensor]]
    product: Tensor | None


def forward(
    layers: Iterable[Layer], x: Tensor, product: Tensor | None, label_field: int, leaves_product: bool = False
) -> Passed | None:
    """A forward pass of linear layers with nothing between them, without autograd.

    `product`, `label_field`: as in `linear_forward`, of the first layer. `leaves_product`: the product is made on the
    way.

    Returns:
        None where a layer is something else, where no product can be left, or where something is wrong.
    """
    replaced = FFLinear.activity is not OWN_ACTIVITY or FFLinear._run is not OWN_RUN
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or replaced or not isinstance(x, Tensor):
        return None
    moment, passed = Moment(x.device), Passed([], product)
    sumsq = None
    try:
        for layer in layers:
            plain = _plain(layer) if type(layer) is FFLinear else None
            if plain is None:
                return None
            weight, bias = plain
            plan = forward_plan(_forward.get(layer), weight, bias, layer._options(), product is not None, moment)
            _forward[layer] = plan
            check.rows_of("x", x, weight, plan.layer.compute_dtype)
            leaves = leaves_product and sumsq is None
            if leaves and not _leaves_product(plan, label_field):
                return None
            field = check.label_field(label_field, weight, x, None) if product is not None or leaves else 0
            check.shared_product(product, field, len(x), weight)
            if is_transformed(x, weight, bias) or (sumsq is not None and sumsq.dtype != weight.dtype):
                return None
            rows = Rows(x, x[:0], None, sumsq, None, product, field)
            with without_autocast(weight.device):
                if leaves:
                    shape = len(x), len(weight)
                    passed = passed._replace(product=weight.new_empty(shape))
                    x, sumsq = weight.new_empty(shape), weight.new_empty(len(x))
                    ops.linear_forward_(rows, plan.layer, x, sumsq, plan.chosen, product_out=passed.product)
                else:
                    x, sumsq = ops.linear_forward(rows, plan.layer, True, plan.chosen)
            passed.activities.append((x, sumsq))
            product = None
    except (TypeError, ValueError):
        return None
    return passed


def _leaves_product(plan: Forward, label_field: int) -> bool:
    layer = plan.layer
    is_float32 = layer.compute_dtype == layer.weight.dtype == torch.float32 and layer.precision == "highest"
    return is_float32 and label_field <= select.LEAVES_PRODUCT.get(plan.chosen, -1)


def _rows(
    stack: Sequence[Planned],
    x_pos: Tensor,
    x_neg: Tensor | None,
    *,
    product: Tensor | None,
    label_field: int | None = None,
    sample_weight: Tensor | None = None,
    labels: Tensor | None = None,
) -> Rows | None:
    """The rows of the first layer, checked; None where those that layers hand on might not fit the next one."""
    first = stack[0].plan.layer
    objective = stack[0].options.objective
    rows = checked_rows(
        first.weight,
        first.compute_dtype,
        objective,
        x_pos,
        x_neg,
        None,
        None,
        sample_weight,
        product,
        label_field,
        labels,
    )
    n_pos, n_neg = x_pos.shape[0], rows.x_neg.shape[0]
    if is_transformed(x_pos, rows.x_neg, *[p for of in stack for p in of.plan.layer[:2]]):
        return None
    below = None
    for plan, options, _ in stack:
        layer, objective = plan.layer, options.objective
        if plan.goal.threshold is not None or (objective.paired and n_pos != n_neg):
            return None
        if below is not None:
            if layer.weight.shape[1] != below.weight.shape[0] or layer.weight.device != below.weight.device:
                return None
            if below.compute_dtype not in (layer.weight.dtype, layer.compute_dtype):
                return None
            if (objective.classes is None) != (labels is None):
                return None
            if sample_weight is not None:
                check.sample_weight(sample_weight, objective, n_pos + n_neg, layer.weight)
            if objective.classes is not None:
                check.labels(labels, n_pos, objective.classes, layer.weight.device)
        below = layer
    peer_mean = stack[0].plan.pull.mean
    check.apart(first.weight, first.bias, peer_mean, x_pos, rows.x_neg, product, {})
    return rows


def _climb(stack: Sequence[Planned], rows: Rows, keep: bool) -> list[StepResult]:
    n_pos = rows.x_pos.shape[0]
    results: list[StepResult] = []
    held = interrupts.hold()
    try:
        if _fit_one_call(stack, rows):
            return [made.result(n_pos, keep=keep) for made in run_together(stack, rows)]
        with torch.no_grad(), without_autocast(rows.x_pos.device):
            for planned in stack:
                made = run(planned, rows)
                results.append(made.result(n_pos, keep=keep))
                if made.y is not None and planned is not stack[-1]:
                    rows = ops.rows_above(rows, made.y, made.sumsq)
    finally:
        interrupts.release(held)
    return results


def _fit_one_call(stack: Sequence[Planned], rows: Rows) -> bool:
    """Whether all activities are few enough to be in memory at once, and one call can take all steps."""
    weights = []
    for plan, _, _ in stack:
        if plan.prepared is None:
            return False
        weights.append(plan.layer.weight)
    units = sum([weight.shape[0] for weight in weights])
    total = rows.x_pos.shape[0] + rows.x_neg.shape[0]
    return total * units <= FEW_ACTIVITIES and not ops.are_followed(rows.x_pos, rows.x_neg, *weights)
