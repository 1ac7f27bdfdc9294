"""Who is timed at a training step; `predictors.py` has those who predict."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module, metadata
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends import select
from ffkernels.backends.select import BACKENDS
from ffkernels.objectives.given import Reads
from ffkernels.reference import ACTIVATIONS
from ffkernels.spec import Geometry

from .cases import NUM_CLASSES, Batch, Case, Layers
from .counts import fastest
from .originals import Softplus

OURS = "ffkernels"
# Packages from PyPI that may be left out, and the modules that they are measured through.
PACKAGES = {"fflib": "fflib.nn.ff_net", "bioff": "bioff.core"}


class Contender:
    """Takes training steps, `step(x_pos, x_neg)`, or predicts, `step(x) -> labels`; its parameters can be read."""

    another = ""  # what it computes instead of the case's step; "" for those who must prove that they do not
    layers: Sequence[tuple[Tensor, ...]] = ()  # weight and bias of each; nothing for one that learns nothing

    def step(self, *batch: Tensor) -> object:
        """One step of every layer, or the labels of all rows."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """Weight and bias of every layer in turn."""
        return [p for layer in self.layers for p in layer]


Maker = Callable[[Case, Layers], Contender]


class FFKernels(Contender):
    """This package, on the backend it chooses or on a given one; by its own loss, or by one that is given to it."""

    def __init__(self, case: Case, initial: Layers, backend: str | None = None, reads: Reads | None = None) -> None:
        self.net, self.by_labels = our_network(case, initial, backend), case.sides == 1
        if reads is not None:
            for layer in cast("Iterable[ff.FFLinear]", self.net):
                layer.objective = given_loss(case.original.objective_for(layer.out_features), reads)
        self.layers = [tuple(layer.parameters()) for layer in cast("Iterable[ff.FFLinear]", self.net)]
        self.sample_weight = case.original.weights_for(case.rows, case.rows, case.master_dtype)
        if self.sample_weight is not None:
            self.sample_weight = self.sample_weight.to(case.device)
        groups = [self.parameters()] if case.one_optimizer else self.layers
        self.optimizers = [case.optimizer(group) for group in groups]
        self.handed_over = self.optimizers[0] if case.one_optimizer else self.optimizers

    def step(self, *batch: Tensor) -> object:
        x_pos, other = batch
        if self.by_labels:
            return self.net.step(x_pos, None, self.handed_over, labels=other)
        return self.net.step(x_pos, other, self.handed_over, sample_weight=self.sample_weight)

    def state(self) -> list[Tensor]:
        """Parameters and optimizer state: all that steps change."""
        kept = [value for optimizer in self.optimizers for of in optimizer.state.values() for value in of.values()]
        return [*self.parameters(), *filter(torch.is_tensor, kept)]


def our_network(case: Case, initial: Layers, backend: str | None = None) -> ff.FFNetwork:
    """This package's network for a case."""
    net = ff.FFNetwork(
        ff.FFLinear(
            inputs,
            outputs,
            objective=case.original.objective_for(outputs),
            outputs=case.original.outputs,
            compute_dtype=case.low_precision,
            backend=backend,
            device=case.device,
            dtype=case.master_dtype,
            **case.original.layer,
        )
        for inputs, outputs in case.shapes
    )
    copy_into(list(net.parameters()), initial)
    return net


def given_loss(objective: Any, reads: Reads) -> ff.GivenLoss:
    """An objective as a caller would write it, in plain PyTorch, of the goodness or of the activities."""

    def of_goodness(goodness: Tensor, side: Tensor) -> Tensor:
        return reference.loss_of(goodness, side, objective, None)

    def of_activities(y: Tensor, side: Tensor) -> Tensor:
        return of_goodness(reference.goodness_of(y, objective.goodness), side)

    function = of_activities if reads == "activities" else of_goodness
    return ff.GivenLoss(function, goodness=objective.goodness, reads=reads)


def backends_of(case: Case) -> list[str]:
    """This package's backends that can run a case, in its order of preference."""
    if case.maps is not None:
        geometry = Geometry(padding=(1, 1), pool="max", pool_size=(2, 2), pool_stride=(2, 2))
        request = select.Request(
            torch.device(case.device), case.master_dtype, case.product_dtype, "relu", "adam", geometry=geometry
        )
        return [name for name, reason in select.verdicts(request).items() if reason is None]
    layer = next(iter(our_network(case, case.initial())))
    names = ("objective", "activation", "compute_dtype")
    asked: dict[str, Any] = {name: getattr(layer, name) for name in names}

    def runs(backend: str) -> bool:
        try:
            ff.explain(layer.weight, case.optimizer(layer.parameters()), backend=backend, **asked)
        except ValueError:
            return False
        return True

    return [backend for backend in BACKENDS if runs(backend)]


