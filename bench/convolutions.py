"""Who is timed at a training step of CwC's network (Papachristodoulou et al., 2024): four convolutions, class groups.

Each layer is a 3 x 3 convolution, ReLU, perhaps a pool, and batch normalisation, whose signed output's goodness over
groups of channels goes into a cross-entropy; it learns by an Adam of its own, on what the one below was before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff

from .cases import CONVOLUTIONS, NUM_CLASSES, Case, Layers
from .contenders import OURS, Contender, FFKernels, Maker, compiler, precision

EPS = 1e-4
# Which layout of the maps is the faster one in float32 hangs on the machine: plain autograd is measured in both.
LAST = torch.channels_last


def our_network(case: Case, backend: str | None) -> ff.FFNetwork:
    """This package's network for a case."""
    assert case.maps is not None
    layers, fan_in = [], case.maps[0]
    for channels, groups, pool in CONVOLUTIONS:
        layer = ff.FFConv2d(
            fan_in, channels, 3, padding=1, groups=groups, pool=pool if pool > 1 else None, batch_norm="behind",
            objective=case.original.objective_for(channels), compute_dtype=case.low_precision, backend=backend,
            device=case.device, dtype=case.master_dtype,
        )  # fmt: skip
        assert layer.batch_norm is not None
        layer.batch_norm.eps = EPS
        layers.append(layer)
        fan_in = channels
    return ff.FFNetwork(layers)


class OurConvolutions(FFKernels):
    """This package: `FFNetwork.step` on images whose channels lie last."""

    def __init__(self, case: Case, initial: Layers, backend: str | None = None) -> None:
        self.net = our_network(case, backend)
        self.layers = [tuple(layer.parameters()) for layer in self.net]
        with torch.no_grad():
            for p, value in zip(self.parameters(), chain(*initial), strict=True):
                p.copy_(value)
        self.optimizers = [case.optimizer(layer) for layer in self.layers]
        self.maps = case.maps or ()

    def step(self, *batch: Tensor) -> object:
        x, labels = batch
        x = x.view(-1, *self.maps).contiguous(memory_format=LAST)
        return self.net.step(x, None, self.optimizers, labels=labels)


