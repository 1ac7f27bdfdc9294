"""Who is timed, and the proof that each computes the same step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Protocol

import torch
from torch import Tensor, nn

import ffkernels as ff

from .cases import Batch, Case, Layers
from .peers import Softplus, stable_softplus


class Contender(Protocol):
    """Takes training steps on float32 batches `[rows, in]`; its weights can be read."""

    def step(self, x_pos: Tensor, x_neg: Tensor) -> None:
        """One step of every layer."""

    def parameters(self) -> list[Tensor]:
        """Weight and bias of every layer in turn; nothing for one that learns nothing."""


Maker = Callable[[Case, Layers], Contender]


class FFKernels:
    """This package."""

    def __init__(self, case: Case, initial: Layers) -> None:
        self.net = ff.FFNetwork(
            ff.FFLinear(
                inputs,
                outputs,
                objective=case.peer.objective_for(outputs),
                outputs=case.peer.outputs,
                compute_dtype=torch.bfloat16 if case.bfloat16 else None,
                **case.peer.layer,
            )
            for inputs, outputs in case.shapes
        )
        _copy(initial, self.parameters())
        self.sample_weight = case.peer.weights_for(case.rows, case.rows, torch.float32)
        parameters = [self.net.parameters()] if case.one_optimizer else [layer.parameters() for layer in self.net]
        optimizers = [case.peer.optimizer(p) for p in parameters]
        self.optimizers = optimizers[0] if case.one_optimizer else optimizers

    def step(self, x_pos: Tensor, x_neg: Tensor) -> None:
        self.net.step(x_pos, x_neg, self.optimizers, sample_weight=self.sample_weight)

    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())


class Autograd:
    """The peer's step in plain PyTorch, as `peers.py` writes it.

    `autocast`: forward and loss under bfloat16 autocast. `compiled`: "losses" compiles forward, loss and
    backward; "losses and optimizer" also the optimizer's step. With one optimizer for all layers there is one
    backward over the sum of their losses, as loeweX does it. The last layer's activities are not handed on.
    """

    def __init__(
        self,
        case: Case,
        initial: Layers,
        autocast: bool = False,
        compiled: str = "",
        dtype: torch.dtype = torch.float32,
        softplus: Softplus | None = None,
    ) -> None:
        self.case, self.peer, self.autocast, self.softplus = case, case.peer, autocast, softplus
        self.layers = [tuple(nn.Parameter(p.to(dtype, copy=True)) for p in layer) for layer in initial]
        groups = [self.parameters()] if case.one_optimizer else self.layers
        self.optimizers = [case.peer.optimizer(group) for group in groups]
        self.losses, self.forward, self.total = self.peer.losses, self.peer.forward, self._total_loss
        self.updates: list[Callable[[], object]] = [optimizer.step for optimizer in self.optimizers]
        if compiled:
            fixed_shapes = partial(torch.compile, dynamic=False)
            self.losses, self.forward, self.total = map(fixed_shapes, (self.losses, self.forward, self.total))
            if compiled == "losses and optimizer":
                self.updates = [fixed_shapes(update) for update in self.updates]

    def _total_loss(self, x_pos: Tensor, x_neg: Tensor) -> Tensor:
        total = x_pos.new_zeros(())
        for weight, bias in self.layers:
            loss, y_pos, y_neg = self.peer.losses(x_pos, x_neg, weight, bias, self.softplus)
            total = total + loss
            x_pos, x_neg = y_pos.detach(), y_neg.detach()
        return total

    def step(self, x_pos: Tensor, x_neg: Tensor) -> None:
        if self.case.one_optimizer:
            with self._precision():
                loss = self.total(x_pos, x_neg)
            self._update(0, loss)
            return
        for i, (weight, bias) in enumerate(self.layers):
            with self._precision():
                loss, y_pos, y_neg = self.losses(x_pos, x_neg, weight, bias, self.softplus)
            self._update(i, loss)
            if i == len(self.layers) - 1:
                return
            if self.peer.outputs == "pre":
                x_pos, x_neg = y_pos.detach(), y_neg.detach()
                continue
            with self._precision(), torch.no_grad():
                x_pos, x_neg = (self.forward(x, weight=weight, bias=bias) for x in (x_pos, x_neg))

    def _update(self, index: int, loss: Tensor) -> None:
        self.optimizers[index].zero_grad()
        loss.backward()
        self.updates[index]()

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer]


class FFLib:
    """fflib from PyPI, as it is: `FFNet.run_train_combined`. It also computes the last layer's activities."""

    def __init__(self, case: Case, initial: Layers, autocast: bool = False) -> None:
        layers, nets = import_module("fflib.nn.ff_linear"), import_module("fflib.nn.ff_net")
        optimizer = case.peer.optimizer([torch.zeros(1)]).param_groups[0]
        self.net = nets.FFNet(
            [
                layers.FFLinear(*shape, loss_threshold=case.peer.objective["threshold"], lr=optimizer["lr"])
                for shape in case.shapes
            ],
            "cpu",
        )
        self.autocast = autocast
        _copy(initial, self.parameters())

    def step(self, x_pos: Tensor, x_neg: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            self.net.run_train_combined(x_pos, x_neg)

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.net.layers for p in (layer.weight, layer.bias)]