class Autograd(Contender):
    """The original's step in plain PyTorch, as `originals.py` writes it.

    `autocast`: forward and loss under autocast. `compiled`: "losses" compiles forward, loss and backward; "losses and
    optimizer" also the optimizer's step. With one optimizer for all layers there is one backward over the sum of
    their losses, as loeweX does it, unless layers hand on what they have after their update. The last layer's
    activities are not handed on.
    """

    def __init__(
        self,
        case: Case,
        initial: Layers,
        autocast: bool = False,
        compiled: str = "",
        dtype: torch.dtype | None = None,
        softplus: Softplus | None = None,
    ) -> None:
        self.case, self.original, self.softplus = case, case.original, softplus
        self.precision = partial(precision, case, autocast)
        self.layers = [tuple(nn.Parameter(p.to(dtype or p.dtype, copy=True)) for p in layer) for layer in initial]
        groups = [self.parameters()] if case.one_optimizer else self.layers
        self.optimizers = [case.optimizer(group) for group in groups]
        self.losses, self.forward, self.total = self.original.losses, self.original.forward, self._total_loss
        self.updates: list[Callable[[], object]] = [optimizer.step for optimizer in self.optimizers]
        self.begin = step_beginner(case, bool(compiled))
        if compiled:
            build = compiler(case)
            self.losses, self.forward, self.total = map(build, (self.losses, self.forward, self.total))
            if compiled == "losses and optimizer":
                self.updates = [build(update) for update in self.updates]

    def _total_loss(self, x_pos: Tensor, x_neg: Tensor) -> Tensor:
        total = x_pos.new_zeros(())
        for layer in self.layers:
            loss, y_pos, y_neg = self.original.losses(x_pos, x_neg, *layer, softplus=self.softplus)
            total = total + loss
            x_pos, x_neg = y_pos.detach(), y_neg.detach()
        return total

    def step(self, *batch: Tensor) -> None:
        x_pos, x_neg = batch
        self.begin()
        if self.case.one_optimizer and self.original.outputs == "pre":
            with self.precision():
                loss = self.total(x_pos, x_neg)
            self._update(0, loss)
            return
        for i, (weight, bias, *head) in enumerate(self.layers):
            with self.precision():
                loss, y_pos, y_neg = self.losses(x_pos, x_neg, weight, bias, *head, softplus=self.softplus)
            self._update(0 if self.case.one_optimizer else i, loss)
            if i == len(self.layers) - 1:
                return
            if self.original.outputs == "pre":
                x_pos, x_neg = y_pos.detach(), y_neg.detach()
                continue
            with self.precision(), torch.no_grad():
                x_pos, x_neg = (self.forward(x, weight=weight, bias=bias) for x in (x_pos, x_neg))

    def _update(self, index: int, loss: Tensor) -> None:
        self.optimizers[index].zero_grad()
        loss.backward()
        self.updates[index]()


class FFLib(Contender):
    """fflib from PyPI, as it is: `FFNet.run_train_combined`. It also computes the last layer's activities."""

    def __init__(self, case: Case, initial: Layers, autocast: bool = False) -> None:
        self.net = fflib_network(case)
        self.begin(case, initial, autocast)

    def begin(self, case: Case, initial: Layers, autocast: bool) -> None:
        """Takes over the initial weights."""
        self.precision = partial(precision, case, autocast)
        self.layers = [(layer.weight, layer.bias) for layer in self.net.layers]
        copy_into(self.parameters(), initial)

    def step(self, *batch: Tensor) -> object:
        with self.precision():
            return self.net.run_train_combined(*batch)


def fflib_network(case: Case) -> Any:
    """fflib's own network for a case."""
    layers, nets = import_module("fflib.nn.ff_linear"), import_module("fflib.nn.ff_net")
    options = {
        "loss_threshold": case.original.objective["threshold"],
        "lr": case.optimizer([torch.zeros(1)]).param_groups[0]["lr"],
        "device": case.device,
        "dtype": case.master_dtype,
    }
    return nets.FFNet([layers.FFLinear(*shape, **options) for shape in case.shapes], case.device)


