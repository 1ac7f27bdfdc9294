"""One step of a layer: what was checked once is kept, what comes with each call is checked, and the operator runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import interrupts, ops
from .. import validation as check
from ..autograd import is_transformed, without_autocast
from ..compiling import never_compiled
from ..objectives import DEFAULT_OBJECTIVE, AnyObjective, GivenLoss, ProjectionHead, any_objective, move
from ..peer import PeerNormalisation
from ..spec import Activation, EpsMode, Layer, LayerStep, Norm, Outputs, OutputsOf, Rows
from . import plan as plans
from .loss import sides_in_order
from .plan import Options, Plan
from .result import StepResult
from .rows import checked_rows
from .stages import step_by_stages

# What a forward pass after an update makes do with where there is no memory for all rows at once.
FEW_ROWS = 64


def linear_step_(
    x_pos: Tensor,
    x_neg: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer | None,
    *,
    objective: AnyObjective | Callable[..., Tensor] = DEFAULT_OBJECTIVE,
    norm: Norm = "l2",
    eps: float = 1e-4,
    eps_mode: EpsMode = "add",
    activation: Activation = "relu",
    outputs: OutputsOf = "post",
    compute_dtype: torch.dtype | None = None,
    sample_weight: Tensor | None = None,
    is_positive: Tensor | None = None,
    labels: Tensor | None = None,
    input_sumsq: Tensor | None = None,
    skip_below: float = 0.0,
    label_field: int | None = None,
    product: Tensor | None = None,
    peer: PeerNormalisation | None = None,
    peer_mean: Tensor | None = None,
    batch_norm: nn.BatchNorm1d | None = None,
    backend: str | None = None,
    only_checks: bool = False,
) -> StepResult:
    """One Forward-Forward step of one linear layer: updates `weight` and `bias` in place, without autograd.

    With `r_i` the scale that normalises row `x_i`: `z_i = r_i W x_i + b`, `y_i = act(z_i)`, `q_i = sum_j y_ij^2`; the
    objective makes the row coefficient `c_i = 2 dLoss/dq_i` from `q`, and then
    `dW = sum_i c_i r_i (y_i act'(z_i)) x_i^T`, `db = sum_i c_i (y_i act'(z_i))` go into the optimizer's rule
    (Hinton, "The Forward-Forward Algorithm", 2022); with classes there is a `c_ik` for each group, with a head
    `dy = e W`. Rows with `c_i` exactly zero, which are most rows once a sum goodness saturates, are left out of the
    update's product; that changes nothing but the time.

    Args:
        x_pos: `[n_pos, in]` un-normalised positive rows, in the weight's dtype or the compute dtype.
        x_neg: `[n_neg, in]` negative rows; None with `is_positive`, and with an objective of classes.
        weight: `[out, in]` float32 or float64 parameter.
        bias: `[out]` parameter, or None.
        optimizer: the `torch.optim` object that holds both. SGD, SGDW, Adam and AdamW run fused on its own state; any
            other whose `step()` runs on `.grad` alone gets that filled and is called. None: only `.grad` is filled,
            with the gradient of this batch alone; what it held is replaced, not added to as in `backward()`.
        objective: goodness, threshold and loss; a `ProjectionHead`, whose matrix the optimizer must hold too; or a
            loss of your own, `GivenLoss`, or a function of goodness and side as it takes it.
        norm: "l2" (`norm(x)`), "rms" (`sqrt(mean x^2)`) or "none".
        eps: not below 0; `eps_mode` says where it goes: "add" `x / (norm + eps)`, "clamp" `x / max(norm, eps)`,
            "inside" `x / sqrt(norm^2 + eps)`. A row of zeros stays zero.
        activation: "relu", "leaky_relu" (0.01), "gelu" (exact), "silu" or "identity".
        outputs: which activities the result carries: "post", those after the update, "pre", those before it, or "none".
        compute_dtype: torch.bfloat16 or torch.float16: the products' operands are rounded to it, sums and masters stay
            float32. None: autocast's dtype where autocast is on, else the weight's.
        sample_weight: `[rows]` factors of the rows' losses, positives first (`[pairs]` for pair losses).
        is_positive: `[rows]` bool; `x_pos` is then the joint batch in any order.
        labels: `[rows]` int64 classes of the rows of `x_pos`, with an objective of classes, and only then. On a device
            their range is not checked: a label outside of it takes no part, and makes the loss NaN.
        input_sumsq: `[rows]` sums of squares of the input rows where they are known: `StepResult.sumsq` of the layer
            below.
        skip_below: leaves rows out of the update whose loss has a slope below this fraction of that of a row far on
            the wrong side (for the logistic loss: whose sigmoid is smaller). An approximation; 0 leaves out exact
            zeros only.
        label_field: how many of the first columns hold the label; outside them both sides have the same numbers, row
            by row, and share their products, to which each row adds its own label's (equally exact, whatever either
            label holds). None: on a CPU, that is found out. On a device it is not checked.
        product: `shared_product(x_pos, weight, label_field)` where it is there already.
        peer: peer normalisation, a regulariser that keeps the units about equally active.
        peer_mean: `[out]` its running mean activity, which the step moves; with `peer`, and only then.
        batch_norm: a `torch.nn.BatchNorm1d` behind the activation, of which the objective then reads, and which the
            result hands on; the optimizer must hold its weight and bias too. In train mode its statistics are those of
            the batch, both sides together, and the running ones move; "post" and `peer` do not go with it.
        backend: forces a backend; so does the environment variable FFKERNELS_BACKEND.
        only_checks: raises what a step would raise, and takes none; the result is empty.

    What can run out of memory has its memory before anything is written, and Ctrl-C waits until everything is: weight,
    bias, optimizer state and running mean are all old or all new.

    Raises:
        ValueError, TypeError: for an argument that does not fit, before anything is written.
    """
    compiling = torch.compiler.is_compiling()
    objective = any_objective(objective)
    if compiling and isinstance(objective, GivenLoss):
        return _step_never_compiled(
                x_pos, x_neg, weight, bias, optimizer, objective=objective, norm=norm, eps=eps, eps_mode=eps_mode,
                activation=activation, outputs=outputs, compute_dtype=compute_dtype, sample_weight=sample_weight,
                is_positive=is_positive, labels=labels, input_sumsq=input_sumsq, skip_below=skip_below,
                label_field=label_field, product=product, peer=peer, peer_mean=peer_mean, batch_norm=batch_norm,
                backend=backend, only_checks=only_checks,
            )  # fmt: skip
    options = Options(
        objective, norm, eps, eps_mode, activation, compute_dtype, peer, backend, outputs, skip_below,
        product is not None, batch_norm,
    )  # fmt: skip
    plan = plans.plan_for(weight, bias, optimizer, peer_mean, options)
    rows = checked_rows(
        weight, plan.layer.compute_dtype, objective, x_pos, x_neg, is_positive, input_sumsq, sample_weight, product,
        label_field, labels,
    )  # fmt: skip
    check.enough_for_statistics(batch_norm, x_pos.shape[0] + rows.x_neg.shape[0])
    n_pos = x_pos.shape[0]
    if not compiling:
        if is_transformed(x_pos, rows.x_neg, weight, bias):
            raise ValueError(
                "linear_step_ was called on tensors of a torch.func transform or with a forward-mode tangent, which a "
                "step in place cannot follow; accepted: plain tensors, or linear_forward and goodness_loss"
            )
        check.apart(weight, bias, peer_mean, x_pos, rows.x_neg, product, plans.others_of(objective, batch_norm))
    back = None
    if is_positive is not None and objective.paired:
        order, n_pos = sides_in_order(is_positive)
        known = None if input_sumsq is None else input_sumsq[order]
        rows = Rows(x_pos[order[:n_pos]], x_pos[order[n_pos:]], None, known, sample_weight)
        back = order.argsort()
    if only_checks:
        nothing = weight.new_empty(0)
        return StepResult(None, nothing, nothing, nothing, n_pos)

    # Autograd's and autocast's modes are given back before an interrupt is let through.
    held = None if compiling else interrupts.hold()
    try:
        with torch.no_grad(), without_autocast(weight.device):
            made = run(Planned(plan, options, optimizer), rows, back)
    finally:
        if held is not None:
            interrupts.release(held)
    return made.result(n_pos if is_positive is None else None, is_positive)


class Planned(NamedTuple):
    """A layer's step that is checked."""

    plan: Plan
    options: Options
    optimizer: Optimizer | None


