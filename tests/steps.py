"""What the step tests share: layers, optimizers, and the comparison of one step with another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ffkernels.optim import SGDW

# Adam and RMSprop divide by the root of squared gradients: with a small eps, gradients that cancel to rounding noise
# come out as full steps in a random direction, under which no two ways of summing agree.
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd-decay": lambda p: SGD(p, lr=0.1, weight_decay=0.05, maximize=True),
    "sgd-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "sgd-nesterov": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "sgdw": lambda p: SGDW(p, lr=0.1, momentum=0.9, dampening=0.9, decoupled=0.5),
    "adam": lambda p: Adam(p, lr=0.01, eps=1e-3),
    "adam-decay": lambda p: Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1, maximize=True),
    "adamw": lambda p: AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1),
    "adam-amsgrad": lambda p: Adam(p, lr=0.01, eps=1e-3, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, eps=1e-3),
}


class Problem(NamedTuple):
    """A layer, its optimizer and a batch."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    optimizer: Optimizer
    x_pos: Tensor
    x_neg: Tensor

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """The same problem with parameters and state of its own, in another dtype if wanted."""
        dtype = dtype or self.weight.dtype
        weight, bias = (
            None if p is None else torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in (self.weight, self.bias)
        )
        assert weight is not None
        optimizer = type(self.optimizer)([p for p in (weight, bias) if p is not None], lr=0.1)
        optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        return Problem(weight, bias, optimizer, self.x_pos.to(dtype), self.x_neg.to(dtype))


def problem(
    n_pos: int = 6,
    n_neg: int = 6,
    in_features: int = 5,
    out_features: int = 7,
    *,
    optimizer: str = "sgd-momentum",
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A random layer and batch, from the global seed."""
    weight = torch.nn.Parameter(torch.randn(out_features, in_features, dtype=dtype))
    b = torch.nn.Parameter(torch.randn(out_features, dtype=dtype) / 4) if bias else None
    x_pos, x_neg = (torch.randn(n, in_features, dtype=dtype) for n in (n_pos, n_neg))
    return Problem(weight, b, OPTIMIZERS[optimizer]([p for p in (weight, b) if p is not None]), x_pos, x_neg)


def error(actual: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """Relative error in the Frobenius norm; infinite where only one is there, or for a NaN or another shape.

    `floor` is the least norm that counts: where terms of that size cancel, what is left of them is rounding.
    """
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.detach().double()
    difference = float((actual.detach().double() - expected).norm())
    scale = max(float(expected.norm()), floor)
    value = difference / scale if scale else difference
    return value if value == value else float("inf")


def state_of(p: Problem) -> dict[str, Tensor]:
    """Parameters and every tensor that the optimizer keeps for them, by name."""
    found = {"weight": p.weight.detach(), **({} if p.bias is None else {"bias": p.bias.detach()})}
    for name, parameter in (("weight", p.weight), ("bias", p.bias)):
        for key, value in p.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = value
    return found


def assert_same_state(ours: Problem, theirs: Problem, tolerance: float, floor: float = 0.0) -> None:
    """Parameters and optimizer state agree, key by key, and are stored in the same dtype and shape."""
    actual, expected = state_of(ours), state_of(theirs)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert error(actual[key], value, floor) <= tolerance, key