class BioFF(FFLib):
    """bioff from PyPI, as it is: `Net.train` with one step per layer, its messages and progress bar unseen."""

    def __init__(self, case: Case, initial: Layers, autocast: bool = False) -> None:
        inputs, *hidden = case.sizes
        core = import_module("bioff.core")
        self.net = core.Net(inputs - NUM_CLASSES, hidden, num_classes=NUM_CLASSES, num_epochs=1)
        self.rarity = case.original.weights_for(case.rows, 0, case.master_dtype)
        self.begin(case, initial, autocast)

    def step(self, *batch: Tensor) -> None:
        with self.precision(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            self.net.train(*batch, self.rarity)


class Backprop(Contender):
    """Backpropagation through the same layers and a linear head, on the positive rows, with the same optimizer.

    No row is normalised. Weights keep the size of the activities (He et al. 2015), so that gradients of deep networks
    do not become denormal numbers, which are slow.
    """

    another = "backpropagation: cross-entropy over a linear head, half as many rows"

    def __init__(self, case: Case, initial: Layers, autocast: bool = False, compiled: bool = False) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = [nn.Linear(i, o) for i, o in [*case.shapes, (case.sizes[-1], NUM_CLASSES)]]
            for layer in linear:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.layers = [(layer.weight, layer.bias) for layer in (of.to(case.device, case.master_dtype) for of in linear)]
        self.activation = ACTIVATIONS[case.original.layer["activation"]]
        self.precision = partial(precision, case, autocast)
        self.labels = torch.arange(case.rows, device=case.device) % NUM_CLASSES
        self.by_labels = case.sides == 1
        if self.by_labels:
            self.another = "backpropagation: cross-entropy over a linear head"
        self.optimizers = [case.optimizer(self.parameters())]
        self.loss = compiler(case)(self._loss) if compiled else self._loss
        self.begin = step_beginner(case, compiled)

    def outputs(self, x: Tensor) -> Tensor:
        """Of the head, for each class."""
        for weight, bias in self.layers[:-1]:
            x = self.activation(F.linear(x, weight, bias))
        return F.linear(x, *self.layers[-1])

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.outputs(x), labels)

    def step(self, *batch: Tensor) -> object:
        self.begin()
        with self.precision():
            loss = self.loss(batch[0], batch[1] if self.by_labels else self.labels)
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        return None


class Floor(Contender):
    """What no step can do without: its products and one pass over weights and optimizer state.

    Each product goes through `torch.mm` into memory that was allocated beforehand (what others allocate in
    every step costs them page faults), in the orientation that was the fastest of those tried; both sides are
    one joint batch. The products are forward and update of each layer and, where updated activities go to the
    next layer, the forward again. Then weights and state (not the gradient) are read and written once, in
    place. Nothing is normalised, activated or learnt, and no row is left out.
    """

    another = "products and state only"

    def __init__(self, case: Case, initial: Layers) -> None:
        rows, device = case.sides * case.rows, case.device
        copies = 1 + case.states_per_parameter()
        self.work: list[Callable[[], object]] = []
        for i, (inputs, outputs) in enumerate(case.shapes):
            x, y = (torch.rand(rows, n, device=device).to(case.product_dtype) for n in (inputs, outputs))
            weight = initial[i][0].to(case.product_dtype)
            y_t, gradient = y.t().contiguous(), torch.empty_like(weight)
            gradient_t = gradient.t().contiguous()
            forward = fastest(
                device,
                partial(torch.mm, x, weight.t(), out=y.clone()),
                partial(torch.mm, weight, x.t(), out=y_t.clone()),
            )
            update = fastest(
                device,
                partial(torch.mm, y.t(), x, out=gradient),
                partial(torch.mm, y_t, x, out=gradient),
                partial(torch.mm, x.t(), y, out=gradient_t),
            )
            state = torch.rand(copies * (weight.numel() + outputs), device=device, dtype=case.master_dtype)
            again = case.original.outputs == "post" and i < len(case.shapes) - 1
            self.work += [forward, update, state.neg_, *([forward] if again else [])]

    def step(self, *batch: Tensor) -> None:
        for work in self.work:
            work()


class BareCalls(Contender):
    """A small step as few calls of PyTorch: two products of each layer, and one fused step of the optimizer.

    Forward and weight gradient go through `torch.mm` into memory that is there. Nothing else is computed: the forward
    pass after an update is left out.
    """

    another = "products and optimizer only"

    def __init__(self, case: Case, initial: Layers) -> None:
        self.layers = [tuple(nn.Parameter(p.clone()) for p in layer) for layer in initial]
        for p in self.parameters():
            p.grad = torch.rand_like(p)
        groups = [self.parameters()] if case.one_optimizer else self.layers
        self.optimizers = [case.optimizer(group) for group in groups]
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["fused"] = True
        rows = case.sides * case.rows
        of_layers = [[torch.rand(rows, n, device=case.device) for n in shape] for shape in case.shapes]
        self.work = [(x, y, *layer[:1]) for (x, y), layer in zip(of_layers, self.layers, strict=True)]

    @torch.no_grad()
    def step(self, *batch: Tensor) -> None:
        for x, y, weight in self.work:
            torch.mm(x, weight.t(), out=y)
            torch.mm(y.t(), x, out=weight.grad)
        for optimizer in self.optimizers:
            optimizer.step()