class Made(NamedTuple):
    """What a step writes, and what its `StepResult` takes of it."""

    outputs: Outputs
    y: Tensor | None
    sumsq: Tensor
    goodness: Tensor
    loss: Tensor

    def result(self, n_pos: int | None, is_positive: Tensor | None = None, *, keep: bool = True) -> StepResult:
        """The step's result; `keep`: with its activities."""
        return StepResult(self.y if keep else None, self.sumsq, self.goodness, self.loss, n_pos, is_positive)


def run(planned: Planned, rows: Rows, back: Tensor | None = None) -> Made:
    """Takes a step that is checked.

    Runs without autograd and autocast, with SIGINT held. `back`: indices that bring what belongs to rows into the order
    in which they came.
    """
    plan, options, _ = planned
    layer, made = plan.layer, _made_for(planned, rows.x_pos.shape[0] + rows.x_neg.shape[0])
    written, y, after, goodness, _ = made
    outcome = (after, goodness) if y is None else (after, goodness, y)
    in_order = [] if back is None else [torch.empty_like(t) for t in outcome]
    standardised = None
    if plan.is_whole:
        update = plan.update.record
        ops.linear_step_(rows, layer, plan.goal, plan.pull, update, written, plan.chosen, plan.prepared)
    else:
        standardised = step_by_stages(
            rows, layer, options.objective, plan.goal, plan.pull, plan.update.record, plan.update.others, written,
            plan.chosen, options.batch_norm,
        )  # fmt: skip
    torch.autograd.graph.increment_version(plan.written)
    _finish(planned, made)
    if options.batch_norm is not None and standardised is not None:
        move(options.batch_norm, standardised)
    if y is not None and options.outputs == "post" and not plan.hands_out_all:
        now = layer if written.rounded is None else layer._replace(weight=written.rounded)
        _forward_after(rows, now, y, after, plan.chosen)
    if back is None:
        return made
    for found, into in zip(outcome, in_order, strict=True):
        torch.index_select(found, 0, back, out=into)
    return made._replace(sumsq=in_order[0], goodness=in_order[1], y=None if y is None else in_order[2])


