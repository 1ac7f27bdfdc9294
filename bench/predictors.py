"""Who is timed at predicting labels: each row gets the label under which the network finds it best."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from .cases import NUM_CLASSES, Case, Layers
from .contenders import OURS, Backprop, Maker, backends_of, compiler, copy_into, fflib_network, installed, our_network
from .contenders import precision as precision_of
from .counts import fastest

GOODNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.square().mean(1),
    "sum": lambda y: y.square().sum(1),
}


class OurPrediction:
    """This package: `FFNetwork.predict`."""

    another = ""

    def __init__(self, case: Case, initial: Layers, backend: str | None = None) -> None:
        self.net = our_network(case, initial, backend)

    def step(self, *batch: Tensor) -> Tensor:
        return self.net.predict(batch[0], NUM_CLASSES)

    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())


class PlainPrediction:
    """One pass through the network for each label, as mohammadpz writes it."""

    another = ""

    def __init__(
        self,
        case: Case,
        initial: Layers,
        autocast: bool = False,
        compiled: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.case, self.precision = case, partial(precision_of, case, autocast)
        self.layers = [tuple(p.to(dtype or p.dtype, copy=True) for p in layer) for layer in initial]
        self.totals = compiler(case)(self._totals) if compiled else self._totals

    def _totals(self, x: Tensor) -> Tensor:
        peer, totals = self.case.peer, []
        goodness = GOODNESS[peer.objective.get("goodness", "mean")]
        for label in range(NUM_CLASSES):
            h = x.clone()
            h[:, :NUM_CLASSES] = 0
            h[:, label] = 1
            total = torch.zeros((), dtype=x.dtype, device=x.device)
            for weight, bias in self.layers:
                h = peer.forward(h, weight=weight, bias=bias)
                total = total + goodness(h)
            totals.append(total)
        return torch.stack(totals, dim=1)

    @torch.no_grad()
    def step(self, *batch: Tensor) -> Tensor:
        with self.precision():
            return self.totals(*batch).argmax(1)

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer]


class FFLibPrediction:
    """fflib from PyPI, as it is: `TryAllClasses`, with the label behind the image."""

    another = "sums log(1 + e^(goodness - threshold)), not goodness, over the layers"

    def __init__(self, case: Case, initial: Layers, autocast: bool = False) -> None:
        (first, bias), *others = initial
        net = fflib_network(case)
        copy_into(
            [p for layer in net.layers for p in (layer.weight, layer.bias)],
            [(first.roll(-NUM_CLASSES, dims=1), bias), *others],
        )
        probe = import_module("fflib.probes.one_hot").TryAllClasses
        self.probe = probe(lambda x, label: net(torch.cat((x, label), 1)), NUM_CLASSES)
        self.net, self.precision = net, partial(precision_of, case, autocast)

    @torch.no_grad()
    def step(self, *batch: Tensor) -> Tensor:
        with self.precision():
            return self.probe.predict(batch[0][:, NUM_CLASSES:])

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.net.layers for p in (layer.weight, layer.bias)]


class BackpropPrediction(Backprop):
    """The same network trained by backpropagation: one pass, the largest output of its head."""

    another = "backpropagation: one pass, the largest output of a linear head"

    @torch.no_grad()
    def step(self, *batch: Tensor) -> Tensor:
        x = batch[0]
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).argmax(1)


class PredictionFloor:
    """The products that no prediction can do without: the first layer's once, the others' for each label."""

    another = "products only"

    def __init__(self, case: Case, initial: Layers) -> None:
        self.work: list[Callable[[], object]] = []
        for i, (inputs, outputs) in enumerate(case.shapes):
            x, y = (torch.rand(case.rows, n, device=case.device) for n in (inputs, outputs))
            weight, y_t = initial[i][0].float(), y.t().contiguous()
            product = fastest(
                case.device,
                partial(torch.mm, x, weight.t(), out=y),
                partial(torch.mm, weight, x.t(), out=y_t),
            )
            self.work += [product] * (NUM_CLASSES if i else 1)

    def step(self, *batch: Tensor) -> None:
        for work in self.work:
            work()

    def parameters(self) -> list[Tensor]:
        return []


def predictors_of(case: Case, compiled: bool) -> dict[str, Maker]:
    """Name and maker of everyone who predicts; ours first, and plain PyTorch after it."""
    makers: dict[str, Maker] = {OURS: OurPrediction}
    makers |= {f"{OURS}, {backend}": partial(OurPrediction, backend=backend) for backend in backends_of(case)[1:]}
    package = case.package and installed(case.package)
    if package:
        makers[package] = FFLibPrediction
    makers["plain"] = PlainPrediction
    if case.low_precision is not None:
        makers["plain, autocast"] = partial(PlainPrediction, autocast=True)
    if compiled:
        makers["plain, compiled"] = partial(PlainPrediction, compiled=True)
    return makers | {"backprop": BackpropPrediction, "floor": PredictionFloor}
