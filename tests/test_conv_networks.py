"""Networks of convolutions, pooling and linear layers: a step of each on what the one below was before its own."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import ffkernels as ff
from ffkernels import reference

from .conv_cases import definition, judged
from .steps import OPTIMIZERS, error

LABELS = ff.Objective(loss="cross_entropy", classes=3)
SIDES = ff.Objective(goodness="mean", threshold=0.5)


def network(objective: ff.Objective, **options) -> ff.FFNetwork:
    torch.manual_seed(1)
    shared = {"objective": objective, "dtype": torch.float64, **options}
    return ff.FFNetwork(
        [
            ff.FFConv2d(2, 6, 3, padding=1, pool=2, **shared),
            nn.MaxPool2d(2, 1),
            ff.FFConv2d(6, 8, 3, padding=1, norm="l2", batch_norm="behind", **shared),
            nn.AvgPool2d(2),
            nn.Flatten(),
            ff.FFLinear(32, 9, norm="l2", outputs="pre", **shared),
            ff.FFLinear(9, 6, norm="rms", outputs="pre", **shared),
        ]
    )


def by_autograd(net: ff.FFNetwork, optimizers, x: torch.Tensor, side: torch.Tensor) -> list[torch.Tensor]:
    losses = []
    for index, (layer, optimizer) in enumerate(zip(net, optimizers, strict=True)):
        x = net.between[index](x)
        optimizer.zero_grad()
        if isinstance(layer, ff.FFConv2d):
            y = definition(layer, x)
        else:
            y = reference.linear_forward(
                x, layer.weight, layer.bias, norm=layer.norm, eps=layer.eps, eps_mode=layer.eps_mode, activation="relu"
            )
        maps = y if y.dim() == 4 else y[:, :, None, None]
        losses.append(judged(layer.objective, maps, side, None)[1])
        losses[-1].backward()
        optimizer.step()
        x = y.detach()
    return losses


@pytest.mark.parametrize("objective", [LABELS, SIDES], ids=["labels", "sides"])
def test_a_step_is_that_of_each_layer(objective):
    ours = network(objective)
    theirs = deepcopy(ours)
    optimizers = [[OPTIMIZERS["adam"](layer.parameters()) for layer in net] for net in (ours, theirs)]
    for _ in range(5):
        x = torch.randn(8, 2, 11, 11, dtype=torch.float64)
        side = torch.randint(3, (8,)) if objective is LABELS else torch.arange(8) < 4
        given = (x, None) if objective is LABELS else (x[:4], x[4:])
        results = ours.step(*given, optimizers[0], keep=True, **({"labels": side} if objective is LABELS else {}))
        losses = by_autograd(theirs, optimizers[1], x, side)
        for result, loss in zip(results, losses, strict=True):
            assert error(result.loss, loss) <= 1e-10
    assert [tuple(result.y.shape[1:]) for result in results] == [(6, 5, 5), (8, 4, 4), (9,), (6,)]
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert error(p, q, 1.0) <= 1e-10, name


def test_prediction_is_the_largest_sum_of_goodness():
    net = network(LABELS).eval()
    x = torch.randn(300, 2, 11, 11, dtype=torch.float64)
    goodness = net.goodness(x)
    assert goodness.shape == (300, 4, 3)
    assert torch.equal(net.predict(x), goodness.sum(1).argmax(1))
    assert torch.equal(net.predict(x, layers=[1]), goodness[:, 1].argmax(1))
    alone = net.layers[1].goodness(net.between[1](net.layers[0](x)))
    torch.testing.assert_close(goodness[:, 1], alone)
    assert torch.equal(net.predict(x[:0]), torch.zeros(0, dtype=torch.int64))
    assert net.features(x).shape == (300, 8 * 16 + 9 + 6)
    assert net(x).shape == (300, 6)


def test_it_learns():
    net = network(LABELS)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x = torch.randn(60, 2, 11, 11, dtype=torch.float64)
    labels = torch.arange(60) % 3
    x += labels[:, None, None, None] - 1.0
    for _ in range(60):
        results = net.step(x, None, optimizer, labels=labels)
    assert all(float(result.loss) < 0.9 for result in results)
    assert float((net.eval().predict(x) == labels).double().mean()) > 0.9


def test_layers_train_one_after_the_other():
    net = network(LABELS)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net]
    x, labels = torch.randn(8, 2, 11, 11, dtype=torch.float64), torch.randint(3, (8,))
    theirs = deepcopy(net)
    losses = net.train_layerwise(x, None, optimizers, 3, labels=labels)
    for index, layer in enumerate(theirs):
        x = theirs.between[index](x)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for at in range(3):
            assert error(losses[index][at], layer.step(x, None, optimizer, outputs="none", labels=labels).loss) <= 1e-12
        x = layer(x).detach()


def test_a_frozen_layer_hands_on():
    net = network(LABELS)
    net.layers[0].requires_grad_(False)
    before = net.layers[0].weight.clone()
    x, labels = torch.randn(8, 2, 11, 11, dtype=torch.float64), torch.randint(3, (8,))
    optimizers = [None, *(torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net.layers[1:])]
    results = net.step(x, None, optimizers, labels=labels)
    assert torch.equal(net.layers[0].weight, before)
    torch.testing.assert_close(results[0].goodness, net.layers[0].goodness(x))


@pytest.mark.parametrize(
    ("size", "objective", "message"),
    [
        (12, LABELS, r"layers\[2\]: x_pos has 72 columns but weight is \(9, 32\)"),
        (3, LABELS, r"layers\[1\]: .*"),
        (1, LABELS, r"layers\[0\]: the pool \(2, 2\) is larger than the maps \(1, 1\) of x_pos"),
        (11, ff.Objective(loss="cross_entropy", classes=8), r"layers\[0\]: classes=8 came to a layer of 6 units"),
    ],
)
def test_all_layers_are_checked_before_the_first_is_written(size, objective, message):
    net = network(LABELS)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, labels = torch.randn(8, 2, size, size, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    if size == 12:
        x = torch.randn(8, 2, 15, 15, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        net.step(x, None, optimizer, labels=labels, objective=objective)
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value)


CONV, LINEAR = ff.FFConv2d(2, 4, 3), ff.FFLinear(8, 3)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "layers is empty"),
        ([nn.Flatten()], ValueError, "layers is empty"),
        ([nn.Conv2d(2, 4, 3)], TypeError, r"layers\[0\] is a Conv2d; accepted: ffkernels.FFLinear or FFConv2d"),
        ([CONV, CONV], ValueError, r"layers\[1\] has in_channels=2; accepted: 4"),
        ([CONV, LINEAR], ValueError, r"layers\[1\] has in_features=8 behind 4 channels; accepted: an nn.Flatten"),
        ([CONV, nn.Flatten(), ff.FFLinear(9, 3)], ValueError, r"layers\[2\] has in_features=9 behind 4 channels"),
        ([LINEAR, CONV], ValueError, r"layers\[1\] is an FFConv2d behind flat rows"),
        ([nn.Flatten(), CONV], ValueError, r"layers\[1\] is an FFConv2d behind flat rows"),
        ([LINEAR, ff.FFLinear(4, 3)], ValueError, r"layers\[1\] has in_features=4; accepted: 3"),
        ([CONV, nn.MaxPool2d(2)], ValueError, r"layers\[1\] is a MaxPool2d behind the last layer that learns"),
    ],
)
def test_what_does_not_fit_together_is_named(layers, error, message):
    with pytest.raises(error, match=message):
        ff.FFNetwork(layers)


def test_a_label_field_is_for_linear_layers():
    net = network(SIDES)
    x = torch.randn(4, 2, 11, 11, dtype=torch.float64)
    with pytest.raises(ValueError, match="label_field came to a network whose first layer is a convolution"):
        net.step(x, x, None, label_field=10)