def run_together(stack: Sequence[Planned], rows: Rows) -> list[Made]:
    """As `run`, a step of each of several layers, prepared ones of one backend, on what the one below hands on."""
    made, steps, written = list[Made](), list[LayerStep](), list[Tensor]()
    total = rows.x_pos.shape[0] + rows.x_neg.shape[0]
    for planned in stack:
        plan, left = planned.plan, _made_for(planned, total)
        made.append(left)
        steps.append(LayerStep(plan.layer, plan.goal, plan.pull, plan.update.record, left.outputs, plan.prepared))
        written += plan.written
    # Before: without memory for one of them, those below it are written.
    torch.autograd.graph.increment_version(written)
    ops.linear_steps_(rows, steps, stack[0].plan.chosen)
    for planned, left in zip(stack, made, strict=True):
        _finish(planned, left)
    return made


def _made_for(planned: Planned, total: int) -> Made:
    """Memory for what a step on so many rows leaves."""
    plan, options, _ = planned
    layer, objective, outputs = plan.layer, options.objective, options.outputs
    at_once, weight, classes = plan.hands_out_all, layer.weight, objective.classes
    new = weight.new_empty
    y = new(total, weight.shape[0], dtype=layer.compute_dtype) if outputs != "none" else None
    sumsq, loss = new(total), new(())
    if classes is not None:
        goodness = new(total, classes)
    else:
        # The sums before the update are nobody's where those after it are handed out.
        goodness = sumsq if objective.goodness == "sum" or outputs == "post" else new(total)
    # Roots are PyTorch's, as everywhere, and may differ from a correctly rounded one in the last bit.
    goodness_out = goodness if classes is not None or (at_once and objective.goodness != "norm") else None
    if outputs != "post":
        return Made(Outputs(y, sumsq, loss, None, goodness_out), y, sumsq, goodness, loss)
    after = new(total)
    if at_once:
        written = Outputs(None, sumsq, loss, None, goodness_out, y, after)
    else:
        written = Outputs(None, sumsq, loss, plans.rounded(plan), goodness_out)
    return Made(written, y, after, goodness, loss)


def _finish(planned: Planned, made: Made) -> None:
    """What is left to do once the operator has run, but for a forward pass after the update."""
    plan, options, optimizer = planned
    plan.update.finish(optimizer)
    objective, outputs = options.objective, made.outputs
    if outputs.goodness_out is None and not isinstance(objective, ProjectionHead):
        objective.goodness_of(outputs.sumsq, plan.layer.weight.shape[0], out=made.goodness)


@never_compiled("a loss of your own runs in plain PyTorch, with a backward of its own in the middle of the step")
def _step_never_compiled(*tensors: Any, **options: Any) -> StepResult:
    return linear_step_(*tensors, **options)


def _forward_after(rows: Rows, layer: Layer, y: Tensor, sumsq: Tensor, backend: str) -> None:
    """`linear_forward_` once the weights are written, where an error would lose a step: few rows need little memory."""
    try:
        ops.linear_forward_(rows._replace(product=None), layer, y, sumsq, backend)
        return
    except (MemoryError, RuntimeError):
        if torch.compiler.is_compiling():
            raise
    at = 0
    for x in (*rows.x_pos.split(FEW_ROWS), *rows.x_neg.split(FEW_ROWS)):
        part = slice(at, at := at + len(x))
        known = None if rows.input_sumsq is None else rows.input_sumsq[part]
        few = Rows(x, x[:0], input_sumsq=known)
        ops.linear_forward_(few, layer, y[part], sumsq[part], backend)
