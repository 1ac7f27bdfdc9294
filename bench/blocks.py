"""Who is timed at steps of Trifecta's small network (Dooms et al., 2023) and of SCFF's layers (Chen et al., 2025).

Trifecta's is a step of each parity, since every other one reaches other blocks. Its layers are the labels' maps, and
weight and bias of the batch normalisation and the convolution of each block. A layer of SCFF is a convolution on pairs
of images; each image is paired with the one `SHIFT` places on.

Where the environment names a folder of the peers' own programs, `FFKERNELS_PEERS`, these run as they are.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff
from ffkernels.integrations import trifecta

from .cases import NUM_CLASSES, Case, Layers
from .contenders import OURS, Contender, FFKernels, Maker, copy_into, precision
from .convolutions import LAST, AutogradMaps

VARIABLE = "FFKERNELS_PEERS"
PROGRAMS = {"trifecta": "trifecta/main.py", "scff": "contrastive-forward-forward/ContrastFF_CIFAR.py"}
SKIP_BELOW = 0.02
ALPHA = 4.0
SHIFT = 7
# Thresholds of the goodness of positive and negative pairs, and the weight of its length, of SCFF's two layers.
PAIRS = {"scff-1": ((0.0, 1.0), 0.0012, 2), "scff-2": ((5.0, 9.0), 0.0007, 1)}


def program_of(peer: str) -> ModuleType | None:
    """A peer's own program as a module, packages that are not installed stood in for; None where it is not there."""
    folder = os.environ.get(VARIABLE)
    path = Path(folder or "", PROGRAMS[peer])
    if folder is None or not path.is_file():
        return None
    names = ("lightning", "torchmetrics", "torchvision", "torchvision.datasets", "torchvision.transforms", "optuna")
    spec = importlib.util.spec_from_file_location(f"peer_{peer}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stands_in: dict[str, Any] = {name: MagicMock(__all__=[]) for name in names}
    stands_in["lightning"] = SimpleNamespace(LightningModule=nn.Module, LightningDataModule=object, Trainer=None)
    for name in ("MNIST", "FashionMNIST", "SVHN", "CIFAR10"):
        setattr(stands_in["torchvision.datasets"], name, None)
    # Dataclasses look for their module.
    with patch.dict(sys.modules, {**stands_in, spec.name: module}), torch.random.fork_rng(devices=[]):
        spec.loader.exec_module(module)
    return module


def settings(case: Case) -> SimpleNamespace:
    """Trifecta's own settings."""
    of = {"lr": 1e-3, "scale": 1, "alpha": ALPHA, "tau": 2.0, "olu": True, "bn": True, "learned": True}
    return SimpleNamespace(**of, model="small", dataset="mnist" if case.maps and case.maps[0] == 1 else "cifar10")


class Blocks(FFKernels):
    """Trifecta's network of a class with its arguments, `make`: this package's, or its own program's."""

    def __init__(self, case: Case, initial: Layers, make: Callable[..., Any] | None = None, **options: Any) -> None:
        assert case.maps is not None
        self.maps = case.maps
        if make is None:
            make, options = trifecta.Network, {"compute_dtype": case.low_precision, **options}
        net: Any = make(settings(case), NUM_CLASSES, case.maps[1], **options).to(case.device, case.master_dtype)
        self.net = net
        of_blocks = [(block.inner[0].weight, block.inner[0].bias, block.inner[1].weight) for block in net.layers]
        self.layers = [(net.embedding.weight,), *of_blocks]
        copy_into(self.parameters(), initial)
        self.optimizers = [block.optimizer for block in net.layers]
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["eps"] = case.optimizer([torch.zeros(1)]).param_groups[0]["eps"]

    def step(self, *batch: Tensor) -> None:
        images, labels = batch
        images = images.view(-1, *self.maps)
        both = torch.cat([images, images]), torch.cat([labels, (labels + 1) % NUM_CLASSES])
        for parity in (0, 1):
            self.net(*both, parity)


class SkippingBlocks(Blocks):
    """This package, pairs that are told apart left out."""

    another = f"skip_below={SKIP_BELOW}: an approximation"

    def __init__(self, case: Case, initial: Layers) -> None:
        super().__init__(case, initial, skip_below=SKIP_BELOW)


class BlocksProgram(Contender):
    """Trifecta's own program: its `Network`."""

    def __init__(self, case: Case, initial: Layers, program: Any) -> None:
        self.inner = Blocks(case, initial, program.Network)
        self.layers = self.inner.layers

    def step(self, *batch: Tensor) -> None:
        self.inner.step(*batch)


class AutogradBlocks(AutogradMaps):
    """The same by autograd."""

    def __init__(self, case: Case, initial: Layers, **options: Any) -> None:
        super().__init__(case, initial, **options)
        self.optimizers = [case.optimizer([*a, *b]) for a, b in zip(self.layers, self.layers[1:], strict=False)]

    def step(self, *batch: Tensor) -> None:
        for parity in (0, 1):
            self._iteration(parity, *batch)

    def _iteration(self, parity: int, images: Tensor, labels: Tensor) -> None:
        images = images.view(-1, *self.maps)
        of_labels = self.layers[0][0][torch.cat([labels, (labels + 1) % NUM_CLASSES])].view(-1, 1, *self.maps[1:])
        x = torch.cat([torch.cat([images, images]), of_labels], 1).contiguous(memory_format=self.layout)
        for index, optimizer in enumerate(self.optimizers):
            if optimizer is self.optimizers[-1] and index % 2 == parity:
                # Nobody reads what it would make.
                break
            with self.precision():
                x = through_block(x, self.layers[index + 1], index)
            if index % 2 == parity:
                continue
            pos, neg = (x.float() if x.dtype == torch.bfloat16 else x).square().mean((1, 2, 3)).chunk(2)
            loss = F.softplus(-ALPHA * (pos - neg)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = x.detach()


def through_block(x: Tensor, layer: tuple[Tensor, ...], index: int) -> Tensor:
    """What a block makes of maps `x`, in train mode."""
    gamma, beta, weight = layer
    running = torch.zeros_like(gamma), torch.ones_like(gamma)
    y = F.relu(F.conv2d(F.batch_norm(x, *running, gamma, beta, True, 0.1), weight, padding=1), inplace=True)
    return F.max_pool2d(y, 2) if trifecta.SIZES["small"][index][1] else y


class BackpropBlocks(Contender):
    """Backpropagation through the same blocks and a linear head, on the images once, two steps."""

    another = "backpropagation: cross-entropy over a linear head, half as many rows"

    def __init__(self, case: Case, initial: Layers, autocast: bool = False) -> None:
        assert case.maps is not None
        self.precision, self.maps = partial(precision, case, autocast), case.maps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            (width, _), side = trifecta.SIZES["small"][-1], case.maps[1] // 8
            head = nn.Linear(width * side * side, NUM_CLASSES, device=case.device, dtype=case.master_dtype)
        layers = [tuple(nn.Parameter(p.clone()) for p in layer) for layer in initial[1:]]
        gamma, beta, weight = layers[0]
        # Without the labels' channel.
        layers[0] = tuple(nn.Parameter(p.detach().clone()) for p in (gamma[:-1], beta[:-1], weight[:, :-1]))
        self.layers = [*layers, (head.weight, head.bias)]
        self.optimizer = case.optimizer(self.parameters())

    def step(self, *batch: Tensor) -> None:
        images, labels = batch
        for _ in range(2):
            x = images.view(-1, *self.maps).contiguous(memory_format=LAST)
            with self.precision():
                for index, layer in enumerate(self.layers[:-1]):
                    x = through_block(x, layer, index)
                loss = F.cross_entropy(F.linear(x.flatten(1), *self.layers[-1]), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class OurPairs(FFKernels):
    """This package: `SCFFConv2d.step`."""

    def __init__(self, case: Case, initial: Layers) -> None:
        thresholds, penalty, padding = PAIRS[case.network]
        weight, _ = initial[0]
        sizes = weight.shape[1], weight.shape[0], weight.shape[2]
        self.net: Any = ff.SCFFConv2d(
            *sizes, padding=padding, thresholds=thresholds, penalty=penalty, compute_dtype=case.low_precision,
            device=case.device, dtype=case.master_dtype,
        )  # fmt: skip
        self.layers, self.maps = [tuple(self.net.parameters())], case.maps or ()
        copy_into(self.parameters(), initial)
        self.optimizers = [case.optimizer(self.parameters())]

    def step(self, *batch: Tensor) -> object:
        x = batch[0].view(-1, *self.maps)
        return self.net.step(x, self.optimizers[0], partners(len(x), x.device))


def partners(rows: int, device: torch.device) -> Tensor:
    """Which row stands beside each."""
    return (torch.arange(rows, device=device) + SHIFT) % rows


class AutogradPairs(AutogradMaps):
    """The same by autograd on four convolutions."""

    def __init__(self, case: Case, initial: Layers, **options: Any) -> None:
        super().__init__(case, initial, **options)
        self.thresholds, self.penalty, self.padding = PAIRS[case.network]
        self.optimizer = case.optimizer(self.parameters())

    def goodness(self, one: Tensor, other: Tensor) -> Tensor:
        """Of each place, of pairs of images `[rows, channels, H, W]`."""
        pair = standardised(F.pad(torch.cat([one, other], 1), (self.padding,) * 4, mode="reflect"))
        with self.precision():
            one_half, another = (
                F.conv2d(half.contiguous(memory_format=self.layout), *self.layers[0])  # type: ignore[call-overload]
                for half in pair.chunk(2, 1)
            )
        return (one_half + another).to(one.dtype).relu().square().mean(1)

    def step(self, *batch: Tensor) -> None:
        x = standardised(batch[0].view(-1, *self.maps))
        pos, neg = self.goodness(x, x), self.goodness(x, x[partners(len(x), x.device)])
        loss = F.softplus(self.thresholds[0] - pos).mean() + F.softplus(neg - self.thresholds[1]).mean()
        loss = loss + self.penalty * pos.norm(dim=(1, 2)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def standardised(x: Tensor) -> Tensor:
    """Rows of mean 0 and deviation 1."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / (1e-10 + x.std((1, 2, 3), keepdim=True))


class PairsProgram(Contender):
    """SCFF's own program: its `train` for an epoch of one batch; the pairing is drawn, and here what is drawn is fixed.

    It also makes what the layer hands on, pooled, of both sides.
    """

    def __init__(self, case: Case, initial: Layers, program: Any) -> None:
        (first, second), self.penalty, padding = PAIRS[case.network]
        weight, _ = initial[0]
        self.program, self.maps, self.thresholds = program, case.maps or (), (first, second)
        self.net = program.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], pad=padding, act="triangle")
        self.layers = [(self.net.conv_layer.weight, self.net.conv_layer.bias)]
        copy_into(self.parameters(), initial)
        self.optimizer = case.optimizer(self.parameters())

    def step(self, *batch: Tensor) -> None:
        x = batch[0].view(-1, *self.maps)
        shift = torch.full((len(x) - 1,), SHIFT - 1)
        pool, none = nn.MaxPool2d(4, 2, 1, ceil_mode=True), nn.Identity()
        with redirect_stdout(io.StringIO()), patch.object(torch, "randperm", lambda count: shift):
            self.program.train(
                [self.net], x.device, [self.optimizer], [None], [self.thresholds[0]], [self.thresholds[1]], (1, 2, 3),
                (1, 2, 3), 1, [pool], 1, 1, [self.penalty], 0, [1 << 60], [none], False, None, None, [(x, 0, 0, 0)],
                None, None, None, None, None, None, 1, 1, None,
            )  # fmt: skip


def initial_of(case: Case) -> Layers:
    """Parameters of every layer as PyTorch's own modules start."""
    assert case.maps is not None
    channels, height, width = case.maps
    if case.network in PAIRS:
        out, _, kernel = case.convolutions[0]
        layers: Layers = [tuple(nn.Conv2d(channels, out, kernel).parameters())]
    else:
        layers, channels = [(nn.Embedding(NUM_CLASSES, height * width).weight,)], channels + 1
        for out, _ in trifecta.SIZES["small"]:
            norm, convolution = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, bias=False)
            layers.append((norm.weight, norm.bias, convolution.weight))
            channels = out
    return [tuple(p.detach().to(case.device, case.master_dtype) for p in layer) for layer in layers]


def blocks_of(case: Case) -> dict[str, Maker]:
    """Name and maker of everyone who takes such a step; ours first, and the plain writing after it."""
    low = case.low_precision is not None
    of_blocks = case.network not in PAIRS
    makers: dict[str, Maker] = {OURS: Blocks if of_blocks else OurPairs}
    plain: Any = AutogradBlocks if of_blocks else AutogradPairs
    makers["autograd"] = plain
    makers["autograd, autocast" if low else "autograd, channels last"] = partial(plain, autocast=low, layout=LAST)
    if of_blocks:
        makers[f"{OURS}, skip_below"] = SkippingBlocks
        makers["backprop"] = partial(BackpropBlocks, autocast=low)
    program = None if low else program_of("trifecta" if of_blocks else "scff")
    if program is not None:
        makers["its own program"] = partial(BlocksProgram if of_blocks else PairsProgram, program=program)
    return makers
