"""Batch normalisation between a convolution and its activation, and Mono-Forward's network, against autograd."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff

from .conv_cases import POOLS, Case, made
from .steps import error
from .test_conv import assert_same


def between(objective: str, running: bool = False, optimizer: str | None = "sgd-momentum", **options) -> Case:
    case = made(objective, optimizer=optimizer, **options)
    layer = case.layer
    layer.product_norm = nn.BatchNorm2d(layer.out_channels).to(case.x.dtype)
    with torch.no_grad():
        for parameter in layer.product_norm.parameters():
            parameter.copy_(torch.randn(layer.out_channels))
        layer.product_norm.weight[0] = 0.0
        layer.product_norm.running_var.copy_(torch.rand(layer.out_channels) + 0.5)
        layer.product_norm.train(not running)
    if case.optimizer is not None:
        case.optimizer.add_param_group({"params": list(layer.product_norm.parameters())})
    return case


def copied(case: Case, dtype: torch.dtype | None = None) -> Case:
    if case.optimizer is None:
        return case.copy(dtype)
    layer, optimizer = deepcopy((case.layer, case.optimizer))
    return Case(layer, optimizer, case.x, case.side, case.sample_weight)


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "rmsprop"])
@pytest.mark.parametrize("objective", ["mean", "symba", "cross_entropy activity", "projection", "given moments"])
def test_many_steps_are_those_of_autograd(objective, optimizer):
    ours = between(objective, optimizer=optimizer, padding=1, pool=2)
    assert_same(ours, copied(ours), 1e-9, steps=10)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "identity"])
def test_pools_and_activations(pool, activation):
    ours = between("cross_entropy mean", activation=activation, pool=POOLS[pool], padding=1)
    assert_same(ours, copied(ours), 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"running": True},
        {"norm": "l2"},
        {"in_front": "batch"},
        {"statistics": "batch"},
        {"channels": (4, 6), "groups": 2, "stride": 2},
        {"bias": False, "padding_mode": "reflect", "padding": 1},
    ],
)
def test_beside_every_other_option(options):
    ours = between("mean", **options)
    assert_same(ours, copied(ours), 1e-10)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("objective", ["cross_entropy mean", "projection"])
def test_precision_is_that_of_torch(objective, dtype, floor):
    exact = between(objective, rows=32, channels=(8, 12), maps=(12, 12), padding=1, optimizer=None, bias=False)
    exact.x = exact.x.bfloat16().double()
    ours, torchs = exact.copy(torch.float32), exact.copy(torch.float32)
    exact.theirs()
    ours.ours(compute_dtype=None if dtype == torch.float32 else dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        torchs.theirs()
    for name, value in exact.state().items():
        assert error(ours.state()[name], value) <= 2 * error(torchs.state()[name], value) + floor, name


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_without_a_graph_is_that_with_one(training):
    case = between("cross_entropy mean", padding=1, pool=2)
    layer = case.layer.train(training)
    before = deepcopy(dict(layer.named_buffers()))
    y = layer(case.x)
    ff.goodness_loss(layer.goodness(case.x), None, layer.objective, labels=case.side).backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(layer(case.x), y)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    case.optimizer = None
    case.ours()
    for name, value in case.state().items():
        assert error(value, gradients[name], 1e-3) <= 1e-10, name


class MonoForward(nn.Module):
    """Convolution, batch normalisation, ReLU; the averaged map times `m` are scores; the pool is for the next."""

    def __init__(self, layer: ff.FFConv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, dtype=torch.float64)
        self.conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        self.norm = deepcopy(layer.product_norm)
        self.m = nn.Parameter(layer.objective.weight.detach().t().clone())
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv(x)
        a = F.relu(z if self.norm is None else self.norm(z))
        scores = a.mean((2, 3)) @ self.m
        loss = F.cross_entropy(scores, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return F.max_pool2d(a, 2).detach(), loss.detach()


@pytest.mark.parametrize("batch_norm", [None, "between"])
def test_mono_forwards_network(batch_norm):
    torch.manual_seed(0)
    options = {"padding": 1, "batch_norm": batch_norm, "dtype": torch.float64}
    layers = [ff.FFConv2d(*of, 3, objective=ff.ProjectionHead(5), **options) for of in ((3, 8), (8, 12))]
    net = ff.FFNetwork([layers[0], nn.MaxPool2d(2), layers[1]])
    theirs = [MonoForward(layer) for layer in layers]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(5):
        x = h = torch.randn(16, 3, 8, 8, dtype=torch.float64)
        labels = torch.randint(5, (16,))
        for result, other in zip(net.step(x, None, optimizer, labels=labels), theirs, strict=True):
            h, loss = other.step(h, labels)
            assert error(result.loss, loss) <= 1e-10
    for layer, other in zip(layers, theirs, strict=True):
        # Behind a convolution the bias's gradient is rounding alone, which Adam makes full steps of.
        if batch_norm is None:
            assert error(layer.bias, other.conv.bias) <= 1e-10
        assert error(layer.objective.weight.t(), other.m) <= 1e-8
        assert error(layer.weight, other.conv.weight) <= 1e-8
        for name, value in {} if other.norm is None else other.norm.state_dict().items():
            assert "mean" in name or error(layer.product_norm.state_dict()[name], value) <= 1e-8, name
    net.eval()
    scores = sum(net.goodness(x)[:, i] for i in range(2))
    assert torch.equal(net.predict(x), scores.argmax(1))


def test_a_frozen_layer_follows_its_input():
    layer = ff.FFConv2d(1, 4, 3, batch_norm="between", objective=ff.Objective(loss="pvn", classes=2))
    net = ff.FFNetwork([layer]).requires_grad_(False)
    x, before = torch.rand(8, 1, 6, 6) + 2, deepcopy(net.state_dict())
    net.step(x, None, None, labels=torch.arange(8) % 2)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"layers.0.product_norm.{name}" for name in buffers}


def test_what_does_not_fit_is_named():
    x, step = torch.rand(4, 2, 6, 6), {"objective": ff.Objective(threshold=0.5)}
    layer = ff.FFConv2d(2, 4, 3, batch_norm="between", **step)
    before = deepcopy(layer.state_dict())
    sgd = torch.optim.SGD([layer.weight, layer.bias], lr=0.1)
    for options, match in (
        ({}, "does not hold product_norm.weight"),
        ({"product_norm": nn.BatchNorm2d(3)}, "product_norm has 3 features; accepted: 4"),
        ({"backend": "native"}, "backend='native' came with product_norm"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.step(x, x, sgd, **options)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with pytest.raises(TypeError, match="product_norm is a GroupNorm"):
        layer.step(x, x, sgd, product_norm=nn.GroupNorm(2, 4))
    single = ff.FFConv2d(2, 4, 3, batch_norm="between", **step)
    with pytest.raises(ValueError, match="no variance for product_norm"):
        single.step(x[:1, :, :3, :3], x[:0, :, :3, :3], None)
    with pytest.raises(ValueError, match="batch_norm='beside'"):
        ff.FFConv2d(2, 4, 3, batch_norm="beside")
