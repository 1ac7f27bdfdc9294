"""Modules: one Forward-Forward layer, and a stack of them that trains layer by layer without a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import functional, interrupts, negatives, optim
from . import validation as check
from .backends import select
from .functional import StepResult
from .given import GivenLoss
from .normalisation import row_scale
from .objective import DEFAULT_OBJECTIVE, Objective
from .peer import FIRST_MEAN, PeerNormalisation
from .spec import Activation, EpsMode, Norm, OutputsOf

# Rows times labels that a prediction works on at once.
PREDICTION_ROWS = 1280
# Options of a step that change the activities themselves.
FORWARD_OPTIONS = ("norm", "eps", "eps_mode", "activation", "compute_dtype", "backend")


class FFLinear(nn.Linear):
    """A linear layer `y = act(W normalise(x) + b)` that learns from its own goodness.

    Parameters, their initialisation and their names in `state_dict` are those of `torch.nn.Linear`. The options are
    those of `linear_step_`, and plain attributes: they can be changed at any time. With `peer`, the running mean is the
    buffer `peer_mean` `[out]`, which starts at 0.5.

    Where forward or backward hooks watch it (pruning is one), where a subclass overrides `forward`, `activity` or
    `goodness`, or where one of weight and bias is frozen, a step calls the layer itself, on the joint batch, and lets
    autograd and the optimizer's own `step()` do the rest: the same step, only slower, and without `peer` and
    `skip_below`, which are refused there. Sums of squares are then those of the activities as they are handed out, in
    the compute dtype.

    Raises:
        ValueError, TypeError: for an option outside what `linear_step_` accepts.
    """

    peer_mean: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        objective: Objective | GivenLoss | Callable[..., Tensor] = DEFAULT_OBJECTIVE,
        norm: Norm = "l2",
        eps: float = 1e-4,
        eps_mode: EpsMode = "add",
        activation: Activation = "relu",
        outputs: OutputsOf = "post",
        compute_dtype: torch.dtype | None = None,
        peer: PeerNormalisation | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.layer_options(norm, eps, eps_mode, activation)
        check.one_of("outputs", outputs, check.OUTPUTS)
        if peer is not None and not isinstance(peer, PeerNormalisation):
            raise TypeError(f"peer={peer!r} is not an ffkernels.PeerNormalisation")
        if backend is not None:
            check.one_of("backend", backend, tuple(select.BACKENDS))
        super().__init__(in_features, out_features, bias, device, dtype)
        check.layer_tensors(self.weight, self.bias)
        check.compute_dtype_of(compute_dtype, self.weight)
        mean = None if peer is None else torch.full_like(self.weight.detach()[:, 0], FIRST_MEAN)
        self.register_buffer("peer_mean", mean)
        # A function of goodness and side is a loss of the caller's own.
        self.objective = objective if isinstance(objective, Objective) else GivenLoss.of(objective)
        self.norm = norm
        self.eps = eps
        self.eps_mode = eps_mode
        self.activation = activation
        self.outputs = outputs
        self.compute_dtype = compute_dtype
        self.peer = peer
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FORWARD_OPTIONS}

    def activity(self, x: Tensor, input_sumsq: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Activities `[rows, out]` of rows `x` `[rows, in]`, and their sums of squares `[rows]`.

        `options` go to `ffkernels.linear_forward` and override the layer's own.
        """
        options = {"input_sumsq": input_sumsq, **self._options(), **options}
        return functional.linear_forward(x, self.weight, self.bias, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Activities `[rows, out]`; their gradient reaches weight and bias, and not `input`."""
        return self.activity(input)[0]

    def goodness(self, x: Tensor) -> Tensor:
        """Goodness `[rows]` of rows `x` `[rows, in]`."""
        return self.objective.goodness_of(self.activity(x, keep=False)[1], self.out_features)

    def step(self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any) -> StepResult:
        """One training step, `ffkernels.linear_step_`; `options` go there and override the layer's own."""
        options = {**self._step_options(), **options}
        weight, bias = self.weight, self.bias
        half_frozen = bias is not None and weight.requires_grad != bias.requires_grad
        if half_frozen or called_only(self):
            return self._step_by_call(x_pos, x_neg, optimizer, **options)
        return functional.linear_step_(x_pos, x_neg, weight, bias, optimizer, **options)

    def _step_options(self) -> dict[str, Any]:
        peer = {"peer": self.peer, "peer_mean": None if self.peer is None else self.peer_mean}
        return {"objective": self.objective, "outputs": self.outputs, **peer, **self._options()}

    def _hand_on(self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any) -> StepResult:
        """What `step` returns, without one."""
        return self._step_by_call(x_pos, x_neg, None, learns=False, **{**self._step_options(), **options})

    def _step_by_call(
        self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any
    ) -> StepResult:
        """`linear_step_` by a call of the layer, `backward()` and `optimizer.step()`."""
        if not torch.is_inference_mode_enabled():
            return self._step_by_autograd(x_pos, x_neg, optimizer, **options)

        def known(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

        # Autograd does not work in inference mode, nor on what was made in it.
        with torch.inference_mode(False):
            options = {name: known(value) for name, value in options.items()}
            return self._step_by_autograd(known(x_pos), known(x_neg), optimizer, **options)

    def _step_by_autograd(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizer: Optimizer | None,
        *,
        objective: Objective | GivenLoss | Callable[..., Tensor],
        outputs: str,
        sample_weight: Tensor | None = None,
        is_positive: Tensor | None = None,
        input_sumsq: Tensor | None = None,
        skip_below: float = 0.0,
        label_field: int | None = None,
        product: Tensor | None = None,
        peer: PeerNormalisation | None = None,
        peer_mean: Tensor | None = None,
        learns: bool = True,
        only_checks: bool = False,
        **own: Any,
    ) -> StepResult:
        """`_step_by_call`, or without `learns` its forward.

        What is known of the rows (`input_sumsq`, `label_field`, `product`) saves nothing here.
        """
        if not own.keys() <= set(FORWARD_OPTIONS):
            raise TypeError(f"{', '.join(own.keys() - set(FORWARD_OPTIONS))}: no option of a step")
        if not isinstance(objective, Objective):
            objective = GivenLoss.of(objective)
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        check.layer_options(own["norm"], own["eps"], own["eps_mode"], own["activation"])
        check.one_of("outputs", outputs, check.OUTPUTS)
        check.layer_tensors(weight, bias)
        compute = check.compute_dtype_of(own["compute_dtype"], weight)
        check.rows_of("x_pos", x_pos, weight, compute)
        if (x_neg is None) != (is_positive is not None):
            came = "neither" if x_neg is None else "both"
            raise ValueError(f"of x_neg and is_positive came {came}; accepted: one of the two")
        x, n_pos = x_pos, len(x_pos)
        if x_neg is not None:
            check.rows_of("x_neg", x_neg, weight, compute)
            x = torch.cat([x_pos, x_neg])
        if is_positive is not None:
            check.vector("is_positive", is_positive, len(x), torch.bool, weight.device)
        check.objective_alone(objective, skip_below)
        check.objective_for(objective, len(x), n_pos if is_positive is None else None, weight)
        if sample_weight is not None:
            check.sample_weight(sample_weight, objective, len(x), weight)
        if input_sumsq is not None:
            check.vector("input_sumsq", input_sumsq, len(x), weight.dtype, weight.device)
        field = check.label_field(label_field, weight, x_pos, x_pos[:0] if x_neg is None else x_neg)
        check.shared_product(product, field, n_pos, weight)
        request = select.Request(weight.device, weight.dtype, compute, own["activation"])
        select.choose(request, own["backend"])
        check.optimizer_object(optimizer)
        parameters = [p for p in self.parameters() if p.requires_grad] if learns else []
        if learns and not parameters:
            raise ValueError("no parameter of the layer has requires_grad=True; accepted: one that can be trained")
        if learns and (peer is not None or skip_below):
            name = "peer" if peer is not None else "skip_below"
            raise ValueError(
                f"{name} came to a layer that hooks watch, a subclass overrides or that is frozen in part, whose step "
                f"is autograd's; accepted: no {name}, or a layer without these"
            )
        if optimizer is not None and parameters:
            named = {name: p for name, p in self.named_parameters() if p.requires_grad}
            optim.check_parameters(optimizer, named)
        if only_checks:
            nothing = weight.new_empty(0)
            return StepResult(None, nothing, nothing, nothing, n_pos)
        x = x.detach()
        side = torch.arange(len(x), device=x.device) < n_pos if is_positive is None else is_positive
        with self._set(own):
            with torch.set_grad_enabled(bool(parameters)):
                y, sumsq = self._run(x)
                if overridden(self, "goodness"):
                    goodness = self.goodness(x).to(weight.dtype)
                else:
                    goodness = objective.goodness_of(sumsq, self.out_features)
                if isinstance(objective, Objective):
                    loss = functional.goodness_loss(goodness, side, objective, sample_weight=sample_weight)
                else:
                    loss = objective.value(y.to(weight.dtype), goodness, side, learns=bool(parameters))
            if parameters:
                held = interrupts.hold()
                try:
                    optim.step_on_loss(optimizer, parameters, loss, alone=isinstance(objective, Objective))
                finally:
                    interrupts.release(held)
                if outputs == "post":
                    with torch.no_grad():
                        y, sumsq = self._run(x)
        y_out = None if outputs == "none" else y.detach()
        known = n_pos if is_positive is None else None
        return StepResult(y_out, sumsq.detach(), goodness.detach(), loss.detach(), known, is_positive)

    def _run(self, x: Tensor, input_sumsq: Tensor | None = None, **shared: Any) -> tuple[Tensor, Tensor]:
        """`activity`, by a call where one is waited for, to which what is known of the rows says nothing."""
        if not called_only(self):
            return self.activity(x, input_sumsq, **shared)
        y = self(x)
        return y, y.to(self.weight.dtype).square().sum(1)

    @contextmanager
    def _set(self, options: dict[str, Any]) -> Iterator[None]:
        before = self._options()
        vars(self).update(options)
        try:
            yield
        finally:
            vars(self).update(before)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}, activation={self.activation}, outputs={self.outputs}"


def watched(module: nn.Module) -> bool:
    """Whether calls of a module are seen by hooks, so that none may be left out."""
    every = nn.modules.module
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or every._global_forward_hooks or every._global_forward_pre_hooks
        or every._global_backward_hooks or every._global_backward_pre_hooks
    )  # fmt: skip


