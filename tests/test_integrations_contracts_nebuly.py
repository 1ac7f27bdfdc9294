"""What programs do with nebuly's layers: what they read and call, what they change; the numbers are by autograd."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from .copied_code import (
    EXACT,
    LinearReLU,
    assert_same,
    direction,
    rows,
    signed,
    their_signed_step,
)
from .steps import error

pytestmark = pytest.mark.usefixtures("fresh_warnings")


class Normalisation(nn.Module):
    """Stands before every layer of nebuly's net, needs no training, and its goodness counts as zero."""

    requires_training = False

    def forward(self, x: Tensor) -> Tensor:
        return direction(x, 1e-8)

    def positive_eval(self, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        return self(x), torch.zeros(len(x))


class TheirSigned(nn.Module):
    requires_training = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.optimizer = layer, Adam(layer.parameters(), lr=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def ff_train(self, x: Tensor, signs: Tensor, theta: float) -> tuple[Tensor, list[float]]:
        y, above = their_signed_step(self, self.optimizer, x.detach(), signs, theta)
        return y.detach(), [above[signs == side].mean().item() for side in (1, -1)]

    @torch.no_grad()
    def positive_eval(self, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        return self(x), self(x).square().mean(1) - theta


def progressive(layers: list[Any], x: Tensor, signs: Tensor, x_test: Tensor, theta: float = 1.0) -> tuple[Any, Tensor]:
    """nebuly's program: each entry that requires training is trained on what the ones below give; then its evaluation,
    which leaves out the first two entries."""
    separations = []
    for layer in layers:
        if layer.requires_training:
            separations += [layer.ff_train(x, signs, theta)[1] for _ in range(60)]
        with torch.no_grad():
            x = layer(x)
    total = torch.zeros(len(x_test))
    for i, layer in enumerate(layers):
        x_test, goodness = layer.positive_eval(x_test, theta)
        if i > 1:
            total += goodness
    return separations, total


def test_nebulys_training_and_evaluation_are_its_own():
    torch.manual_seed(3)
    labels = torch.arange(60) % 3
    x = 0.5 * torch.randn(60, 12) + F.one_hot(labels, 12)
    wrong = (labels + 1 + torch.arange(60) // 3 % 2) % 3
    sides = [torch.cat([x, F.one_hot(y, 3)], 1) for y in (labels, wrong)]
    signs = torch.cat([torch.ones(60), -torch.ones(60)])
    under_all = torch.cat([torch.cat([x, F.one_hot(torch.full((60,), k), 3)], 1) for k in range(3)])
    linear = [LinearReLU(15, 30), LinearReLU(30, 20)]
    found = []
    for kind in (signed, TheirSigned):
        layers = [part for each in copy.deepcopy(linear) for part in (Normalisation(), kind(each))]
        separations, goodness = progressive(layers, torch.cat(sides), signs, under_all)
        found.append((torch.tensor(separations), goodness.view(3, -1)))
    assert error(found[0][0], found[1][0]) <= 1e-4 and error(found[0][1], found[1][1]) <= 1e-4
    accuracy = [(goodness.argmax(0) == labels).float().mean() for _, goodness in found]
    assert accuracy[0] == accuracy[1] > 0.5


def test_signed_layer_has_what_nebulys_program_reads():
    layer = signed(LinearReLU(12, 10))
    assert layer.requires_training is True and type(layer.optimizer) is Adam
    assert list(layer.state_dict()) == ["layer.linear.weight", "layer.linear.bias"]
    assert [name for name, _ in layer.named_modules()] == ["", "layer", "layer.linear", "layer.relu"]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    x, signs = rows(8).float(), torch.tensor([1.0, -1.0] * 4)
    for each in (layer, copied):
        each.ff_train(x, signs, 1.0)
    assert_same(layer, copied, 0.0)


class Residual(LinearReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Deeper(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))


def other_relu(layer: Any) -> None:
    layer.layer.relu = nn.LeakyReLU()


def doubled(module: nn.Module, x: Any, y: Tensor) -> Tensor:
    return 2 * y


ON_NEBULY = {
    "leaky relu": (LinearReLU, other_relu, None),
    "sequential": (lambda a, b: nn.Sequential(nn.Linear(a, b), nn.ReLU()), lambda layer: None, None),
    "tanh": (LinearReLU, lambda layer: setattr(layer.layer, "relu", nn.Tanh()), "activation Tanh"),
    "frozen": (LinearReLU, lambda layer: layer.layer.linear.bias.requires_grad_(False), "bias is frozen"),
    "gradient hook": (
        LinearReLU,
        lambda layer: layer.layer.linear.weight.register_hook(lambda g: 2 * g),
        "gradient hooks",
    ),
    "hook": (
        LinearReLU,
        lambda layer: layer.layer.register_forward_hook(lambda m, x, y: 2 * y),
        "hooks watch its layer",
    ),
    "outer hook": (LinearReLU, lambda layer: layer.register_forward_hook(doubled), "hooks watch it"),
    "residual": (Residual, lambda layer: None, "Residual's forward is not its activation of its linear layer"),
    "deeper": (lambda a, b: Deeper(), lambda layer: None, "layer is a Deeper, not a linear layer and an activation"),
}


@pytest.mark.parametrize("change", ON_NEBULY)
def test_what_a_program_changes_in_nebulys_layer_is_obeyed(change):
    make, act, message = ON_NEBULY[change]
    inner = make(12, 12).double()
    ours, theirs = signed(copy.deepcopy(inner)), TheirSigned(copy.deepcopy(inner))
    for layer in (ours, theirs):
        act(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x, signs = rows(9), torch.where(torch.arange(9) % 3 > 0, 1, -1)
            for a, b in zip(ours.ff_train(x, signs, 0.2), theirs.ff_train(x, signs, 0.2), strict=True):
                assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=EXACT, atol=EXACT)
            for a, b in zip(ours.positive_eval(x, 0.2), theirs.positive_eval(x, 0.2), strict=True):
                assert error(a, b) <= EXACT
    assert [bool(re.search(message or "", str(w.message))) for w in caught] == [True] * (message is not None)
    assert_same(ours, theirs)


def test_nebulys_input_gets_its_gradient():
    inner = LinearReLU(12, 10).double()
    x = rows()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    signed(inner)(a).square().sum().backward()
    inner(b).square().sum().backward()
    assert error(a.grad, b.grad) <= EXACT
