"""A learned projection, or prototypes, as a layer's objective: layer and matrix against autograd."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends import select

from .steps import OPTIMIZERS, error

NATIVE = select.load("native").library.load().library is not None
PLACES = [
    ("eager", torch.float64, 1e-10),
    ("eager", torch.float32, 2e-5),
    *([("native", torch.float32, 2e-5)] if NATIVE else []),
]
FORMS = ["projection", "prototypes"]


def layer_of(form: str, dtype: torch.dtype, units: int = 7, classes: int = 4, **options) -> ff.FFLinear:
    head = ff.ProjectionHead(classes, form=form, temperature=0.5, label_smoothing=0.1)
    return ff.FFLinear(5, units, objective=head, dtype=dtype, **options)


def by_autograd(layer: ff.FFLinear, x: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Goodness and loss of rows."""
    y = reference.linear_forward(
        x, layer.weight, layer.bias, norm=layer.norm, eps=layer.eps, eps_mode=layer.eps_mode,
        activation=layer.activation,
    )  # fmt: skip
    head = layer.objective.weight
    if layer.objective.form == "prototypes":
        head, y = F.normalize(head, dim=1), F.normalize(y, dim=1)
    goodness = y @ head.t()
    losses = F.cross_entropy(goodness / 0.5, labels, label_smoothing=0.1, reduction="none")
    return goodness, (losses if weights is None else losses * weights).mean()


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_step_is_that_of_autograd(form, optimizer, activation, backend, dtype, tolerance):
    torch.manual_seed(4)
    ours = layer_of(form, dtype, activation=activation, outputs="pre", backend=backend)
    theirs = deepcopy(ours).double()
    x, labels, weights = torch.randn(9, 5, dtype=dtype), torch.randint(4, (9,)), torch.rand(9, dtype=dtype) + 0.5
    optimizers = [OPTIMIZERS[optimizer](layer.parameters()) for layer in (ours, theirs)]
    for _ in range(3):
        result = ours.step(x, None, optimizers[0], labels=labels, sample_weight=weights)
        optimizers[1].zero_grad()
        goodness, loss = by_autograd(theirs, x.double(), labels, weights.double())
        loss.backward()
        optimizers[1].step()
    assert error(result.goodness, goodness, 1.0) <= tolerance
    assert error(result.loss, loss, 1.0) <= tolerance
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert error(p, q, 1.0) <= tolerance, name


@pytest.mark.parametrize("form", FORMS)
def test_without_an_optimizer_every_gradient_is_there(form):
    torch.manual_seed(0)
    layer = layer_of(form, torch.float64)
    x, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(4, (9,))
    _, loss = by_autograd(layer, x, labels, None)
    expected = torch.autograd.grad(loss, list(layer.parameters()))
    layer.step(x, None, None, labels=labels)
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_activity_and_a_prototype_of_zeros_move_nothing(form):
    layer = layer_of(form, torch.float64, norm="none")
    with torch.no_grad():
        layer.bias.fill_(-1)
        layer.objective.weight[2] = 0
    before = [p.detach().clone() for p in layer.parameters()]
    x = torch.zeros(3, 5, dtype=torch.float64)
    layer.step(x, None, torch.optim.SGD(layer.parameters(), lr=1.0), labels=torch.tensor([0, 1, 2]))
    assert all(map(torch.equal, layer.parameters(), before))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_hooks_watch_takes_the_same_step(form):
    x, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(4, (9,))
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        layer = layer_of(form, torch.float64)
        if watched:
            layer.register_forward_hook(lambda module, given, y: None)
        layer.step(x, None, torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-3), labels=labels)
        found.append([p.detach() for p in layer.parameters()])
    for plain, seen in zip(*found, strict=True):
        torch.testing.assert_close(plain, seen, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_stays_as_it_is_while_its_layer_learns():
    torch.manual_seed(0)
    layer = layer_of("projection", torch.float64)
    x, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(4, (9,))
    _, loss = by_autograd(layer, x, labels, None)
    (expected,) = torch.autograd.grad(loss, [layer.weight])
    layer.objective.weight.requires_grad_(False)
    before, head = layer.weight.detach().clone(), layer.objective.weight.detach().clone()
    layer.step(x, None, torch.optim.SGD([layer.weight, layer.bias], lr=1.0), labels=labels)
    torch.testing.assert_close(before - layer.weight, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer.objective.weight, head)


@pytest.mark.parametrize("form", FORMS)
def test_a_network_learns_and_predicts_by_its_heads(form):
    torch.manual_seed(0)
    net = ff.FFNetwork([
        ff.FFLinear(8, 32, objective=ff.ProjectionHead(4, form=form, temperature=0.2), outputs="pre"),
        ff.FFLinear(32, 24, objective=ff.ProjectionHead(4, form=form, temperature=0.2), outputs="pre"),
    ])  # fmt: skip
    assert [name for name, _ in net.named_parameters()][2] == "layers.0.objective.weight"
    x = torch.randn(64, 8)
    labels = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        net.step(x, None, optimizer, labels=labels)
    assert float((net.predict(x) == labels).float().mean()) > 0.95
    assert torch.equal(net.predict(x), net.goodness(x).sum(1).argmax(1))
    again = deepcopy(net)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.goodness(x), net.goodness(x))


def test_what_does_not_fit_is_named():
    layer = layer_of("projection", torch.float32)
    x, labels = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=r"does not hold objective.weight \(4, 7\)"):
        layer.step(x, None, torch.optim.SGD([layer.weight, layer.bias], lr=1.0), labels=labels)
    layer.objective.double()
    with pytest.raises(ValueError, match=r"objective.weight is torch.float64 on cpu; accepted: torch.float32"):
        layer.step(x, None, torch.optim.SGD(layer.parameters(), lr=1.0), labels=labels)
    assert torch.equal(layer.weight, before[0])
    with pytest.raises(ValueError, match="ProjectionHead without a matrix"):
        ff.linear_step_(
            x, None, layer.weight, layer.bias, torch.optim.SGD([layer.weight, layer.bias], lr=1.0),
            objective=ff.ProjectionHead(4), labels=labels,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"objective.weight has shape \(4, 6\); accepted: \(4, 7\)"):
        ff.FFLinear(5, 7, objective=ff.ProjectionHead(4, 6))
    with pytest.raises(ValueError, match="form='cosine' is not one of"):
        ff.ProjectionHead(4, form="cosine")
    with pytest.raises(ValueError, match="classes=0 is not"):
        ff.ProjectionHead(0)
