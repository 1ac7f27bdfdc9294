"""Sums over class groups that the forward leaves, against float64."""

from __future__ import annotations

import pytest
import torch

from ffkernels import spec
from ffkernels.autograd import ACTIVATIONS
from ffkernels.backends.triton import launch, step
from ffkernels.objectives.classes import group_sums

from ..steps import error, problem


# Groups beyond the borders of tiles of 16 units, several in one tile, one unit each, all in one.
@pytest.mark.parametrize(("units", "classes"), [(37, 5), (37, 2), (40, 1), (33, 33), (19, 7), (64, 4)])
@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_sums_of_class_groups(activation, squares, units, classes):
    p = problem(21, 12, 18, units, dtype=torch.float32)
    layer = spec.Layer(p.weight.detach(), p.bias.detach(), "none", 0.0, "add", activation, torch.float32)
    rows = spec.Rows(p.x_pos, p.x_neg)
    y, found = torch.empty(33, units), torch.full((33, classes), torch.nan)
    step.linear_forward_(rows, layer, y, torch.empty(33), found, squares)
    x = torch.cat([p.x_pos, p.x_neg]).double()
    exact = ACTIVATIONS[activation](torch.nn.functional.linear(x, p.weight.double(), p.bias.double()))
    assert error(found, group_sums(exact.square() if squares else exact, classes)) < 1e-6


def test_slots_are_enough():
    for units in range(1, 70):
        for classes in range(1, units + 1):
            group = torch.cat(
                [torch.full((1,), g) for g in range(classes) for _ in range(units // classes + (g < units % classes))]
            )
            most = max(len(part.unique()) for part in group.split(16))
            assert most <= launch.class_slots(units, classes, 16)