def overridden(layer: FFLinear, *names: str) -> bool:
    """Whether a subclass or the object itself replaces one of these methods."""
    kind, own = type(layer), vars(layer)
    for name in names:
        if name in own or (kind is not FFLinear and getattr(kind, name) is not getattr(FFLinear, name)):
            return True
    return False


def called_only(layer: FFLinear) -> bool:
    """Whether a layer computes something else, or something more, than its closed form."""
    return watched(layer) or overridden(layer, "forward", "activity", "goodness", "__call__")


def _step_of(layer: FFLinear) -> Callable[..., StepResult]:
    """The step of a layer; of a frozen one, the forward pass that takes its place in a network."""
    if not layer.weight.requires_grad and not any(p.requires_grad for p in layer.parameters()):
        return layer._hand_on
    return layer.step


def _handed_on(layer: FFLinear, options: dict[str, Any]) -> torch.dtype | None:
    """The dtype of a layer's activities; None where only a call of it could tell."""
    if called_only(layer) or overridden(layer, "step"):
        return None
    return check.compute_dtype_of(options.get("compute_dtype", layer.compute_dtype), layer.weight)


def _facts(
    layers: Iterable[FFLinear],
    given: Sequence[Tensor],
    optimizers: Sequence[Optimizer | None],
    outputs: Sequence[str],
    options: dict[str, Any],
) -> tuple[object, ...]:
    """What the checks of a network's layers read: where it is as it was, they would find what they found."""

    def of(value: object) -> object:
        if isinstance(value, Tensor):
            return id(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
        return value if isinstance(value, str | float | int | None) else id(value)

    facts: list[object] = [select.forced_backend(None), *outputs]
    facts += [(x.shape, x.dtype, x.device) for x in given]
    facts += [(name, of(value)) for name, value in options.items()]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        facts += [id(layer), id(optimizer), called_only(layer), id(layer.objective), of(layer.objective.threshold)]
        facts += [of(value) for value in layer._options().values()]
        facts += [id(layer.peer), of(layer.peer_mean)]
        for p in (layer.weight, layer.bias):
            facts += [of(p), None if p is None else p.data_ptr()]
            if optimizer is not None and p is not None:
                state = optimizer.state.get(p)
                facts.append(None if state is None else [(key, of(value)) for key, value in state.items()])
        if optimizer is not None:
            facts.append([(id(group), len(group["params"])) for group in optimizer.param_groups])
    return tuple(facts)


def _is_matrix(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


class FFNetwork(nn.Module):
    """Forward-Forward layers on top of each other; each normalises what the one below hands on.

    Args:
        layers: the layers, first one first; `out_features` of each must be `in_features` of the next.

    Raises:
        TypeError, ValueError: for no layers, for one that is not an `FFLinear`, and for widths that do not fit.
    """

    def __init__(self, layers: Iterable[FFLinear]) -> None:
        super().__init__()
        layers = list(layers)
        for i, layer in enumerate(layers):
            if not isinstance(layer, FFLinear):
                raise TypeError(f"layers[{i}] is a {type(layer).__name__}; accepted: ffkernels.FFLinear")
            if i and layer.in_features != layers[i - 1].out_features:
                raise ValueError(
                    f"layers[{i}] has in_features={layer.in_features}; accepted: {layers[i - 1].out_features}, "
                    "the width of the layer below"
                )
        if not layers:
            raise ValueError("layers is empty; accepted: at least one FFLinear")
        self.layers = nn.ModuleList(layers)
        # The facts under which the last check of all layers found nothing.
        self._checked: object = None

    def __iter__(self) -> Iterator[FFLinear]:
        return iter(cast("Iterable[FFLinear]", self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    def step(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        *,
        label_field: int | None = None,
        product: Tensor | None = None,
        keep: bool = False,
        **options: Any,
    ) -> list[StepResult]:
        """One step of every layer on a minibatch; each hands its activities to the next as its `outputs` says.

        All layers are checked before the first one is written. A layer none of whose parameters requires a gradient
        stays as it is, its running mean too: it hands on its activities, and has a loss and a goodness.

        Args:
            x_pos, x_neg: rows of both sides, as in `linear_step_`.
            optimizers: one for all layers, or a sequence with one for each.
            label_field, product: arguments of `linear_step_` for the first layer.
            keep: whether the results keep `y`, every layer's, the last one's too: `features_of` reads them.
            options: further arguments of `linear_step_` for every layer (`sample_weight`, `is_positive`, `skip_below`).

        Returns:
            One result per layer, its `y` None unless `keep`: activities live only until the next layer has seen them,
            so that memory does not grow with depth; the last layer's are not computed.
        """
        per_layer = self._optimizers(optimizers)
        last = len(self.layers) - 1
        outputs = ["none" if i == last and not keep else layer.outputs for i, layer in enumerate(self)]
        if "none" in outputs[:-1]:
            i = outputs.index("none")
            raise ValueError(f"layers[{i}].outputs='none' but a layer comes after it; accepted: 'post' or 'pre'")
        self._check_upper(x_pos, x_neg, per_layer, outputs, options)
        shared = {"label_field": label_field, "product": product}
        results = []
        sumsq = None
        is_positive = options.get("is_positive")
        for i, (layer, optimizer) in enumerate(zip(self, per_layer, strict=True)):
            result = _step_of(layer)(
                x_pos, x_neg, optimizer, outputs=outputs[i], input_sumsq=sumsq, **shared, **options
            )
            shared = {}
            results.append(result if keep else replace(result, y=None))
            if i < last:
                sumsq = result.sumsq
                assert result.y is not None
                x_pos, x_neg = (result.y, None) if is_positive is not None else result.sides(result.y)
        return results

    def _check_upper(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        per_layer: Sequence[Optimizer | None],
        outputs: Sequence[str],
        options: dict[str, Any],
    ) -> None:
        """Raises what a step of any layer but the first would, which checks itself before it writes.

        Compiled code has no need of it: there all checks are made when it is traced, before anything runs.
        """
        given = [x for x in (x_pos, x_neg) if x is not None]
        if len(self.layers) == 1 or torch.compiler.is_compiling() or not all(_is_matrix(x) for x in given):
            return
        facts = None if "is_positive" in options else _facts(self, given, per_layer, outputs, options)
        if facts is not None and facts == self._checked:
            return
        rows = sum(map(len, given))
        below = None
        for i, (layer, optimizer) in enumerate(zip(self, per_layer, strict=True)):
            try:
                if below is not None and not overridden(layer, "step"):
                    dtype = _handed_on(below, options) or layer.weight.dtype
                    x = below.weight.new_zeros((), dtype=dtype).expand(rows, layer.in_features)
                    sides = (x, None) if x_neg is None else (x[: len(x_pos)], x[len(x_pos) :])
                    _step_of(layer)(*sides, optimizer, outputs=outputs[i], only_checks=True, **options)
            except (ValueError, TypeError) as error:
                raise type(error)(f"layers[{i}]: {error}") from None
            below = layer
        self._checked = facts

    @torch.no_grad()
    def step_and_features(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        num_classes: int = 10,
        **options: Any,
    ) -> tuple[list[StepResult], Tensor]:
        """`step` on twins `[rows, in]` that differ in their label, and what `features(x_pos)` was before it.

        Where every layer hands on what it had before its update, and on the compiled CPU backend, the rows under the
        neutral label run with the others: one pass over the weights, the first layer's product shared by all three.
        They weigh nothing in the loss, and their coefficients are exactly zero. `options` are those of `step`.
        """
        keep = options.get("keep", False)
        if not self._runs_together(x_pos, x_neg, num_classes, options):
            features = self.features(x_pos, num_classes=num_classes)
            options = {"label_field": num_classes or None, **options}
            return self.step(x_pos, x_neg, optimizers, **options), features
        negatives.check_rows(x_pos, num_classes)
        rows = len(x_pos)
        others = torch.cat([x_neg, x_pos])
        others[rows:, :num_classes] = 1 / num_classes
        # A mean over 3 rows in place of 2.
        weight = next(self.parameters()).new_full((3 * rows,), 1.5)
        weight[2 * rows :] = 0
        joint = self.step(x_pos, others, optimizers, sample_weight=weight, **{**options, "keep": True})
        activities = [cast("Tensor", result.y) for result in joint]
        neutral = [(y[2 * rows :], result.sumsq[2 * rows :]) for y, result in zip(activities, joint, strict=True)]
        results = [
            replace(
                result,
                y=y[: 2 * rows] if keep else None,
                sumsq=result.sumsq[: 2 * rows],
                goodness=result.goodness[: 2 * rows],
            )
            for y, result in zip(activities, joint, strict=True)
        ]
        return results, self._side_by_side(neutral, None)

    def _runs_together(self, x_pos: Tensor, x_neg: Tensor, num_classes: int, options: dict[str, Any]) -> bool:
        """Whether the rows under the neutral label can be further rows of the step, and change nothing else of it."""

        def fits(layer: FFLinear) -> bool:
            objective = options.get("objective", layer.objective)
            return (
                layer.outputs == "pre"
                and isinstance(objective, Objective)
                and not objective.paired
                and objective.reduction == "mean"
                and not isinstance(objective.threshold, Tensor)
                and _step_of(layer) == layer.step
                and not called_only(layer)
                and not overridden(layer, "step")
                and functional.finds_copies(
                    layer.weight,
                    check.compute_dtype_of(layer.compute_dtype, layer.weight),
                    layer.activation,
                    layer.backend,
                )
            )

        # What else changes a forward pass, or says something of each row, belongs to the step's rows alone.
        free = {"objective", "skip_below", "peer", "peer_mean", "keep"}
        return (
            options.keys() <= free
            and bool(num_classes)
            and _is_matrix(x_pos)
            and _is_matrix(x_neg)
            and x_pos.shape == x_neg.shape
            and all(map(fits, self))
        )

    @torch.no_grad()
    def train_layerwise(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        steps: int,
        **options: Any,
    ) -> list[Tensor]:
        """Trains the layers one after the other, each for `steps` steps on the same fixed rows.

        Returns:
            The losses of each layer, `[steps]`, before the step that they belong to.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} is not an integer >= 1")
        per_layer = self._optimizers(optimizers)
        self._check_upper(x_pos, x_neg, per_layer, ["none"] * len(self.layers), options)
        losses = []
        for layer, optimizer in zip(self, per_layer, strict=True):
            step = _step_of(layer)
            results = [step(x_pos, x_neg, optimizer, outputs="none", **options) for _ in range(steps)]
            losses.append(torch.stack([result.loss for result in results]))
            x_pos, x_neg = layer(x_pos), None if x_neg is None else layer(x_neg)
        return losses

    def _optimizers(self, optimizers: Optimizer | Sequence[Optimizer | None] | None) -> Sequence[Optimizer | None]:
        if optimizers is None or isinstance(optimizers, Optimizer):
            return [optimizers] * len(self.layers)
        if len(optimizers) != len(self.layers):
            raise ValueError(
                f"optimizers has {len(optimizers)} entries; accepted: one optimizer, or {len(self.layers)}"
            )
        return optimizers

    def _pass(self, x: Tensor, keep: bool = True, **shared: Any) -> Iterable[tuple[FFLinear, Tensor, Tensor]]:
        """Layers, activities, sums of squares; without `keep` the last layer's activities are left out."""
        sumsq = None
        for index, layer in enumerate(self, 1):
            y, q = layer._run(x, sumsq, keep=keep or index < len(self.layers), **shared)
            shared = {}
            yield layer, y, q
            # No derivative of any kind goes on to the next layer.
            x, sumsq = y.detach(), q.detach()

    def shared_product(self, x: Tensor, num_classes: int = 10) -> Tensor | None:
        """`ffkernels.shared_product` of the first layer, for `step` and `features`.

        None under float16 products, whose rows are scaled before they are rounded, each by its own norm.
        """
        negatives.check_rows(x, num_classes)
        first = next(iter(self))
        compute_dtype = check.compute_dtype_of(first.compute_dtype, first.weight)
        if compute_dtype == torch.float16:
            return None
        return functional.shared_product(x, first.weight, num_classes, compute_dtype=compute_dtype)

    def activities(self, x: Tensor) -> list[Tensor]:
        """Activities `[rows, out]` of every layer."""
        return [y for _, y, _ in self._pass(x)]

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]` of the last layer; their gradient reaches its own parameters only."""
        return self.activities(x)[-1]

    def goodness(self, x: Tensor, **shared: Any) -> Tensor:
        """Goodness `[rows, layers]` of every layer; the gradient of a column reaches its own layer only.

        `shared`: `product` and `label_field` of `linear_forward`, for the first layer.
        """
        per_layer = []
        for layer, y, sumsq in self._pass(x, keep=False, **shared):
            own = overridden(layer, "goodness")
            per_layer.append(layer.goodness(x) if own else layer.objective.goodness_of(sumsq, layer.out_features))
            x = y
        return torch.stack(per_layer, dim=1)

    @torch.no_grad()
    def predict(
        self, x: Tensor, num_classes: int = 10, layers: Sequence[int] | None = None, label_value: float = 1.0
    ) -> Tensor:
        """The label `[rows]` (int64) under which the network finds each row best.

        Each label in turn is overlaid on the first `num_classes` columns; the goodness of `layers` is summed (Hinton
        2022, section 3.3, leaves out the first). Layers that minimise positives count with the opposite sign. The
        first layer multiplies what the labels have in common once.

        Args:
            x: `[rows, in]`; what its label field holds does not matter.
            num_classes: K, labels and columns of the label field.
            layers: indices of the layers that count; None for all.
            label_value: the value that marks a label.
        """
        negatives.check_rows(x, num_classes)
        negatives.check_value(label_value)
        chosen = self._chosen(layers, default=range(len(self.layers)))
        sign = torch.tensor([1.0 if layer.objective.maximize else -1.0 for layer in self], device=x.device)[chosen]
        best = [x.new_empty(0, dtype=torch.int64)]
        for rows in x.split(max(1, PREDICTION_ROWS // num_classes)):
            under_all = rows.repeat(num_classes, 1)
            field = under_all.view(num_classes, len(rows), x.shape[1])[:, :, :num_classes]
            field.zero_().diagonal(dim1=0, dim2=2).fill_(label_value)
            totals = (self.goodness(under_all, **self._sharing(rows, num_classes))[:, chosen] * sign).sum(1)
            best.append(totals.view(num_classes, len(rows)).argmax(0))
        return torch.cat(best)

    def _sharing(self, x: Tensor, num_classes: int) -> dict[str, Any]:
        """Arguments of `linear_forward` for the first layer and copies of `x` under each label: one product for all."""
        first = next(iter(self))
        if called_only(first):
            return {}
        compute_dtype = check.compute_dtype_of(first.compute_dtype, first.weight)
        if functional.finds_copies(first.weight, compute_dtype, first.activation, first.backend):
            return {"copies": num_classes}
        product = self.shared_product(x, num_classes)
        return {} if product is None else {"product": product.repeat(num_classes, 1), "label_field": num_classes}

    @torch.no_grad()
    def features(
        self, x: Tensor, layers: Sequence[int] | None = None, num_classes: int = 10, product: Tensor | None = None
    ) -> Tensor:
        """Normalised activities of `layers` under the neutral label, side by side, for a linear classifier.

        Each layer's activities are scaled by its own norm option, as the layer above would see them (rms for "none").

        Args:
            x: `[rows, in]`.
            layers: indices; None for all but the first (Hinton 2022, section 3.3), or the only one.
            num_classes: columns of the label field; 0 for rows without one.
            product: `shared_product(x, num_classes)` where it is there already.

        Returns:
            `[rows, sum of widths]` in the weights' dtype.
        """
        shared: dict[str, Any] = {} if product is None else {"product": product, "label_field": num_classes}
        passed = self._pass(negatives.neutral_label(x, num_classes) if num_classes else x, **shared)
        return self._side_by_side([(y, sumsq) for _, y, sumsq in passed], layers)

    @torch.no_grad()
    def features_of(self, results: Sequence[StepResult], layers: Sequence[int] | None = None) -> Tensor:
        """What `features` makes of the positive rows of a `step` with `keep=True`, from the activities it left."""
        if len(results) != len(self.layers) or any(result.y is None for result in results):
            raise ValueError(f"results={len(results)} without activities; accepted: those of step(..., keep=True)")
        sides = [(cast("Tensor", result.pos), result.sides(result.sumsq)[0]) for result in results]
        return self._side_by_side(sides, layers)

    def _side_by_side(self, activities: list[tuple[Tensor, Tensor]], layers: Sequence[int] | None) -> Tensor:
        features = []
        for i in self._chosen(layers, default=range(min(1, len(self.layers) - 1), len(self.layers))):
            layer, (y, sumsq) = cast("FFLinear", self.layers[i]), activities[i]
            norm = layer.norm if layer.norm != "none" else "rms"
            scale = row_scale(sumsq, layer.out_features, norm, layer.eps, layer.eps_mode)
            features.append(y.to(scale.dtype) * scale.unsqueeze(1))
        return torch.cat(features, dim=1)

    def _chosen(self, layers: Sequence[int] | None, default: Iterable[int]) -> list[int]:
        if layers is None:
            return list(default)
        count = len(self.layers)
        wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not -count <= i < count]
        if wrong or not len(layers):
            raise ValueError(f"layers={list(layers)!r}; accepted: indices of {count} layers")
        return [i % count for i in layers]
