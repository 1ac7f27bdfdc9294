"""DeeperForward: dropped activities, group normalisation handed on, shortcuts; its networks against autograd."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff

from .conv_cases import made
from .steps import error

CLASSES = 5
OBJECTIVE = ff.Objective(loss="cross_entropy", goodness="activity", classes=CLASSES)


def convolution(channels: int, out: int, kernel: int = 3, stride: int = 1, **options: Any) -> ff.FFConv2d:
    options = {"bias": False, "objective": OBJECTIVE, "dtype": torch.float64, **options}
    return ff.FFConv2d(channels, out, kernel, stride, kernel // 2, **options)


def handed_on(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(CLASSES, channels, affine=False)


def tiny(**options: Any) -> ff.FFNetwork:
    """Its TinyCNN, smaller."""
    return ff.FFNetwork(
        [
            nn.GroupNorm(1, 3, affine=False),
            convolution(3, 10, 5, **options),
            handed_on(10), nn.AvgPool2d(2),
            convolution(10, 20, 5, **options),
            handed_on(20), nn.AvgPool2d(2),
            convolution(20, 40, **options),
            handed_on(40),
            convolution(40, 40, **options),
        ]
    )  # fmt: skip


def residual(widths: tuple[int, ...] = (5, 10, 20, 40), **options: Any) -> ff.FFNetwork:
    """Its 17 layers: what the first of each four takes is added to what the third does, and that put beside the end."""
    modules = [nn.GroupNorm(1, 3, affine=False), convolution(3, widths[0], **options)]
    for block, width in enumerate(widths):
        for i in range(4):
            below = widths[block - 1] if block and i == 0 else width
            modules.append(handed_on(below))
            if block and i == 0:
                modules.append(ff.Shortcut(2, "concatenate"))
            if i == 2:
                modules.append(ff.Shortcut(2, pool=nn.AvgPool2d(2) if block else None))
            modules.append(convolution(width, width, stride=2 if block and i == 0 else 1, **options))
    return ff.FFNetwork(modules)


def goodness_of(y: Tensor) -> Tensor:
    return y.reshape(len(y), CLASSES, -1).mean(2)


def tiny_inputs(x: Tensor, activities: list[Tensor]) -> Tensor:
    """What the next layer of TinyCNN takes."""
    if not activities:
        return F.layer_norm(x, x.shape[1:])
    y = F.group_norm(activities[-1], CLASSES)
    return F.avg_pool2d(y, 2) if len(activities) < 3 else y


class ResidualInputs:
    """What the next of the 17 takes, with the shortcut as it goes on from layer to layer."""

    def __call__(self, x: Tensor, activities: list[Tensor]) -> Tensor:
        i = len(activities) - 1
        if i < 0:
            return F.layer_norm(x, x.shape[1:])
        x = F.group_norm(activities[-1], CLASSES)
        if i % 4 == 2:
            x = x + self.shortcut
        elif i % 4 == 0 and i:
            x = torch.cat([x, self.shortcut], 1)
        if i % 2 == 0:
            self.shortcut = F.avg_pool2d(x, 2) if i and i % 4 == 0 else x
        return x


def by_autograd(net: ff.FFNetwork, inputs: Any, optimizers: Any, x: Tensor, labels: Tensor, masks: Any) -> list[Tensor]:
    """A step of plain layers, each on what is detached; the losses."""
    activities: list[Tensor] = []
    losses = []
    for layer, mask, optimizer in zip(net, masks, optimizers, strict=True):
        z = F.conv2d(inputs(x, activities).detach(), layer.weight, None, layer.stride, layer.padding)
        y = F.relu(z) * mask
        loss = F.cross_entropy(goodness_of(y), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        activities.append(y.detach())
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("network", "inputs"), [(tiny, lambda: tiny_inputs), (residual, ResidualInputs)])
def test_networks_train_as_by_autograd(network, inputs, dropout):
    torch.manual_seed(0)
    ours = network(dropout=dropout)
    theirs = copy.deepcopy(ours)

    def optimizers(net: ff.FFNetwork) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(layer.parameters(), lr=0.01, eps=1e-3) for layer in net]

    mine, others = optimizers(ours), optimizers(theirs)
    for _ in range(3):
        x, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(CLASSES, (6,))
        results = ours.step(x, None, mine, labels=labels, keep=True)
        masks = [(result.y > 0) / (1 - dropout) for result in results]
        for result, loss in zip(results, by_autograd(theirs, inputs(), others, x, labels, masks), strict=True):
            assert error(result.loss, loss) <= 1e-10
    for layer, other in zip(ours, theirs, strict=True):
        assert error(layer.weight, other.weight) <= 1e-10


@pytest.mark.parametrize(("network", "inputs"), [(tiny, lambda: tiny_inputs), (residual, ResidualInputs)])
def test_networks_predict_by_the_sum_of_mean_activities(network, inputs):
    torch.manual_seed(0)
    net, of = network(dropout=0.2).eval(), inputs()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    activities: list[Tensor] = []
    for layer in net:
        z = F.conv2d(of(x, activities), layer.weight, None, layer.stride, layer.padding)
        activities.append(F.relu(z).detach())
    expected = torch.stack([goodness_of(y) for y in activities], 1)
    with torch.no_grad():
        assert error(net.goodness(x), expected) <= 1e-10
    assert error(net(x), activities[-1]) <= 1e-10
    assert torch.equal(net.predict(x), expected.sum(1).argmax(1))
    chosen = list(range(1, len(net)))
    assert torch.equal(net.predict(x, layers=chosen), expected[:, 1:].sum(1).argmax(1))


def test_shortcuts_of_two_sides_and_layer_by_layer():
    """Negatives beside positives, a shortcut from the images themselves, and layers trained one after the other."""
    torch.manual_seed(0)
    options = {"objective": ff.Objective(loss="symba")}
    net = ff.FFNetwork([convolution(4, 4, **options), ff.Shortcut(1), convolution(4, 6, **options)])
    layers = copy.deepcopy(list(net))
    x_pos, x_neg = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    first, second = net.step(x_pos, x_neg, None)
    expected = layers[0].step(x_pos, x_neg, None)
    assert error(first.loss, expected.loss) <= 1e-12
    above = layers[1].step(expected.pos + x_pos, expected.neg + x_neg, None)
    assert error(second.loss, above.loss) <= 1e-12
    for layer, other in zip(net, layers, strict=True):
        assert error(layer.weight.grad, other.weight.grad) <= 1e-12
    losses = net.train_layerwise(x_pos, x_neg, None, 1)
    assert error(losses[1][0], above.loss) <= 1e-12


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("objective", ["cross_entropy activity", "cross_entropy mean", "mean", "symba", "projection"])
def test_a_dropped_activity_has_no_gradient(objective, pool, backend):
    dtype = torch.float64 if backend == "eager" else torch.float32
    case = made(objective, rows=8, padding=1, pool=pool, optimizer=None, dtype=dtype, maps=(10, 10), channels=(2, 6))
    exact = case.copy(torch.float64)
    result = case.ours(dropout=0.25, backend=backend)
    layer = exact.layer
    y = F.relu(F.conv2d(exact.x, layer.weight, layer.bias, padding=1))
    y = y if pool is None else F.max_pool2d(y, pool)
    mask = result.y > 0
    share = float((mask.sum() / (y > 0).sum()).item())
    assert abs(share - 0.75) < 0.05
    y = y * mask / 0.75
    tolerance = 1e-10 if backend == "eager" else 1e-5
    assert error(result.y, y) <= tolerance and error(result.sumsq, y.square().sum((1, 2, 3))) <= tolerance
    reads_moments = case.layer.objective
    if isinstance(reads_moments, ff.ProjectionHead):
        loss = F.cross_entropy(layer.objective.scores(y.mean((2, 3))) / 0.5, exact.side)
    elif reads_moments.classes:
        groups = [g.flatten(1) for g in y.tensor_split(3, 1)]
        goodness = [g.mean(1) if reads_moments.goodness == "activity" else g.square().mean(1) for g in groups]
        loss = F.cross_entropy(torch.stack(goodness, 1), exact.side)
    else:
        loss = ff.goodness_loss(y.square().mean((1, 2, 3)), exact.side, reads_moments)
    loss.backward()
    assert error(result.loss, loss) <= tolerance
    for name, value in exact.layer.named_parameters():
        assert error(case.layer.get_parameter(name).grad, value.grad) <= tolerance, name


def test_only_a_step_in_train_mode_drops():
    layer, x = convolution(3, 10, dropout=0.5), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    labels, shut = torch.arange(4), float((layer(x) == 0).float().mean())
    assert float((layer.step(x, None, None, labels=labels).y == 0).float().mean()) > shut + 0.1
    layer.eval()
    assert torch.equal(layer.step(x, None, None, labels=labels).y, layer(x).detach())


def test_what_does_not_fit_is_named():
    x, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    for options, match in (
        ({"activation": "gelu"}, "dropout=0.5 came with activation='gelu'"),
        ({"pool": nn.AvgPool2d(2)}, "dropout=0.5 came with pool='average'"),
        ({"batch_norm": "behind"}, "dropout=0.5 came with batch_norm='BatchNorm2d'"),
    ):
        with pytest.raises(ValueError, match=match):
            convolution(3, 10, dropout=0.5, **options).step(x, None, None, labels=labels)
    for wrong in (1.0, -0.1, "half"):
        with pytest.raises(ValueError, match=f"dropout={wrong!r}"):
            convolution(3, 10, dropout=wrong)
    first, second = convolution(5, 5), convolution(5, 5)
    for modules, match in (
        ([ff.Shortcut(1), first], "of which there are 0"),
        ([first, ff.Shortcut(2), second], "of which there are 1"),
        ([convolution(3, 5), ff.Shortcut(1), second], "adds 3 channels to 5"),
        ([first, ff.Shortcut(1, "concatenate"), second], "in_channels=5; accepted: 10"),
        ([first, nn.GroupNorm(1, 5), second], "is a GroupNorm with parameters"),
        ([first, nn.Flatten(), ff.Shortcut(1), ff.FFLinear(320, 3)], "in front of an FFConv2d"),
    ):
        with pytest.raises(ValueError, match=match):
            ff.FFNetwork(modules)
    for options, kind, match in (
        ({"back": 0}, ValueError, "back=0"),
        ({"back": 1, "join": "times"}, ValueError, "join='times'"),
        ({"back": 1, "pool": nn.ReLU()}, TypeError, "pool is a ReLU"),
    ):
        with pytest.raises(kind, match=match):
            ff.Shortcut(**options)
    net = ff.FFNetwork([convolution(3, 10), ff.Shortcut(1, "concatenate", pool=nn.AvgPool2d(2)), convolution(13, 10)])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"layers\[1\]: "):
        net.step(x, None, torch.optim.SGD(net.parameters(), lr=0.1), labels=labels)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_networks_are_pickled_with_their_shortcuts():
    net, x = residual(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(net)).predict(x), net.predict(x))
