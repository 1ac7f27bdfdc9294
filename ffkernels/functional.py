"""The public functions: check the arguments, choose a backend, call the operator, hand back the result."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import interrupts, ops, optim
from . import peer as peers
from . import validation as check
from .autograd import GivenSlope, LinearForward, in_plain_operations, is_transformed, without_autocast
from .backends import select
from .backends.eager.products import Products
from .objective import Objective
from .peer import PeerNormalisation

DEFAULT_OBJECTIVE = Objective()
# What a forward pass after an update makes do with where there is no memory for all rows at once.
FEW_ROWS = 64


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a layer step leaves behind; device tensors, none of them with a gradient.

    Attributes:
        y: `[rows, out]` activities of the joint batch: recomputed with the updated weights (`outputs="post"`), those
            before the update ("pre"), or None ("none"). In the compute dtype.
        sumsq: `[rows]` sums of squares of `y`'s rows (of the activities before the update where `y` is None);
            the next layer's `input_sumsq`.
        goodness: `[rows]` goodness before the update.
        loss: 0-dim, before the update.
        n_pos: how many rows are positive; None where `is_positive` says it.
        is_positive: `[rows]` as it came, or None: then the first `n_pos` rows are positive.
    """

    y: Tensor | None
    sumsq: Tensor
    goodness: Tensor
    loss: Tensor
    n_pos: int | None
    is_positive: Tensor | None = None

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Positive and negative rows of `values` `[rows, ...]`. With `is_positive`, picking waits for the device."""
        check.tensor("values", values)
        if self.is_positive is not None:
            return values[self.is_positive], values[~self.is_positive]
        return values[: self.n_pos], values[self.n_pos :]

    @property
    def pos(self) -> Tensor | None:
        """`[n_pos, out]` activities of the positive rows."""
        return None if self.y is None else self.sides(self.y)[0]

    @property
    def neg(self) -> Tensor | None:
        """`[n_neg, out]` activities of the negative rows."""
        return None if self.y is None else self.sides(self.y)[1]

    @property
    def goodness_pos(self) -> Tensor:
        """`[n_pos]` goodness of the positive rows."""
        return self.sides(self.goodness)[0]

    @property
    def goodness_neg(self) -> Tensor:
        """`[n_neg]` goodness of the negative rows."""
        return self.sides(self.goodness)[1]


def linear_step_(
    x_pos: Tensor,
    x_neg: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer | None,
    *,
    objective: Objective = DEFAULT_OBJECTIVE,
    norm: str = "l2",
    eps: float = 1e-4,
    eps_mode: str = "add",
    activation: str = "relu",
    outputs: str = "post",
    compute_dtype: torch.dtype | None = None,
    sample_weight: Tensor | None = None,
    is_positive: Tensor | None = None,
    input_sumsq: Tensor | None = None,
    skip_below: float = 0.0,
    label_field: int | None = None,
    product: Tensor | None = None,
    peer: PeerNormalisation | None = None,
    peer_mean: Tensor | None = None,
    backend: str | None = None,
    only_checks: bool = False,
) -> StepResult:
    """One Forward-Forward step of one linear layer: updates `weight` and `bias` in place, without autograd.

    With `r_i` the scale that normalises row `x_i`: `z_i = r_i W x_i + b`, `y_i = act(z_i)`, `q_i = sum_j y_ij^2`; the
    objective makes the row coefficient `c_i = 2 dLoss/dq_i` from `q`, and then
    `dW = sum_i c_i r_i (y_i act'(z_i)) x_i^T`, `db = sum_i c_i (y_i act'(z_i))` go into the optimizer's rule
    (Hinton, "The Forward-Forward Algorithm", 2022). Rows with `c_i` exactly zero, which are most rows once a sum
    goodness saturates, are left out of the update's product; that changes nothing but the time.

    Args:
        x_pos: `[n_pos, in]` un-normalised positive rows, in the weight's dtype or the compute dtype.
        x_neg: `[n_neg, in]` negative rows; None with `is_positive`.
        weight: `[out, in]` float32 or float64 parameter.
        bias: `[out]` parameter, or None.
        optimizer: the `torch.optim` object that holds both. SGD, SGDW, Adam and AdamW run fused on its own state; any
            other whose `step()` runs on `.grad` alone gets that filled and is called. None: only `.grad` is filled,
            with the gradient of this batch alone; what it held is replaced, not added to as in `backward()`.
        objective: goodness, threshold and loss.
        norm: "l2" (`norm(x)`), "rms" (`sqrt(mean x^2)`) or "none".
        eps: >= 0; `eps_mode` says where it goes: "add" `x / (norm + eps)`, "clamp" `x / max(norm, eps)`,
            "inside" `x / sqrt(norm^2 + eps)`. A row of zeros stays zero.
        activation: "relu", "leaky_relu" (0.01), "gelu" (exact), "silu" or "identity".
        outputs: "post", "pre" or "none": which activities the result carries.
        compute_dtype: torch.bfloat16 or torch.float16: the products' operands are rounded to it, sums and masters stay
            float32. None: autocast's dtype where autocast is on, else the weight's.
        sample_weight: `[rows]` factors of the rows' losses, positives first (`[pairs]` for pair losses).
        is_positive: `[rows]` bool; `x_pos` is then the joint batch in any order.
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
        backend: forces a backend; so does the environment variable FFKERNELS_BACKEND.
        only_checks: raises what a step would raise, and takes none; the result is empty.

    What can run out of memory has its memory before anything is written, and Ctrl-C waits until everything is: weight,
    bias, optimizer state and running mean are all old or all new.

    Raises:
        ValueError, TypeError: for an argument that does not fit, before anything is written.
    """
    compiling = torch.compiler.is_compiling()
    check.layer_options(norm, eps, eps_mode, activation)
    check.one_of("outputs", outputs, check.OUTPUTS)
    check.layer_tensors(weight, bias)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check.trainable(name, parameter)
        check.writable(name, parameter)
    compute = check.compute_dtype_of(compute_dtype, weight)
    check.rows_of("x_pos", x_pos, weight, compute)
    if (x_neg is None) != (is_positive is not None):
        came = "neither" if x_neg is None else "both"
        raise ValueError(f"of x_neg and is_positive came {came}; accepted: one of the two")
    if x_neg is None:
        x_neg = x_pos[:0]
    else:
        check.rows_of("x_neg", x_neg, weight, compute)
        if x_neg.dtype != x_pos.dtype:
            raise TypeError(f"x_neg is {x_neg.dtype}; accepted: {x_pos.dtype}, as x_pos is")
    n_pos, rows = x_pos.shape[0], x_pos.shape[0] + x_neg.shape[0]
    field = check.label_field(label_field, weight, x_pos, x_neg)
    check.shared_product(product, field, n_pos, weight)
    check.fraction("skip_below", skip_below)
    if is_positive is not None:
        check.vector("is_positive", is_positive, rows, torch.bool, weight.device)
    check.objective_for(objective, rows, n_pos if is_positive is None else None, weight)
    if sample_weight is not None:
        entries = rows // 2 if objective.paired else rows
        check.vector("sample_weight", sample_weight, entries, weight.dtype, weight.device)
        check.constant("sample_weight", sample_weight)
    if isinstance(objective.threshold, Tensor):
        check.constant("threshold", objective.threshold)
    if input_sumsq is not None:
        check.vector("input_sumsq", input_sumsq, rows, weight.dtype, weight.device)
    check.peer_normalisation(peer, peer_mean, weight)
    check.optimizer_object(optimizer)
    if not compiling:
        if is_transformed(x_pos, x_neg, weight, bias):
            raise ValueError(
                "linear_step_ was called on tensors of a torch.func transform or with a forward-mode tangent, which a "
                "step in place cannot follow; accepted: plain tensors, or linear_forward and goodness_loss"
            )
        check.apart(weight, bias, peer_mean, x_pos, x_neg, product)
    # State that is made in inference mode could not be written outside of it.
    with torch.inference_mode(False) if not compiling and torch.is_inference_mode_enabled() else nullcontext():
        update = optim.plan(optimizer, weight, bias)
    written = update.written() + ([] if peer_mean is None else [peer_mean])
    request = select.Request(
        weight.device, weight.dtype, compute, activation, objective.loss, update.rule, peers.gradient_of(peer),
        skips=skip_below > 0, shares=product is not None,
    )  # fmt: skip
    chosen = select.choose(request, backend)
    if chosen in select.WRITES_BY_TORCH and not compiling:
        check.writable_here(written)
    order = back = None
    if is_positive is not None and objective.paired:
        order, n_pos = _sides_in_order(is_positive)
        field, product = 0, None
        x_pos, x_neg = x_pos[order[:n_pos]], x_pos[order[n_pos:]]
        input_sumsq = None if input_sumsq is None else input_sumsq[order]
        back = order.argsort()
    if only_checks:
        nothing = weight.new_empty(0)
        return StepResult(None, nothing, nothing, nothing, n_pos)

    width = weight.shape[0]
    layer = (weight, bias, norm, float(eps), eps_mode, activation, compute)
    y = weight.new_empty(rows, width, dtype=compute) if outputs != "none" else None
    sumsq, loss = weight.new_empty(rows), weight.new_empty(())
    # The sums before the update are nobody's where those after it are handed out.
    goodness = sumsq if objective.goodness == "sum" or outputs == "post" else weight.new_empty(rows)
    after = weight.new_empty(rows) if outputs == "post" else sumsq
    outcome = (after, goodness) if y is None else (after, goodness, y)
    in_order = [] if back is None else [torch.empty_like(t) for t in outcome]
    rounded = None
    if outputs == "post" and compute != weight.dtype and update.rule != "grad" and chosen in select.TAKES_ROUNDED:
        rounded = weight.new_empty(weight.shape, dtype=compute)
    # Autograd's and autocast's modes are given back before an interrupt is let through.
    held = None if compiling else interrupts.hold()
    try:
        with torch.no_grad(), without_autocast(weight.device):
            ops.linear_step_(
                x_pos,
                x_neg,
                is_positive if order is None else None,
                input_sumsq,
                sample_weight,
                *layer,
                *objective.operands(),
                float(skip_below),
                product,
                field,
                *peers.operands(peer, peer_mean, width),
                *update.operands(),
                rounded,
                y if outputs == "pre" else None,
                sumsq,
                loss,
                chosen,
            )
            torch.autograd.graph.increment_version(written)
            update.finish()
            objective.goodness_of(sumsq, width, out=goodness)
            if y is not None and outputs == "post":
                now = weight if rounded is None else rounded
                _forward_after(compiling, x_pos, x_neg, input_sumsq, (now, *layer[1:], None, field), y, after, chosen)
            if back is not None:
                for found, into in zip(outcome, in_order, strict=True):
                    torch.index_select(found, 0, back, out=into)
                (after, goodness), y = in_order[:2], None if y is None else in_order[2]
    finally:
        if held is not None:
            interrupts.release(held)
    return StepResult(y, after, goodness, loss, n_pos if is_positive is None else None, is_positive)


def _forward_after(
    compiling: bool,
    x_pos: Tensor,
    x_neg: Tensor,
    input_sumsq: Tensor | None,
    layer: tuple[Any, ...],
    y: Tensor,
    sumsq: Tensor,
    backend: str,
) -> None:
    """`linear_forward_` once the weights are written, where an error would lose a step: few rows need little memory."""
    try:
        ops.linear_forward_(x_pos, x_neg, input_sumsq, *layer, y, sumsq, backend)
        return
    except (MemoryError, RuntimeError):
        if compiling:
            raise
    at = 0
    for x in (*x_pos.split(FEW_ROWS), *x_neg.split(FEW_ROWS)):
        part = slice(at, at := at + len(x))
        known = None if input_sumsq is None else input_sumsq[part]
        ops.linear_forward_(x, x[:0], known, *layer[:-1], 0, y[part], sumsq[part], backend)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "l2",
    eps: float = 1e-4,
    eps_mode: str = "add",
    activation: str = "relu",
    compute_dtype: torch.dtype | None = None,
    input_sumsq: Tensor | None = None,
    label_field: int | None = None,
    product: Tensor | None = None,
    copies: int = 1,
    keep: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = act(r W x + b)` `[rows, out]` in the compute dtype, and the sums of squares of its rows `[rows]`.

    The arguments are those of `linear_step_`, but weight and bias need be no leaves and may be frozen. Where they
    require a gradient, `y` and the sums carry one to weight and bias, by a closed-form backward that cannot be
    differentiated again and takes `y` as it is handed out, in the compute dtype. None reaches `x`, which is taken as
    detached: that no gradient flows to the layer below is the algorithm. With `product` there is no gradient: `x` is
    multiplied in its label field alone.
    Forward-mode tangents of weight and bias, and the transforms of `torch.func`, go through PyTorch's own operations.

    `copies`: `x` holds the same rows so many times, one copy below the other, under different labels. Where no gradient
    is asked for, the compiled CPU backend makes sure of that and multiplies what they share once; for others it is
    nothing. Without `keep` only the sums are wanted: `y` is `[0, out]`, and is written nowhere.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        RuntimeError: in a backward with `create_graph=True`.
    """
    check.layer_options(norm, eps, eps_mode, activation)
    check.layer_tensors(weight, bias)
    compute = check.compute_dtype_of(compute_dtype, weight)
    check.rows_of("x", x, weight, compute)
    if input_sumsq is not None:
        check.vector("input_sumsq", input_sumsq, x.shape[0], weight.dtype, weight.device)
    field = check.label_field(label_field, weight, x, None)
    check.shared_product(product, field, x.shape[0], weight)
    check.copies(copies, x.shape[0])
    check.boolean("keep", keep)
    request = select.Request(weight.device, weight.dtype, compute, activation, shares=product is not None)
    chosen = select.choose(request, backend)
    layer = (weight, bias, norm, float(eps), eps_mode, activation, compute)
    if not torch.compiler.is_compiling() and is_transformed(x, weight, bias):
        check.without_product(product)
        y, sumsq = in_plain_operations(x, input_sumsq, *layer)
        return y if keep else y[:0], sumsq
    if (
        product is None
        and torch.is_grad_enabled()
        and (weight.requires_grad or (bias is not None and bias.requires_grad))
    ):
        known = None if input_sumsq is None else input_sumsq.detach()
        y, sumsq = LinearForward.apply(x.detach(), known, *layer, chosen)
        return y if keep else y[:0], sumsq
    with torch.no_grad(), without_autocast(weight.device):
        once = x.shape[0] // copies
        sides = (x[:once], x[once:]) if chosen in select.FINDS_COPIES and copies > 1 else (x, x[:0])
        return ops.linear_forward(*sides, input_sumsq, *layer, product, field, keep, chosen)


