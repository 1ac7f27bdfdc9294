"""One Forward-Forward layer as a module; a layer that hooks watch is called, as PyTorch would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional, interrupts, optim
from .. import validation as check
from ..autograd import without_autocast
from ..backends import select
from ..functional import StepResult
from ..functional.plan import FORWARD_OPTIONS
from ..functional.rows import checked_rows
from ..objectives import (
    DEFAULT_OBJECTIVE,
    AnyObjective,
    GivenLoss,
    Moments,
    ProjectionHead,
    any_objective,
    class_goodness,
    move,
    standardise,
)
from ..peer import FIRST_MEAN, PeerNormalisation
from ..spec import Activation, EpsMode, Norm, OutputsOf

# Options of a step that say something of its rows.
ROWS_OPTIONS = ("is_positive", "labels", "input_sumsq", "sample_weight", "product", "label_field")


class Ran(NamedTuple):
    """What a forward pass leaves: activities, `[rows]` sums of squares, and of maps their moments if known."""

    y: Tensor
    sumsq: Tensor
    moments: Moments | None = None


class FFLinear(nn.Linear):
    """A linear layer `y = act(W normalise(x) + b)` that learns from its own goodness.

    Parameters, their initialisation and their names in `state_dict` are those of `torch.nn.Linear`. The options are
    those of `linear_step_`, and plain attributes: all but `peer` and `batch_norm` can be changed at any time. With
    `peer`, the running mean is the buffer `peer_mean` `[out]`, which starts at 0.5. With `batch_norm="behind"` the
    module `batch_norm`, a `torch.nn.BatchNorm1d`, stands behind the activation: goodness is of what it makes, which the
    layer hands on. Only a step moves its running statistics; in train mode a forward pass goes by those of its own
    rows, so call `eval()` to predict.

    Where forward or backward hooks watch it (pruning is one), where a subclass overrides `forward`, `activity` or
    `goodness`, or where one of weight and bias is frozen, a step calls the layer itself, on the joint batch, and lets
    autograd and the optimizer's own `step()` do the rest: the same step, only slower, and without `peer` and
    `skip_below`, which are refused there. Sums of squares are then those of the activities as they are handed out, in
    the compute dtype.

    Raises:
        ValueError, TypeError: for an option outside what `linear_step_` accepts.
    """

    peer_mean: Tensor | None
    objective: AnyObjective
    _plain: ClassVar[type[nn.Module]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        objective: AnyObjective | Callable[..., Tensor] = DEFAULT_OBJECTIVE,
        norm: Norm = "l2",
        eps: float = 1e-4,
        eps_mode: EpsMode = "add",
        activation: Activation = "relu",
        outputs: OutputsOf = "post",
        compute_dtype: torch.dtype | None = None,
        peer: PeerNormalisation | None = None,
        batch_norm: Literal["behind"] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.layer_options(norm, eps, eps_mode, activation)
        check.one_of("outputs", outputs, check.OUTPUTS)
        if peer is not None and not isinstance(peer, PeerNormalisation):
            raise TypeError(f"peer={peer!r} is not an ffkernels.PeerNormalisation(), nor None")
        if backend is not None:
            check.one_of("backend", backend, tuple(select.BACKENDS))
        super().__init__(in_features, out_features, bias, device, dtype)
        check.layer_tensors(self.weight, self.bias)
        check.compute_dtype_of(compute_dtype, self.weight)
        mean = None if peer is None else torch.full_like(self.weight.detach()[:, 0], FIRST_MEAN)
        self.register_buffer("peer_mean", mean)
        self.objective = any_objective(objective)
        check.class_groups(self.objective, out_features)
        self.norm = norm
        self.eps = eps
        self.eps_mode = eps_mode
        self.activation = activation
        self.outputs = outputs
        self.compute_dtype = compute_dtype
        self.peer = peer
        self.backend = backend
        if batch_norm not in (None, "behind"):
            raise ValueError(f"batch_norm={batch_norm!r} is not one of None, 'behind'")
        made = None if batch_norm is None else nn.BatchNorm1d(out_features, device=device, dtype=dtype)
        self.batch_norm = made
        check.batch_norm(made, self.weight, outputs, peer)

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module; but a plain objective may replace a head, which is a module, and a function is a loss."""
        if name == "objective":
            value = any_objective(value)
            if isinstance(value, ProjectionHead):
                value.fit(self.weight)
            else:
                self._modules.pop(name, None)
        super().__setattr__(name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FORWARD_OPTIONS}

    def activity(self, x: Tensor, input_sumsq: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Activities `[rows, out]` of rows `x` `[rows, in]`, and their sums of squares `[rows]`.

        `options` go to `ffkernels.linear_forward` and override the layer's own.
        """
        options = {"input_sumsq": input_sumsq, **self._options(), **options}
        if self.batch_norm is None:
            return functional.linear_forward(x, self.weight, self.bias, **options)
        check.enough_for_statistics(self.batch_norm, len(x))
        y, _ = functional.linear_forward(x, self.weight, self.bias, **{**options, "keep": True})
        u = standardise(y.to(self.weight.dtype), self.batch_norm).u
        return u.to(y.dtype), u.square().sum(1)

    def forward(self, input: Tensor) -> Tensor:
        """Activities `[rows, out]`; their gradient reaches weight and bias, and not `input`."""
        return self.activity(input)[0]

    def goodness(self, x: Tensor) -> Tensor:
        """Goodness of rows `x` `[rows, in]`: `[rows]`; `[rows, classes]` where the objective has classes."""
        return self._goodness_of(self._run(x, keep=self.objective.classes is not None))

    def _goodness_of(self, ran: Ran, objective: AnyObjective | None = None) -> Tensor:
        """Goodness from what a forward pass has left; activities are read for classes alone."""
        y, sumsq, _ = ran
        objective = self.objective if objective is None else objective
        if isinstance(objective, ProjectionHead):
            check.head(objective, self.weight)
            with without_autocast(self.weight.device):
                return objective.scores(y.to(sumsq.dtype))
        check.class_groups(objective, self.out_features)
        if objective.classes is not None:
            return class_goodness(y.to(sumsq.dtype), objective.classes, objective.goodness)
        return objective.goodness_of(sumsq, self.out_features)

    def step(self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any) -> StepResult:
        """One training step, `ffkernels.linear_step_`; `options` go there and override the layer's own."""
        options = {**self._step_options(), **options}
        weight, bias = self.weight, self.bias
        learns = {p.requires_grad for p in self.parameters()} if self._modules else {weight.requires_grad}
        if bias is not None:
            learns.add(bias.requires_grad)
        if len(learns) > 1 or called_only(self):
            return self._step_by_call(x_pos, x_neg, optimizer, **options)
        return functional.linear_step_(x_pos, x_neg, weight, bias, optimizer, **options)

    def _step_options(self) -> dict[str, Any]:
        peer = {"peer": self.peer, "peer_mean": None if self.peer is None else self.peer_mean}
        behind = {} if self.batch_norm is None else {"batch_norm": self.batch_norm}
        return {"objective": self.objective, "outputs": self.outputs, **peer, **behind, **self._options()}

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
        objective: AnyObjective | Callable[..., Tensor],
        outputs: str,
        skip_below: float = 0.0,
        peer: PeerNormalisation | None = None,
        peer_mean: Tensor | None = None,
        learns: bool = True,
        only_checks: bool = False,
        batch_norm: nn.BatchNorm1d | None = None,
        **others: Any,
    ) -> StepResult:
        """`_step_by_call`, or without `learns` its forward.

        What is known of the rows (`input_sumsq`, `label_field`, `product`) saves nothing here.
        """
        own = {name: others.pop(name) for name in FORWARD_OPTIONS}
        if unknown := others.keys() - set(ROWS_OPTIONS):
            raise TypeError(f"{', '.join(sorted(unknown))}: no option of a step; accepted: those of linear_step_")
        objective = any_objective(objective)
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        check.layer_options(own["norm"], own["eps"], own["eps_mode"], own["activation"])
        check.one_of("outputs", outputs, check.OUTPUTS)
        check.layer_tensors(weight, bias)
        compute = check.compute_dtype_of(own["compute_dtype"], weight)
        check.objective_alone(objective, skip_below, len(weight))
        check.head(objective, weight)
        rows = checked_rows(weight, compute, objective, x_pos, x_neg, **others)
        is_positive, n_pos = rows.is_positive, len(x_pos)
        check.batch_norm(batch_norm, weight, outputs, peer)
        check.enough_for_statistics(batch_norm, len(x_pos) + len(rows.x_neg))
        x = x_pos if x_neg is None else torch.cat([x_pos, x_neg])
        side = rows.labels
        request = select.Request(weight.device, weight.dtype, compute, own["activation"])
        select.choose(request, own["backend"])
        check.optimizer_object(optimizer)
        if batch_norm is not self.batch_norm:
            raise ValueError(
                "batch_norm came to a layer that hooks watch, a subclass overrides or that is frozen in part; "
                "accepted: its own"
            )
        its_own = [*self.named_parameters()]
        if isinstance(objective, ProjectionHead) and objective is not self.objective:
            its_own += [(f"objective.{name}", p) for name, p in objective.named_parameters()]
        parameters = [p for _, p in its_own if p.requires_grad] if learns else []
        if learns and not parameters:
            raise ValueError("no parameter of the layer has requires_grad=True; accepted: one that can be trained")
        if learns and (peer is not None or skip_below):
            name = "peer" if peer is not None else "skip_below"
            raise ValueError(
                f"{name} came to a layer that hooks watch, a subclass overrides or that is frozen in part, whose step "
                f"is autograd's; accepted: no {name}, or a layer without these"
            )
        if optimizer is not None and parameters:
            named = {name: p for name, p in its_own if p.requires_grad}
            optim.check_parameters(optimizer, named)
        if only_checks:
            nothing = weight.new_empty(0)
            return StepResult(None, nothing, nothing, nothing, n_pos)
        x = x.detach()
        if side is None:
            side = torch.arange(len(x), device=x.device) < n_pos if is_positive is None else is_positive
        with self._set(own):
            before = None
            if batch_norm is not None and batch_norm.training:
                with torch.no_grad():
                    weights = (self.weight, self.bias)
                    before = standardise(functional.linear_forward(x, *weights, **own)[0].to(weight.dtype), batch_norm)
            with torch.set_grad_enabled(bool(parameters)):
                ran = self._run(x)
                y, sumsq, _ = ran
                if overridden(self, "goodness"):
                    goodness = self.goodness(x).to(weight.dtype)
                else:
                    goodness = self._goodness_of(ran, objective)
                if isinstance(objective, GivenLoss):
                    loss = objective.value(y.to(weight.dtype), goodness, side, learns=bool(parameters))
                else:
                    of_scores = objective.objective if isinstance(objective, ProjectionHead) else objective
                    sides = {"is_positive": None, "labels": side} if rows.labels is not None else {"is_positive": side}
                    loss = functional.goodness_loss(
                        goodness, objective=of_scores, sample_weight=rows.sample_weight, **sides
                    )
            held = interrupts.hold()
            try:
                if parameters:
                    optim.step_on_loss(optimizer, parameters, loss, alone=not isinstance(objective, GivenLoss))
                if batch_norm is not None and before is not None:
                    with torch.no_grad():
                        move(batch_norm, before)
            finally:
                interrupts.release(held)
            if parameters and outputs == "post":
                with torch.no_grad():
                    y, sumsq, _ = self._run(x)
        y_out = None if outputs == "none" else y.detach()
        known = n_pos if is_positive is None else None
        return StepResult(y_out, sumsq.detach(), goodness.detach(), loss.detach(), known, is_positive)

    def _shape_after(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a row's activities."""
        return (self.out_features,)

    def _run(self, x: Tensor, input_sumsq: Tensor | None = None, **shared: Any) -> Ran:
        """`activity`, by a call where one is waited for, to which what is known of the rows says nothing."""
        if not called_only(self):
            return Ran(*self.activity(x, input_sumsq, **shared))
        y = self(x)
        return Ran(y, y.to(self.weight.dtype).square().sum(1))

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


def batch_norms(layer: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """A layer's own, whose statistics a step moves."""
    return [module for module in layer.children() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


# What a layer is where nobody has overridden anything.
FFLinear._plain = FFLinear


def overridden(layer: Any, *names: str) -> bool:
    """Whether a subclass or the object itself replaces one of these methods."""
    kind, plain, own = type(layer), layer._plain, vars(layer)
    return any(name in own or getattr(kind, name) is not getattr(plain, name) for name in names)


def called_only(layer: Any) -> bool:
    """Whether a layer computes something else, or something more, than its closed form."""
    return watched(layer) or overridden(layer, "forward", "activity", "goodness", "__call__")