class AutogradMaps(Contender):
    """Copies of the layers for autograd on maps; arguments as of `Autograd`, and the layout of the maps."""

    def __init__(
        self,
        case: Case,
        initial: Layers,
        autocast: bool = False,
        dtype: torch.dtype | None = None,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.precision, self.maps, self.layout = partial(precision, case, autocast), case.maps or (), layout
        self.layers = [tuple(nn.Parameter(p.to(dtype or p.dtype, copy=True)) for p in layer) for layer in initial]


class AutogradConvolutions(AutogradMaps):
    """The same by autograd."""

    def __init__(self, case: Case, initial: Layers, compiled: bool = False, **options: Any) -> None:
        super().__init__(case, initial, **options)
        self.optimizers = [case.optimizer(layer) for layer in self.layers]
        self.loss = compiler(case)(self._loss) if compiled else self._loss

    def _loss(self, x: Tensor, labels: Tensor, index: int) -> tuple[Tensor, Tensor]:
        y = activity(x, self.layers[index], index)
        squares = y.float() if y.dtype == torch.bfloat16 else y
        goodness = squares.square().mean((2, 3)).view(len(y), NUM_CLASSES, -1).mean(2)
        return F.cross_entropy(goodness, labels), y

    def step(self, *batch: Tensor) -> None:
        x, labels = batch
        x = x.view(-1, *self.maps).contiguous(memory_format=self.layout)
        for index, optimizer in enumerate(self.optimizers):
            with self.precision():
                loss, y = self.loss(x, labels, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = y.detach()


def activity(x: Tensor, layer: tuple[Tensor, ...], index: int) -> Tensor:
    """What one of `CONVOLUTIONS` makes of maps `x`, in train mode."""
    _, groups, pool = CONVOLUTIONS[index]
    weight, bias, gamma, beta = layer
    y = F.relu(F.conv2d(x, weight, bias, padding=1, groups=groups), inplace=True)
    y = F.max_pool2d(y, pool) if pool > 1 else y
    running = torch.zeros_like(gamma), torch.ones_like(gamma)
    return F.batch_norm(y, *running, gamma, beta, True, 0.1, EPS)


class BackpropConvolutions(Contender):
    """Backpropagation through the same layers and a linear head, with one optimizer of the same kind."""

    another = "backpropagation: cross-entropy over a linear head"

    def __init__(self, case: Case, initial: Layers, autocast: bool = False, compiled: bool = False) -> None:
        assert case.maps is not None
        self.precision, self.maps = partial(precision, case, autocast), case.maps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shrink = 1
            for _, _, pool in CONVOLUTIONS:
                shrink *= pool
            places = (case.maps[1] // shrink) * (case.maps[2] // shrink)
            head = nn.Linear(CONVOLUTIONS[-1][0] * places, NUM_CLASSES, device=case.device, dtype=case.master_dtype)
        layers = [tuple(nn.Parameter(p.clone()) for p in layer) for layer in initial]
        self.layers = [*layers, (head.weight, head.bias)]
        self.optimizer = case.optimizer(self.parameters())
        self.loss = compiler(case)(self._loss) if compiled else self._loss

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        for index in range(len(CONVOLUTIONS)):
            x = activity(x, self.layers[index], index)
        return F.cross_entropy(F.linear(x.flatten(1), *self.layers[-1]), labels)

    def step(self, *batch: Tensor) -> None:
        x, labels = batch
        with self.precision():
            loss = self.loss(x.view(-1, *self.maps).contiguous(memory_format=LAST), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class BareConvolutions(Contender):
    """The products alone: PyTorch's convolution and its weight gradient, once each for every layer."""

    another = "convolutions only"

    def __init__(self, case: Case, initial: Layers) -> None:
        assert case.maps is not None
        self.work: list[Callable[[], object]] = []
        channels, height, width = case.maps
        for (out, groups, pool), layer in zip(CONVOLUTIONS, initial, strict=True):
            x, z = (
                torch.rand(case.rows, n, height, width, device=case.device)
                .to(case.product_dtype)
                .contiguous(memory_format=LAST)
                for n in (channels, out)
            )
            weight = layer[0].to(case.product_dtype)
            self.work.append(partial(F.conv2d, x, weight, None, 1, 1, 1, groups))
            options = [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [False, True, False]
            self.work.append(partial(torch.ops.aten.convolution_backward, z, x, weight, None, *options))
            channels, height, width = out, height // pool, width // pool

    def step(self, *batch: Tensor) -> None:
        for work in self.work:
            work()


def convolutions_of(case: Case, compiled: bool) -> dict[str, Maker]:
    """Name and maker of everyone who takes such a step; ours first, and the plain writing after it."""
    low = case.low_precision is not None
    makers: dict[str, Maker] = {OURS: OurConvolutions, f"{OURS}, eager": partial(OurConvolutions, backend="eager")}
    if case.device == "cuda":
        makers[f"{OURS}, triton"] = partial(OurConvolutions, backend="triton")
    makers["autograd"] = AutogradConvolutions
    if low:
        makers["autograd, autocast"] = partial(AutogradConvolutions, autocast=True, layout=LAST)
    else:
        makers["autograd, channels last"] = partial(AutogradConvolutions, layout=LAST)
    makers["backprop"] = partial(BackpropConvolutions, autocast=low)
    if compiled:
        options: dict[str, Any] = {"autocast": low, "compiled": True}
        makers["autograd, compiled"] = partial(AutogradConvolutions, layout=LAST, **options)
        makers["backprop, compiled"] = partial(BackpropConvolutions, **options)
    return makers | {"floor": BareConvolutions}