class Floor:
    """What no step can do without: its products and one pass over weights and optimizer state.

    Each product goes through `torch.mm` into memory that was allocated beforehand (what others allocate in
    every step costs them page faults), in the orientation that was the fastest of those tried; both sides are
    one joint batch. The products are forward and update of each layer and, where updated activities go to the
    next layer, the forward again. Then weights and state (not the gradient) are read and written once, in
    place. Nothing is normalised, activated or learnt, and no row is left out.
    """

    def __init__(self, case: Case, initial: Layers) -> None:
        rows, dtype = 2 * case.rows, torch.bfloat16 if case.bfloat16 else torch.float32
        copies = 1 + _states_per_parameter(case)
        self.work: list[Callable[[], object]] = []
        for i, (inputs, outputs) in enumerate(case.shapes):
            x, y = torch.rand(rows, inputs).to(dtype), torch.rand(rows, outputs).to(dtype)
            weight = initial[i][0].to(dtype)
            y_t, gradient = y.t().contiguous(), torch.empty_like(weight)
            gradient_t = gradient.t().contiguous()
            forward = _fastest(
                partial(torch.mm, x, weight.t(), out=y.clone()),
                partial(torch.mm, weight, x.t(), out=y_t.clone()),
            )
            update = _fastest(
                partial(torch.mm, y.t(), x, out=gradient),
                partial(torch.mm, y_t, x, out=gradient),
                partial(torch.mm, x.t(), y, out=gradient_t),
            )
            state = torch.rand(copies * (weight.numel() + outputs))
            again = case.peer.outputs == "post" and i < len(case.shapes) - 1
            self.work += [forward, update, state.neg_, *([forward] if again else [])]

    def step(self, x_pos: Tensor, x_neg: Tensor) -> None:
        for work in self.work:
            work()

    def parameters(self) -> list[Tensor]:
        return []


def _states_per_parameter(case: Case) -> int:
    """How many tensors of the parameter's size its optimizer keeps, as one step shows."""
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.ones(2, 2)
    optimizer = case.peer.optimizer([probe])
    optimizer.step()
    return sum(isinstance(v, Tensor) and v.shape == probe.shape for v in optimizer.state[probe].values())


def _fastest(*candidates: Callable[[], object], repeats: int = 5) -> Callable[[], object]:
    def seconds(candidate: Callable[[], object]) -> float:
        candidate()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            candidate()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(candidates, key=seconds)


def _copy(initial: Layers, parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, [p for layer in initial for p in layer], strict=True):
            parameter.copy_(value)


def contenders_of(case: Case) -> dict[str, Maker]:
    """Name and maker of everyone who runs a case; ours first, and the peer in float32 second."""
    makers: dict[str, Maker] = {"ffkernels": FFKernels}
    package = ""
    if case.package is not None and _installed(case.package):
        package = f"{case.package} {metadata.version(case.package)}"
        makers[package] = FFLib
    makers["autograd"] = Autograd
    if case.bfloat16:
        if package:
            makers[f"{package}, autocast"] = partial(FFLib, autocast=True)
        makers["autograd, autocast"] = partial(Autograd, autocast=True)
    makers["autograd, compiled"] = partial(Autograd, compiled="losses", autocast=case.bfloat16)
    makers["autograd, compiled with optimizer"] = partial(
        Autograd, compiled="losses and optimizer", autocast=case.bfloat16
    )
    return makers | {"floor": Floor}


def _installed(package: str) -> bool:
    try:
        import_module(package)
    except ModuleNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Proof:
    """How far a contender's change of the weights is from the exact one, and how far it may be."""

    error: float
    budget: float
    first_step_s: float  # seconds, with all compilation

    @property
    def holds(self) -> bool:
        """Whether it computes the same step. An error that is NaN does not hold."""
        return self.error <= self.budget


class Exact:
    """The peer's step in float64 over some batches: the change of weights that everyone must arrive at."""

    def __init__(self, case: Case, initial: Layers, batches: list[Batch]) -> None:
        self.start = [p for layer in initial for p in layer]
        self.batches = batches
        exact = Autograd(case, initial, dtype=torch.float64, softplus=stable_softplus)
        for x_pos, x_neg in batches:
            exact.step(x_pos.double(), x_neg.double())
        self.change = [p.detach() - start for p, start in zip(exact.parameters(), self.start, strict=True)]
        yardstick = Autograd(case, initial, autocast=case.bfloat16)
        for batch in batches:
            yardstick.step(*batch)
        # Twice the error of plain autograd in the same precision, and something for a lucky autograd.
        self.budget = 2 * self._error(yardstick) + 1e-6

    def check(self, contender: Contender) -> Proof:
        """Takes the same steps with a contender that has parameters, and compares them."""
        start = time.perf_counter()
        contender.step(*self.batches[0])
        first_step = time.perf_counter() - start
        for batch in self.batches[1:]:
            contender.step(*batch)
        return Proof(self._error(contender), self.budget, first_step)

    def _error(self, contender: Contender) -> float:
        """The largest `|change - exact change| / |exact change|` over weights and biases, Frobenius norms."""
        errors = [
            (p.detach().double() - start - change).norm() / change.norm()
            for p, start, change in zip(contender.parameters(), self.start, self.change, strict=True)
        ]
        return torch.stack(errors).max().item()
