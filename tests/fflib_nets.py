"""Nets of fflib, twice the same, and whether they still are."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from .steps import error

pytest.importorskip("fflib")

from fflib.nn import ff_linear, ff_net, ffc

from ffkernels.integrations import fflib as ours

EXACT = 1e-10


def layers(widths: tuple[int, ...] = (14, 10, 8), threshold: float = 0.1, **options: Any) -> list[ff_linear.FFLinear]:
    options = {"lr": 0.02, "dtype": torch.float64, **options}
    return [ff_linear.FFLinear(a, b, loss_threshold=threshold, **options) for a, b in pairwise(widths)]


def pair(kind: str = "FFNet", **options: Any) -> tuple[Any, Any]:
    """The same net twice, the first accelerated."""
    made = layers(**options)
    theirs: Any
    if kind == "FFNet":
        theirs = ff_net.FFNet(made, None)
    else:
        theirs = ffc.FFC(made, 0.01, 4)
        theirs.classifier.to(made[0].weight.dtype)
    return ours.accelerate(copy.deepcopy(theirs)), theirs


def rows(n: int = 6, width: int = 14) -> Tensor:
    return torch.rand(n, width, dtype=torch.float64)


def state(net: Any) -> dict[str, Tensor]:
    """Parameters and optimizer state of every layer, and of the classifier."""
    found = {}
    parts = [(f"layer {i}", layer, layer.opt) for i, layer in enumerate(net.layers)]
    if hasattr(net, "classifier"):
        parts.append(("classifier", net.classifier, net.optimizer))
    for name, module, optimizer in parts:
        for key, parameter in module.named_parameters():
            found[f"{name} {key}"] = parameter.detach()
            found |= {f"{name} {key} {k}": v for k, v in (optimizer.state[parameter] if optimizer else {}).items()}
    return found


def assert_same(a: Any, b: Any, tolerance: float = EXACT) -> None:
    actual, expected = state(a), state(b)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert error(actual[key], value) <= tolerance, key