class Graphed(Contender):
    """A contender's training step as a CUDA graph, captured at the first step; batches are copied to where it reads.

    The steps that warm it up are undone: weights go back, and optimizer state to the zeros that it started from.
    """

    def __init__(self, case: Case, initial: Layers, make: Maker) -> None:
        self.inner: Any = make(case, initial)
        self.another, self.layers = self.inner.another, self.inner.layers
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Batch = ()

    def step(self, *batch: Tensor) -> None:
        if self.graph is None:
            self.inputs = tuple(x.clone() for x in batch)
            self.graph = self._captured()
        for mine, x in zip(self.inputs, batch, strict=True):
            mine.copy_(x)
        self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        before = [p.detach().clone() for p in self.inner.parameters()]
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.inner.step(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            self.inner.step(*self.inputs)
        with torch.no_grad():
            for p, value in zip(self.inner.parameters(), before, strict=True):
                p.copy_(value)
            for optimizer in self.inner.optimizers:
                for state in optimizer.state.values():
                    for value in filter(torch.is_tensor, state.values()):
                        value.zero_()
        return graph


def precision(case: Case, autocast: bool) -> AbstractContextManager[object]:
    """Autocast to the dtype of a case's products, or nothing."""
    return torch.autocast(case.device, case.low_precision) if autocast else nullcontext()


def compiler(case: Case) -> Callable[[Any], Any]:
    """`torch.compile` as one would use it on that device for batches that are always of one size."""
    return partial(torch.compile, dynamic=False, mode="max-autotune" if case.device == "cuda" else None)


def step_beginner(case: Case, compiled: bool) -> Callable[[], object]:
    """What a compiled contender calls as its step begins: on CUDA its graphs may then reuse the last step's memory."""
    return torch.compiler.cudagraph_mark_step_begin if compiled and case.device == "cuda" else lambda: None


def copy_into(parameters: list[Tensor], initial: Layers) -> None:
    """Copies weights and biases of every layer into a contender's own."""
    with torch.no_grad():
        for parameter, value in zip(parameters, [p for layer in initial for p in layer], strict=True):
            parameter.copy_(value)


def installed(package: str) -> str | None:
    """Name and version of a package that can be imported, else None."""
    try:
        import_module(PACKAGES[package])
    except ImportError:
        return None
    return f"{package} {metadata.version(package)}"


def trainers_of(case: Case, compiled: bool) -> dict[str, Maker]:
    """Name and maker of everyone who takes a case's training step; ours first, and the plain original after it."""
    low = case.low_precision is not None
    makers: dict[str, Maker] = {OURS: FFKernels}
    # Along a curve the plain writing and the floor say enough, and backprop where there are layers to go back through.
    curve = case.label == "none" and not case.compiled
    if not curve:
        makers |= {f"{OURS}, {backend}": partial(FFKernels, backend=backend) for backend in backends_of(case)[1:]}
    if case.package == "fflib" and case.device == "cpu":
        given: tuple[Reads, ...] = ("goodness", "activities")
        makers |= {f"{OURS}, given loss of {reads}": partial(FFKernels, reads=reads) for reads in given}
    package, maker = case.package and installed(case.package), BioFF if case.package == "bioff" else FFLib
    if package:
        makers[package] = maker
    # Where a step takes seconds, those are left out whose time the others tell.
    short = case.rows < 10_000
    if short or not low:
        makers["autograd"] = Autograd
    if low:
        if package:
            makers[f"{package}, autocast"] = partial(maker, autocast=True)
        makers["autograd, autocast"] = partial(Autograd, autocast=True)
    if compiled:
        makers["autograd, compiled"] = partial(Autograd, compiled="losses", autocast=low)
    if compiled and short:
        makers["autograd, compiled with optimizer"] = partial(Autograd, compiled="losses and optimizer", autocast=low)
    if not curve or len(case.shapes) > 1:
        makers["backprop"] = partial(Backprop, autocast=low)
    if compiled:
        makers["backprop, compiled"] = partial(Backprop, autocast=low, compiled=True)
    if case.device == "cuda":
        plain = [name for name in makers if "compiled" not in name and not (package and name.startswith(package))]
        makers |= {f"{name}, graph": partial(Graphed, make=makers[name]) for name in plain}
    if case.bare:
        makers["bare calls"] = BareCalls
    return makers | {"floor": Floor}
