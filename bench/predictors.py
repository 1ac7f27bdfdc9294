"""Who is timed at predicting labels: each row gets the label under which the network finds it best."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

import ffkernels as ff

from .cases import NUM_CLASSES, Case, Layers
from .contenders import OURS, Backprop, Contender, FFKernels, FFLib, Floor, Maker, backends_of, compiler, installed
from .contenders import precision as precision_of
from .counts import fastest

GOODNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.square().mean(1),
    "sum": lambda y: y.square().sum(1),
}


class OurPrediction(FFKernels):
    """This package: `FFNetwork.predict`."""

    def step(self, *batch: Tensor) -> Tensor:
        return self.net.predict(batch[0], NUM_CLASSES)


class OverlaidPrediction(OurPrediction):
    """This package, the same network with labels overlaid: goodness under each label."""

    another = "overlays each label on the rows"

    def __init__(self, case: Case, initial: Layers) -> None:
        super().__init__(case, initial)
        for layer in self.net:
            layer.objective = ff.Objective()


class PlainPrediction(Contender):
    """One pass through the network for each label, as mohammadpz writes it; one alone where labels stand apart."""

    overlays = False

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
        original, totals = self.case.original, []
        if self.case.sides == 1 and not self.overlays:
            for weight, bias in self.layers:
                x = original.forward(x, weight=weight, bias=bias)
                totals.append(x.square().view(len(x), NUM_CLASSES, -1).mean(2))
            return torch.stack(totals).sum(0)
        goodness = GOODNESS[original.objective.get("goodness", "mean")]
        for label in range(NUM_CLASSES):
            h = x.clone()
            h[:, :NUM_CLASSES] = 0
            h[:, label] = 1
            total = torch.zeros((), dtype=x.dtype, device=x.device)
            for weight, bias in self.layers:
                h = original.forward(h, weight=weight, bias=bias)
                total = total + goodness(h)
            totals.append(total)
        return torch.stack(totals, dim=1)

    @torch.no_grad()
    def step(self, *batch: Tensor) -> Tensor:
        with self.precision():
            return self.totals(*batch).argmax(1)


class PlainOverlaidPrediction(PlainPrediction):
    """The same network with labels overlaid, in plain PyTorch."""

    another, overlays = "overlays each label on the rows", True


class FFLibPrediction(FFLib):
    """fflib from PyPI, as it is: `TryAllClasses`, with the label behind the image."""

    another = "sums log(1 + e^(goodness - threshold)), not goodness, over the layers"

    def __init__(self, case: Case, initial: Layers, autocast: bool = False) -> None:
        (first, bias), *others = initial
        super().__init__(case, [(first.roll(-NUM_CLASSES, dims=1), bias), *others], autocast)
        probe = import_module("fflib.probes.one_hot").TryAllClasses
        self.probe = probe(lambda x, label: self.net(torch.cat((x, label), 1)), NUM_CLASSES)

    @torch.no_grad()
    def step(self, *batch: Tensor) -> Tensor:
        with self.precision():
            return self.probe.predict(batch[0][:, NUM_CLASSES:])


class BackpropPrediction(Backprop):
    """The same network trained by backpropagation: one pass, the largest output of its head."""

    another = "backpropagation: one pass, the largest output of a linear head"

    @torch.no_grad()
    def step(self, *batch: Tensor) -> Tensor:
        return self.outputs(*batch).argmax(1)


class PredictionFloor(Floor):
    """The products that no prediction can do without: the first layer's once, the others' for each label."""

    another = "products only"

    def __init__(self, case: Case, initial: Layers) -> None:
        self.work = []
        for i, (inputs, outputs) in enumerate(case.shapes):
            x, y = (torch.rand(case.rows, n, device=case.device) for n in (inputs, outputs))
            weight, y_t = initial[i][0].float(), y.t().contiguous()
            product = fastest(
                case.device, partial(torch.mm, x, weight.t(), out=y), partial(torch.mm, weight, x.t(), out=y_t)
            )
            self.work += [product] * (NUM_CLASSES if i and case.sides == 2 else 1)


def predictors_of(case: Case, compiled: bool) -> dict[str, Maker]:
    """Name and maker of everyone who predicts; ours first, and plain PyTorch after it."""
    makers: dict[str, Maker] = {OURS: OurPrediction}
    makers |= {f"{OURS}, {backend}": partial(OurPrediction, backend=backend) for backend in backends_of(case)[1:]}
    package = case.package and installed(case.package)
    if package:
        makers[package] = FFLibPrediction
    makers["plain"] = PlainPrediction
    if case.sides == 1:
        makers |= {f"{OURS}, labels overlaid": OverlaidPrediction, "plain, labels overlaid": PlainOverlaidPrediction}
    if case.low_precision is not None:
        makers["plain, autocast"] = partial(PlainPrediction, autocast=True)
    if compiled:
        makers["plain, compiled"] = partial(PlainPrediction, compiled=True)
    return makers | {"backprop": BackpropPrediction, "floor": PredictionFloor}
