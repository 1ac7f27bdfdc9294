"""The proof that a contender computes what its case asks for, against the same in float64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import PAIRS, AutogradBlocks, AutogradPairs
from .cases import NETWORKS, NUM_CLASSES, Batch, Case, Layers
from .contenders import Autograd, Contender
from .convolutions import AutogradConvolutions
from .originals import stable_softplus
from .predictors import PlainPrediction

LUCK, LUCK_OF_MAPS = 1e-6, 1e-3


@dataclass(frozen=True)
class Proof:
    """How far a contender is from the exact answer, how far it may be, and how long its first step took."""

    error: float
    budget: float
    first_step_s: float  # seconds, with all compilation and capture

    @property
    def holds(self) -> bool:
        """Whether it computes the same. An error that is NaN does not hold."""
        return self.error <= self.budget


class Exact:
    """The original's step in float64 over some batches: the change of weights that everyone must arrive at.

    The error is the largest `|change - exact change| / |exact change|` over weights and biases, in Frobenius norms;
    the budget twice that of plain autograd in the same precision, and something for a lucky autograd (`LUCK`; of maps,
    a unit that changes sides or another winner of a window). Where the
    original's own log(1 + e^t) overflows, plain autograd has a stable one.
    """

    def __init__(self, case: Case, initial: Layers, batches: list[Batch]) -> None:
        self.start = [p for layer in initial for p in layer]
        self.batches = batches
        if case.network in NETWORKS:
            plain: Callable[..., Contender] = AutogradPairs if case.network in PAIRS else AutogradBlocks
            softplus_of: tuple[dict[str, Any], ...] = ({},)
        elif case.maps is not None:
            plain, softplus_of = AutogradConvolutions, ({},)
        else:
            plain, softplus_of = Autograd, ({"softplus": None}, {"softplus": stable_softplus})
        exact = plain(case, initial, dtype=torch.float64, **softplus_of[-1])
        for batch in batches:
            exact.step(*(x.double() if x.is_floating_point() else x for x in batch))
        self.change = [p.detach() - start for p, start in zip(exact.parameters(), self.start, strict=True)]
        for softplus in softplus_of:
            yardstick = plain(case, initial, autocast=case.low_precision is not None, **softplus)
            for batch in batches:
                yardstick.step(*batch)
            self.budget = 2 * self._error(yardstick) + (LUCK if case.maps is None else LUCK_OF_MAPS)
            if math.isfinite(self.budget):
                break

    def check(self, contender: Contender) -> Proof:
        """Takes the same steps with a contender, and compares."""
        seconds = first_step(contender, self.batches[0])
        for batch in self.batches[1:]:
            contender.step(*batch)
        return Proof(self._error(contender), self.budget, seconds)

    def _error(self, contender: Contender) -> float:
        errors = [
            (p.detach().double() - start - change).norm() / change.norm()
            for p, start, change in zip(contender.parameters(), self.start, self.change, strict=True)
        ]
        return torch.stack(errors).max().item()


class ExactLabels:
    """The goodness of every label in float64: everyone must find labels that are as good as the best.

    The error is the largest share of the best label's goodness that a row's label falls short by; the budget twice
    that of plain PyTorch in the same precision, and something for a lucky one.
    """

    def __init__(self, case: Case, initial: Layers, batches: list[Batch]) -> None:
        self.batch = batches[0]
        exact = PlainPrediction(case, initial, dtype=torch.float64)
        with torch.no_grad():
            self.goodness = exact.totals(self.batch[0].double())
        plain = PlainPrediction(case, initial, autocast=case.low_precision is not None)
        self.budget = 2 * self._error(plain.step(*self.batch)) + LUCK

    def check(self, contender: Contender) -> Proof:
        """Predicts with a contender, and compares."""
        seconds = first_step(contender, self.batch)
        labels = contender.step(*self.batch)
        assert isinstance(labels, Tensor)
        return Proof(self._error(labels), self.budget, seconds)

    def _error(self, labels: Tensor) -> float:
        if labels.shape != self.goodness.shape[:1] or not ((labels >= 0) & (labels < NUM_CLASSES)).all():
            return float("inf")
        best = self.goodness.amax(1)
        return ((best - self.goodness.gather(1, labels.unsqueeze(1)).squeeze(1)) / best).max().item()


def exact_of(case: Case, initial: Layers, batches: list[Batch]) -> Exact | ExactLabels:
    """What the contenders of a case are held against; `batches` are those of the proof."""
    return (ExactLabels if case.task == "predict" else Exact)(case, initial, batches)


def first_step(contender: Contender, batch: Batch) -> float:
    """Seconds of a contender's first step, with all compilation and capture."""
    start = time.perf_counter()
    contender.step(*batch)
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
