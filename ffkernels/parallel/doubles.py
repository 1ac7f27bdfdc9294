"""What stands in for a layer's own parts while a process steps on its rows of a batch: parameters, losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from ..functional.plan import others_of
from ..nn import FFConv2d, FFLinear
from ..objectives import AnyObjective, GivenLoss, Objective


class Double:
    """A layer's parameters over again, in the same memory, for a step that leaves gradients without anybody's hooks.

    Running statistics are copies, so that what moves them can be put together before they are written.
    """

    modules = ("objective", "batch_norm", "input_norm", "product_norm")

    def __init__(
        self,
        layer: FFLinear | FFConv2d,
        objective: AnyObjective,
        batch_norm: nn.Module | None,
        input_norm: nn.Module | None,
        product_norm: nn.Module | None,
    ) -> None:
        self.weight = nn.Parameter(layer.weight.detach())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        self.objective = _over_again(objective) if isinstance(objective, nn.Module) else objective
        norms = (batch_norm, input_norm, product_norm)
        doubles = [_over_again(n) if isinstance(n, nn.BatchNorm1d | nn.BatchNorm2d) else n for n in norms]
        self.batch_norm, self.input_norm, self.product_norm = doubles
        self._norms: list[tuple[nn.Module, Any]] = [
            (norm, double)
            for norm, double in zip(norms, doubles, strict=True)
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.training and norm.track_running_stats
        ]

    @contextmanager
    def moves_instead(self) -> Iterator[None]:
        """What moves the layer's own running statistics within moves those of the double."""
        pairs = [
            (tensor, double.get_buffer(name))
            for norm, double in self._norms
            for name, tensor in norm.named_buffers(recurse=False)
        ]
        before = [tensor.clone() for tensor, _ in pairs]
        try:
            yield
        finally:
            for (tensor, double), old in zip(pairs, before, strict=True):
                double.copy_(tensor)
                tensor.copy_(old)

    def gradients(self) -> dict[str, Tensor]:
        """By the names of `linear_step_`'s and `conv2d_step_`'s parameters."""
        learning: dict[str, Tensor | None] = {"weight": self.weight, "bias": self.bias}
        norms = (self.batch_norm, self.input_norm, self.product_norm)
        learning.update(others_of(cast("AnyObjective", self.objective), *norms))
        found = {name: p.grad for name, p in learning.items() if p is not None}
        return cast("dict[str, Tensor]", found)

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        """Running means and variances, and what the step has made of them."""
        of = ("running_mean", "running_var")
        pairs = [(getattr(norm, name), getattr(double, name)) for norm, double in self._norms for name in of]
        return [(into, found) for into, found in pairs if into is not None]

    def counted(self) -> list[Tensor]:
        """The counts of batches that go on."""
        counts = [norm.num_batches_tracked for norm, _ in self._norms]
        return [count for count in counts if isinstance(count, Tensor)]


def _over_again(module: nn.Module) -> Any:
    double = copy.copy(module)
    parameters = {name: None if p is None else nn.Parameter(p.detach()) for name, p in module._parameters.items()}
    buffers = {name: None if t is None else t.clone() for name, t in module._buffers.items()}
    vars(double).update({"_parameters": parameters, "_buffers": buffers})
    return double


def of_no_rows(objective: GivenLoss) -> Objective:
    """What stands in for a given loss on a process without rows: a mean of none is no number."""
    if objective.classes is None:
        return Objective(goodness=objective.goodness)
    return Objective(goodness=objective.goodness, loss="cross_entropy", classes=objective.classes)


def part_of(objective: GivenLoss, share: Tensor | None) -> GivenLoss:
    """A process's part of the loss, by its share; it must hang on nothing that learns but what it reads."""

    def function(read: Any, side: Tensor) -> Tensor:
        loss = objective.function(read, side)
        if isinstance(loss, Tensor) and _leaves(loss) - _leaves(*(read if isinstance(read, tuple) else (read,))):
            raise ValueError(
                "objective's function has parameters of its own, whose gradients nobody reduces; accepted under "
                "DataParallel: a function of what it reads alone, or a ProjectionHead"
            )
        return loss if share is None or not isinstance(loss, Tensor) else loss * share

    return replace(objective, function=function)


def _leaves(*tensors: Tensor) -> set[int]:
    """The leaves with gradients that these hang on, by address."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [t.grad_fn for t in tensors]
    found |= {id(t) for t in tensors if t.grad_fn is None and t.requires_grad}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [below for below, _ in node.next_functions]
    return found
