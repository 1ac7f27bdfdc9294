"""Test error over seconds of training: of a recipe, and of backpropagation on what the recipe trains on."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from ffkernels.recipes.train import Trainer


class Curve:
    """Errors, and the seconds that were trained till then: all that is done between two looks, but for the looks.

    Args:
        steps: in an epoch.
        looks: how many there are in an epoch, the last one behind its last step.
        error: what is looked at.
    """

    def __init__(self, steps: int, looks: int, error: Callable[[], float]) -> None:
        self._marks = {round(steps * look / looks) for look in range(1, looks + 1)}
        self._error = error
        self._done, self._spent, self._since = 0, 0.0, 0.0
        self.errors: list[float] = []
        self.seconds: list[float] = []

    def start_epoch(self) -> None:
        self._done, self._since = 0, time.perf_counter()

    def step(self) -> None:
        """Behind each step."""
        self._done += 1
        if self._done in self._marks:
            self._spent += time.perf_counter() - self._since
            self.seconds.append(round(self._spent, 3))
            self.errors.append(self._error())
            self._since = time.perf_counter()

    def row(self) -> dict[str, Any]:
        return {"errors": self.errors, "seconds": self.seconds}


def forward_forward(of: Trainer, looks: int = 1) -> Curve:
    """Trains a recipe; by its classifier where it has one, else by goodness."""
    curve = Curve(of.steps_per_epoch, looks, of.goodness_error if of.classifier is None else of.classifier_error)

    def after_step(describe: Callable[[], str]) -> bool:
        curve.step()
        return False

    while not of.finished:
        curve.start_epoch()
        of.run_epoch(after_step)
    return curve


def network(of: Trainer) -> nn.Sequential:
    """A recipe's layers in plain PyTorch, and a linear head; batch normalisation stands where the recipe has it."""
    recipe, (channels, height, width) = of.recipe, of.data.shape
    layers: list[nn.Module] = []
    for convolution in recipe.convolutions:
        layers.append(nn.Conv2d(channels, convolution.channels, convolution.kernel, padding=convolution.kernel // 2))
        layers.append(nn.ReLU())
        if convolution.pool > 1:
            layers.append(nn.MaxPool2d(convolution.pool))
        layers.append(nn.BatchNorm2d(convolution.channels, eps=recipe.eps))
        channels, height, width = convolution.channels, height // convolution.pool, width // convolution.pool
    if layers:
        layers.append(nn.Flatten())
    sizes = (channels * height * width, *recipe.hidden)
    layers += [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], of.data.num_classes))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs ask for more
    return net


def backpropagation(
    of: Trainer, rate: float, looks: int = 1, *, label_smoothing: float | None = None, compiled: bool = False
) -> Curve:
    """Plain PyTorch on a recipe's batches: its layers, a linear head, cross-entropy, Adam, its cool-down.

    Args:
        rate: of Adam.
        label_smoothing: None for the recipe's.
        compiled: whether torch.compile makes forward and backward; what that takes comes before the clock starts.
    """
    recipe = of.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(of.seed)
        net = network(of)
    optimizer = Adam(net.parameters(), lr=rate, fused=True)
    smoothing = recipe.label_smoothing if label_smoothing is None else label_smoothing
    loss_of = nn.CrossEntropyLoss(label_smoothing=smoothing)
    precision = torch.autocast("cpu", of.compute_dtype, enabled=of.compute_dtype is not None)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        with precision:
            value: Tensor = loss_of(net(x), labels)
        return value

    def error() -> float:
        net.eval()
        wrong = of.test_error(predict)
        net.train()
        return wrong

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        with precision:
            return net(x).argmax(1)

    if compiled:
        loss = torch.compile(loss)
        # The last batch of an epoch has another shape.
        sizes_of_batches = {len(batch.labels): batch for batch in of.minibatches(1)}
        for batch in sizes_of_batches.values():
            loss(batch.x_pos, batch.labels).backward()
    curve = Curve(of.steps_per_epoch, looks, error)
    for epoch in range(1, of.epochs + 1):
        curve.start_epoch()
        for group in optimizer.param_groups:
            group["lr"] = rate * of.lr_factor(epoch)
        for batch in of.minibatches(epoch):
            optimizer.zero_grad()
            loss(batch.x_pos, batch.labels).backward()
            optimizer.step()
            curve.step()
    return curve