@torch.no_grad()
def shared_product(
    x: Tensor, weight: Tensor, label_field: int = 10, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """`W x` `[rows, out]` without the first `label_field` columns: what rows that differ in their label have in common.

    Under any label `l` in that field, `W x_l = product + W_field l`. It belongs to the weight as it is now: a step that
    changes the weight makes it stale. In the weight's dtype; `x` `[rows, in]` is not normalised.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    check.layer_tensors(weight, None)
    compute = check.compute_dtype_of(compute_dtype, weight)
    check.rows_of("x", x, weight, compute)
    field = check.label_field(label_field, weight, x, None)
    products = Products(weight.device, weight.dtype, compute)
    with without_autocast(weight.device):
        rows, matrix = (products.operand(values[:, field:]) for values in (x, weight.detach()))
        return products.into(weight.new_empty(len(x), len(weight)), rows, matrix.t())


def finds_copies(weight: Tensor, compute_dtype: torch.dtype, activation: str, backend: str | None) -> bool:
    """Whether a forward pass runs on a backend that finds out by itself what `copies` of rows share."""
    request = select.Request(weight.device, weight.dtype, compute_dtype, activation)
    return select.choose(request, backend) in select.FINDS_COPIES


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
            order, n_pos = _sides_in_order(is_positive)
            values, counts = values[order], (n_pos, n_pos)
        else:
            counts = (is_positive.sum(), (~is_positive).sum())
        slope, loss = objective.slope_and_loss(values, is_positive, counts, sample_weight, threshold)
        if transformed:
            return loss
        if order is not None:
            slope = slope[order.argsort()]
    return GivenSlope.apply(goodness, slope, loss)


def explain(
    weight: Tensor,
    optimizer: Optimizer | None = None,
    *,
    objective: Objective = DEFAULT_OBJECTIVE,
    activation: str = "relu",
    compute_dtype: torch.dtype | None = None,
    peer: PeerNormalisation | None = None,
    skip_below: float = 0.0,
    backend: str | None = None,
) -> str:
    """Says which backend a layer step runs on, why each other one is passed over, and how the update runs.

    Raises:
        ValueError, TypeError: for an argument that does not fit, and where a forced backend cannot run it, as the step
            itself would.
    """
    check.layer_tensors(weight, None)
    check.optimizer_object(optimizer)
    check.objective_object(objective)
    check.one_of("activation", activation, check.ACTIVATIONS)
    check.peer_object(peer)
    compute = check.compute_dtype_of(compute_dtype, weight)
    rule, update = optim.fused_rule(optimizer, weight)
    if optimizer is not None and rule == "grad":
        optim.steps_on_gradients(optimizer)
    check.fraction("skip_below", skip_below)
    request = select.Request(
        weight.device,
        weight.dtype,
        compute,
        activation,
        objective.loss,
        rule,
        peers.gradient_of(peer),
        skips=skip_below > 0,
    )
    chosen = select.choose(request, backend)
    forced, source = select.forced_backend(backend)
    because = "first that can run it" if forced is None else f"forced by {source}"
    lines = [f"backend: {chosen} ({because}) for {weight.dtype} on {weight.device}, products in {compute}"]
    for name, reason in select.verdicts(request).items():
        if name != chosen:
            lines.append(f"  passed over: {name}: {reason or 'comes later in the order of preference'}")
    return "\n".join([*lines, f"update: {update}"])


def _sides_in_order(is_positive: Tensor) -> tuple[Tensor, int]:
    """Indices that put positives before negatives, each side in its order; and the number of positives."""
    positive, negative = is_positive.nonzero().squeeze(1), (~is_positive).nonzero().squeeze(1)
    if len(positive) != len(negative):
        raise ValueError(
            f"is_positive marks {len(positive)} positive and {len(negative)} negative rows, which a pair loss "
            "cannot pair; accepted: equally many"
        )
    return torch.cat([positive, negative]), len(positive)
