"""What normalises a convolution's input: its gradients without one of the input, its statistics, what is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import ffkernels as ff
from ffkernels.functional import in_front

from .conv_cases import RULES, made
from .steps import OPTIMIZERS, error
from .test_conv import assert_same


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("objective", ["symba", "mean", "cross_entropy mean", "projection"])
def test_many_steps_are_those_of_autograd(objective, optimizer):
    """Trifecta's block: batch normalisation, a convolution without bias, ReLU, pool."""
    ours = made(objective, optimizer=optimizer, in_front="batch", padding=1, pool=2, bias=False)
    assert_same(ours, ours.copy(), 1e-9, steps=50)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_weights_of_any_sign(value):
    ours = made("mean", in_front="batch", padding=1, optimizer="adam")
    with torch.no_grad():
        ours.layer.input_norm.weight.fill_(value)
    assert_same(ours, ours.copy(), 1e-10, steps=2)


def test_a_channel_without_variance_and_one_far_from_zero():
    ours = made("cross_entropy mean", in_front="batch", padding=1)
    ours.x[:, 0] = 3.0
    ours.x[:, 1] += 1000.0
    assert_same(ours, ours.copy(), 1e-9, steps=1)


@pytest.mark.parametrize("in_front", ["batch", "running", "layer", "group"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_bfloat16_is_as_near_as_autocasts(in_front, backend):
    exact = made("cross_entropy mean", rows=32, channels=(8, 12), maps=(12, 12), padding=1, in_front=in_front)
    exact.x = exact.x.bfloat16().double()
    ours, torchs = exact.copy(torch.float32), exact.copy(torch.float32)
    ours.ours(compute_dtype=torch.bfloat16, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        torchs.theirs()
    exact.theirs()
    for name, value in exact.state().items():
        theirs = error(torchs.state()[name], value)
        assert error(ours.state()[name], value) <= 2 * theirs + 1e-3, (name, theirs)


def test_statistics_are_of_both_sides_and_move_once_a_step():
    layer = ff.FFConv2d(3, 4, 3, batch_norm="before")
    norm, plain = layer.input_norm, nn.BatchNorm2d(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(6, 3, 7, 7) + step
        before = x.clone()
        plain(x)
        layer.step(x[:3], x[3:], optimizer)
        assert torch.equal(x, before)
        with torch.no_grad():
            layer(x), layer.goodness(x)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), value)


def test_a_layer_that_does_not_learn_follows_its_input():
    net = ff.FFNetwork([ff.FFConv2d(1, 4, 3, batch_norm="before", objective=ff.Objective(loss="pvn", classes=2))])
    net.requires_grad_(False)
    x = torch.rand(8, 1, 6, 6) + 2
    before = deepcopy(net.state_dict())
    net.step(x, None, None, labels=torch.arange(8) % 2)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"layers.0.input_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("in_front", ["batch", "layer", "group"])
def test_a_forward_pass_without_a_graph_is_that_with_one(in_front, training):
    case = made("cross_entropy mean", in_front=in_front, padding=1, pool=2, dtype=torch.float32)
    layer = case.layer.train(training)
    y = layer(case.x)
    loss = ff.goodness_loss(layer.goodness(case.x), None, layer.objective, labels=case.side)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(layer(case.x), y)
    if training:
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        case.optimizer = None
        case.ours()
        for name, value in case.state().items():
            assert error(value, gradients[name], 1e-3) <= 1e-5, name


def test_a_network_hands_on_and_predicts_by_running_statistics():
    torch.manual_seed(1)
    of_classes = {"objective": ff.Objective(loss="cross_entropy", classes=2), "batch_norm": "before", "padding": 1}
    net = ff.FFNetwork([ff.FFConv2d(1, 4, 3, pool=2, **of_classes), ff.FFConv2d(4, 6, 3, **of_classes)])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    labels = torch.arange(64) % 2
    x = torch.rand(64, 1, 8, 8) + labels[:, None, None, None] * torch.linspace(0, 1, 8)
    for _ in range(60):
        net.step(x, None, optimizer, labels=labels)
    net.eval()
    assert (net.predict(x) == labels).all()
    torch.testing.assert_close(net.goodness(x)[:5], net.goodness(x[:5]), rtol=1e-4, atol=1e-5)


def refused(**options):
    layer = ff.FFConv2d(4, 6, 3, **options)
    x = torch.rand(2, 4, 6, 6)
    layer.step(x, x.flip(3), torch.optim.SGD(layer.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_norm": nn.GroupNorm(2, 4)}, "input_norm has parameters of its own"),
        ({"input_norm": nn.LayerNorm([4, 6, 6])}, "input_norm has parameters of its own"),
        ({"input_norm": nn.LayerNorm([6, 6], elementwise_affine=False)}, r"normalized_shape=\(6, 6\)"),
        ({"input_norm": nn.GroupNorm(2, 6, affine=False)}, "input_norm has 6 channels; accepted: 4"),
        ({"input_norm": nn.BatchNorm2d(6)}, "input_norm has 6 features; accepted: 4"),
        ({"input_norm": nn.BatchNorm2d(4), "norm": "l2"}, "norm='l2' came with input_norm"),
        ({"input_norm": nn.BatchNorm2d(4), "batch_norm": "before"}, "batch_norm='before' came with input_norm"),
        ({"batch_norm": "beside"}, "batch_norm='beside'"),
    ],
)
def test_what_does_not_fit_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        refused(**options)


def test_another_kind_of_module_is_refused():
    with pytest.raises(TypeError, match="input_norm is a InstanceNorm2d"):
        refused(input_norm=nn.InstanceNorm2d(4))
    with pytest.raises(TypeError, match="input_norm is a str"):
        ff.FFConv2d(3, 4, 3, input_norm="x")
    with pytest.raises(TypeError, match="input_norm is a str"):
        ff.conv2d_forward(torch.rand(1, 3, 5, 5), torch.rand(4, 3, 3, 3), input_norm="x")


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_nothing_is_written_before_a_refusal(backend):
    layer = ff.FFConv2d(2, 4, 3, batch_norm="before", backend=backend)
    x = torch.rand(4, 2, 6, 6)
    before = deepcopy(layer.state_dict())
    for optimizer, wrong, match in (
        (torch.optim.SGD([layer.weight, layer.bias], lr=0.1), x, "input_norm.weight"),
        (torch.optim.SGD(layer.parameters(), lr=0.1), x[:, :1], r"x_pos has shape \(4, 1, 6, 6\)"),
        (torch.optim.SGD(layer.parameters(), lr=0.1), x.double(), "x_pos is torch.float64"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            layer.step(wrong, wrong, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    single = ff.FFConv2d(2, 4, 1, batch_norm="before")
    with pytest.raises(ValueError, match="no variance for input_norm"):
        single.step(x[:1, :, :1, :1], x[:0, :, :1, :1], None)


def test_no_row_and_rows_without_slopes():
    layer = ff.FFConv2d(2, 4, 3, batch_norm="before", objective=ff.Objective(threshold=0.0))
    optimizer = OPTIMIZERS["sgd"](list(layer.parameters()))
    before = deepcopy(layer.state_dict())
    nothing = torch.rand(0, 2, 6, 6)
    layer.step(nothing, nothing, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    # Rows far on the right side have slopes of zero, and those that are left decide alone.
    exact = made("norm", in_front="batch", rows=8, optimizer=None)
    exact.sample_weight = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 2], dtype=torch.float64)
    assert_same(exact, exact.copy(), 1e-10, steps=1)


@pytest.mark.parametrize(("offset", "is_told"), [(0.0, True), (2.0, True), (4.0, False)])
def test_statistics_by_sums_are_as_near_to_float64(offset, is_told):
    x = (torch.randn(64, 5, 16, 16) + offset).contiguous(memory_format=torch.channels_last)
    found = in_front._by_sums(x.sum((2, 3)), x.square().sum((2, 3)), 64 * 256)
    assert (found is not None) == is_told
    if found is not None:
        exact, plain = in_front._statistics(x.double(), torch.float64), in_front._statistics(x, torch.float32)
        for name, ours, theirs, value in zip(("mean", "variance"), found, plain, exact, strict=True):
            assert error(ours, value) <= 2 * error(theirs, value) + 1e-6, name
