"""Convolutional layers: step, layer and network against autograd on PyTorch's own operations."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import ffkernels as ff
from ffkernels.backends.eager import conv
from ffkernels.functional.maps import ConvOptions
from ffkernels.spec import MapRows

from .conv_cases import OBJECTIVES, RULES, Case, cases, definition, drawn_case, judged, made, of_maps, sensitivity
from .steps import OPTIMIZERS, error


def assert_same(ours: Case, theirs: Case, tolerance: float, steps: int = 2) -> None:
    """Steps of both leave the same behind."""
    for _ in range(steps):
        result = ours.ours()
        y, goodness, loss = theirs.theirs()
    expected = {"y": y, "sumsq": y.square().sum((1, 2, 3)), "goodness": goodness, "loss": loss}
    for name, value in expected.items():
        assert error(getattr(result, name), value, 1.0) <= tolerance, name
    found, known = ours.state(), theirs.state()
    assert found.keys() == known.keys()
    for name, value in known.items():
        assert found[name].shape == value.shape
        assert error(found[name], value, 1.0) <= tolerance, name


@given(cases())
@settings(max_examples=250, deadline=None)
def test_a_step_is_that_of_autograd(drawn):
    ours = drawn_case(drawn)
    # What is equal or zero is so by a step's rounding alone after one.
    assert_same(ours, ours.copy(), 1e-11 * max(10.0, sensitivity(ours)), steps=1 if drawn["ties"] else 2)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("optimizer", RULES)
def test_every_objective_under_every_optimizer(objective, optimizer):
    ours = made(objective, optimizer=optimizer, padding=1, pool=2, statistics="batch")
    assert_same(ours, ours.copy(), 1e-10, steps=3)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_channels_without_variance(activation):
    """One that never fires, one that is constant, and one far from zero."""
    ours = made("cross_entropy mean", activation=activation, statistics="batch", padding=1, optimizer="sgd")
    with torch.no_grad():
        ours.layer.weight[:2] = 0
        ours.layer.bias[:3] = torch.tensor([-1.0, 3.0, 100.0])
        ours.layer.batch_norm.weight[1] = -2.0
    assert_same(ours, ours.copy(), 1e-10, steps=1)


def test_a_mean_far_from_zero_keeps_its_digits():
    """In float32, where sums of squares alone would have lost the variance."""
    exact = made("cross_entropy mean", statistics="batch", optimizer=None, rows=16, activation="identity")
    with torch.no_grad():
        exact.layer.bias.fill_(1000.0)
        exact.layer.batch_norm.weight.fill_(1.0)
    ours, torchs = exact.copy(torch.float32), exact.copy(torch.float32)
    ours.ours(), torchs.theirs(), exact.theirs()
    for name, value in exact.state().items():
        if name != "bias":  # it has no gradient behind a batch normalisation, but noise
            assert error(ours.state()[name], value) <= 2 * error(torchs.state()[name], value) + 1e-6, name


@pytest.mark.parametrize("statistics", [None, "batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("objective", ["mean", "symba", "cross_entropy mean", "projection"])
def test_no_row(objective, statistics, optimizer):
    case = made(objective, rows=0, padding=1, pool=2, statistics=statistics, optimizer=optimizer, norm="l2")
    before = {name: value.clone() for name, value in case.layer.state_dict().items() if "tracked" not in name}
    result = case.ours()
    assert result.y.shape == (0, 5, 3, 3)
    assert float(result.loss) == 0
    for name, value in before.items():
        assert torch.equal(case.layer.state_dict()[name], value), name


PRECISIONS = [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)]


@pytest.mark.parametrize(("dtype", "floor"), PRECISIONS)
@pytest.mark.parametrize("statistics", [None, "batch"])
@pytest.mark.parametrize("norm", ["none", "l2"])
@pytest.mark.parametrize("objective", ["mean", "symba", "cross_entropy mean", "cross_entropy activity", "projection"])
def test_precision_is_that_of_torch(objective, norm, statistics, dtype, floor):
    """At most twice the error of plain PyTorch in the same dtype; `floor`: what one number more or less may make.

    In the mean square over draws, a gradient's parts being few; in float32 in their median, as the rare ReLU or pool
    that rounding turns over weighs more there than all rounding together.
    """
    pool = 2 if statistics else nn.AvgPool2d(2)
    options = {"rows": 32, "channels": (8, 12), "maps": (12, 12), "padding": 1, "pool": pool, "optimizer": None}
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(4):
        exact = made(objective, norm=norm, statistics=statistics, **options)
        exact.x = exact.x.bfloat16().double()
        ours, torchs = exact.copy(torch.float32), exact.copy(torch.float32)
        exact.theirs()
        ours.ours(compute_dtype=None if dtype == torch.float32 else dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = definition(torchs.layer, torchs.x).float()
        judged(torchs.layer.objective, y, torchs.side, None)[1].backward()
        for name, value in exact.state().items():
            of = error(ours.state()[name], value), error(torchs.state()[name], value)
            errors.setdefault(name, []).append(of)
    for name, found in errors.items():
        squares = torch.tensor(found).square()
        typical = squares.quantile(0.5, 0) if dtype == torch.float32 else squares.mean(0)
        of_ours, of_torchs = typical.sqrt().tolist()
        assert of_ours <= 2 * of_torchs + floor, (name, found)


def cwg(goodness: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """CwC's fourth loss, of two of the others."""
    pvn = ff.goodness_loss(goodness, None, ff.Objective(loss="pvn", classes=10), labels=labels)
    return 0.28 * torch.nn.functional.cross_entropy(goodness, labels) + 0.72 * pvn


def network(loss: str, dtype: torch.dtype = torch.float32, pool=2, **options) -> ff.FFNetwork:
    """CwC's CIFAR network (Papachristodoulou et al., 2024), with fewer channels."""
    torch.manual_seed(3)
    objective = ff.GivenLoss(cwg, classes=10) if loss == "cwg" else ff.Objective(loss=loss, classes=10)
    options = {"padding": 1, "dtype": dtype, "batch_norm": "behind", "objective": objective, **options}
    net = ff.FFNetwork(
        [
            ff.FFConv2d(3, 20, 3, **options),
            ff.FFConv2d(20, 40, 3, groups=10, pool=pool, **options),
            ff.FFConv2d(40, 60, 3, **options),
            ff.FFConv2d(60, 80, 3, groups=10, pool=pool, **options),
        ]
    )
    for layer in net:
        layer.batch_norm.eps = 1e-4
    return net


def by_autograd(net: ff.FFNetwork, optimizers, x, labels) -> list[torch.Tensor]:
    """One step of every layer on what the one below was before its own."""
    losses = []
    for layer, optimizer in zip(net, optimizers, strict=True):
        optimizer.zero_grad()
        y = definition(layer, x)
        losses.append(judged(layer.objective, y, labels, None)[1])
        losses[-1].backward()
        optimizer.step()
        x = y.detach()
    return losses


# Over fifty steps in float32 units change sides and windows their winners, which moves PyTorch's own steps by 5e-3 from
# those in float64: there the network is a smooth one.
SMOOTH = {"dtype": torch.float32, "activation": "gelu", "pool": nn.AvgPool2d(2)}


@pytest.mark.parametrize("loss", ["cross_entropy", "pvn", "cwc", "cwg"])
@pytest.mark.parametrize(("options", "tolerance"), [(SMOOTH, 1e-5), ({"dtype": torch.float64}, 1e-10)])
def test_fifty_steps_of_cwcs_network(loss, options, tolerance):
    ours = network(loss, **options)
    theirs = deepcopy(ours)
    optimizers = [[OPTIMIZERS["adam"](layer.parameters()) for layer in net] for net in (ours, theirs)]
    for _ in range(50):
        x, labels = torch.randn(16, 3, 8, 8, dtype=options["dtype"]), torch.randint(10, (16,))
        results = ours.step(x, None, optimizers[0], labels=labels)
        losses = by_autograd(theirs, optimizers[1], x, labels)
        for result, expected in zip(results, losses, strict=True):
            assert error(result.loss, expected) <= tolerance
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert error(p, q, 1.0) <= tolerance, name


def test_fifty_steps_of_it_end_as_near_to_float64_as_torchs():
    """With units that change sides and windows that change winners: in the median over losses, at most twice as far.

    A unit that changes sides in one of the two alone leaves it thousands of times as far from there on: no mean holds.
    """
    ratios = []
    for loss in ("cross_entropy", "pvn", "cwc", "cwg"):
        ours = network(loss)
        theirs, exact = deepcopy(ours), deepcopy(ours).double()
        nets = (ours, theirs, exact)
        optimizers = [[OPTIMIZERS["adam"](layer.parameters()) for layer in net] for net in nets]
        for _ in range(50):
            x, labels = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
            ours.step(x, None, optimizers[0], labels=labels)
            by_autograd(theirs, optimizers[1], x, labels)
            by_autograd(exact, optimizers[2], x.double(), labels)
        for one, other, known in zip(*(net.parameters() for net in nets), strict=True):
            ratios.append(error(one, known, 1.0) / error(other, known, 1.0))
    assert torch.tensor(ratios).median() <= 2


def test_rows_in_any_order_are_the_same_step():
    for objective in ("mean", "symba"):
        ours = made(objective, padding=1, pool=2, optimizer=None)
        order = torch.randperm(6)
        mixed = ours.copy()
        expected = ours.ours()
        result = mixed.layer.step(mixed.x[order], None, None, is_positive=mixed.side[order])
        if objective == "mean":
            torch.testing.assert_close(result.goodness, expected.goodness[order])
            for p, q in zip(ours.layer.parameters(), mixed.layer.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
        else:
            positive, negative = mixed.x[order][mixed.side[order]], mixed.x[order][~mixed.side[order]]
            again = ours.layer.step(positive, negative, None)
            torch.testing.assert_close(result.loss, again.loss)
            for p, q in zip(ours.layer.parameters(), mixed.layer.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("pool", [None, 2, nn.AvgPool2d(2)])
@pytest.mark.parametrize("norm", ["none", "l2"])
def test_saturated_rows_are_left_out(norm, pool):
    """Those that skip_below leaves out are as good as not there."""
    ours = made("cross_entropy mean", rows=40, padding=1, norm=norm, pool=pool, optimizer="sgd")
    goodness = ours.copy().ours().goodness
    steepest = (goodness.softmax(1) - torch.nn.functional.one_hot(ours.side, 3)).abs().amax(1)
    below = float(steepest.median()) + 1e-9
    gone = steepest < below
    assert 5 < int(gone.sum()) < 35
    weighted = ours.copy()
    weighted.sample_weight = (~gone).double()
    ours.ours(skip_below=below)
    weighted.ours()
    for p, q in zip(ours.layer.parameters(), weighted.layer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_maps_are_channels_last_whatever_came():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(5)
        case = made("cross_entropy mean", padding=1, dtype=torch.float32)
        case.x = case.x.contiguous(memory_format=layout)
        result = case.ours()
        assert result.y.is_contiguous(memory_format=torch.channels_last)
        found.append((result.y, *case.layer.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_weight_may_be_channels_last():
    ours = made("mean", channels=(4, 6), optimizer=None)
    theirs = ours.copy()
    ours.layer.to(memory_format=torch.channels_last)
    for case in (ours, theirs):
        case.optimizer = torch.optim.AdamW(case.layer.parameters(), lr=0.01)
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("statistics", [None, "batch", "running"])
def test_gradients_of_a_forward_pass(statistics):
    case = made("mean", padding=1, pool=2, norm="l2", statistics=statistics)
    layer, x = case.layer, case.x.requires_grad_()
    y, sumsq = layer.activity(x)
    expected = definition(layer, x.detach())
    assert error(y, expected) <= 1e-12
    toward = torch.randn_like(expected)
    ours = torch.autograd.grad((y * toward).sum() + sumsq.tanh().sum(), list(layer.parameters()))
    loss = (expected * toward).sum() + expected.square().sum((1, 2, 3)).tanh().sum()
    for one, other in zip(ours, torch.autograd.grad(loss, list(layer.parameters())), strict=True):
        assert error(one, other, 1.0) <= 1e-12
    y, _ = layer.activity(x)
    y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("objective", ["mean", "cross_entropy mean", "cross_entropy activity", "projection"])
def test_goodness_is_that_of_a_step(objective):
    case = made(objective, padding=1, pool=2, statistics="batch")
    goodness = case.layer.goodness(case.x)
    torch.testing.assert_close(goodness, case.ours().goodness)


def test_parameters_are_those_of_torch():
    torch.manual_seed(7)
    ours = ff.FFConv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2)
    torch.manual_seed(7)
    theirs = nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert isinstance(ours, nn.Conv2d)


@pytest.mark.parametrize("stride", [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [1, (1, 2)])
def test_strided_points_of_few_channels(kernel, stride):
    """Of such maps channels-last oneDNN's gradient for a kernel of one place writes beyond its memory."""
    torch.manual_seed(0)
    single = ff.FFConv2d(2, 3, kernel, stride=stride, objective=ff.Objective(threshold=0.5))
    exact = ff.FFConv2d(2, 3, kernel, stride=stride, objective=ff.Objective(threshold=0.5), dtype=torch.float64)
    exact.load_state_dict(single.state_dict())
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (single, exact)]
    for _ in range(10):
        x_pos, x_neg = torch.randn(2, 8, 2, 10, 5)
        single.step(x_pos, x_neg, optimizers[0])
        exact.step(x_pos.double(), x_neg.double(), optimizers[1])
    assert error(single.weight, exact.weight) <= 1e-5


def test_autograd_hears_of_a_step():
    """What was computed with the weight before cannot be differentiated after."""
    case = made("mean", optimizer="adam")
    y, _ = case.layer.activity(case.x)
    case.ours()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_on_a_gradient_are_called():
    ours = made("mean", optimizer="sgd")
    before = ours.layer.weight.detach().clone()
    plain = ours.copy()
    plain.ours()
    ours.layer.weight.register_hook(lambda gradient: 2 * gradient)
    ours.ours()
    torch.testing.assert_close(ours.layer.weight - before, 2 * (plain.layer.weight - before))


def test_autocast_says_the_compute_dtype():
    case = made("mean", dtype=torch.float32, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.ours().y.dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {"pool": 2, "padding": 1, "norm": "l2"},
        {"pool": nn.AvgPool2d(2), "activation": "leaky_relu"},
        {"activation": "gelu", "in_front": "batch", "padding": 1},
        {"channels": (4, 6), "groups": 2, "stride": 2},
    ],
)
def test_a_loss_of_the_maps_themselves(options, optimizer):
    ours = made("given sides", optimizer=optimizer, **options)
    ours.layer.objective = ff.GivenLoss(of_maps, reads="activities")
    theirs = ours.copy()
    for _ in range(3):
        result = ours.ours()
        theirs.layer.zero_grad()
        y = definition(theirs.layer, theirs.x)
        loss = of_maps(y, theirs.side)
        loss.backward()
        theirs.optimizer.step()
        assert error(result.loss, loss) <= 1e-10 and error(result.y, y) <= 1e-10
    for name, value in theirs.state().items():
        assert error(ours.state()[name], value, 1.0) <= 1e-9, name


BAD = [
    ({"outputs": "post"}, "outputs='post' came to a convolution, which would have to run again"),
    ({"stride": 0}, "stride=0; accepted: an integer >= 1 or a pair of them"),
    ({"padding": (1, -1)}, r"padding=\(1, -1\); accepted: an integer >= 0"),
    ({"padding_mode": "circular"}, "padding_mode='circular' is not one of 'zeros', 'reflect'"),
    ({"padding_mode": "reflect", "padding": 6}, r"padding=\(6, 6\) reflects more than the maps \(6, 6\) of x_pos hold"),
    ({"groups": 2}, r"x_pos has shape \(4, 2, 6, 6\); accepted: \[rows, 4, height, width\]"),
    ({"groups": 3}, "groups=3 does not divide the 4 output channels"),
    ({"pool": 7}, r"the pool \(7, 7\) is larger than the maps \(4, 4\) of x_pos"),
    ({"pool": 0}, "pool=0; accepted: None, nn.MaxPool2d, nn.AvgPool2d, or an integer >= 1"),
    ({"pool": nn.MaxPool2d(2, padding=1)}, "pool has padding=1; accepted: 0"),
    ({"pool": nn.AvgPool2d(2, ceil_mode=True)}, "pool has ceil_mode=True; accepted: False"),
    ({"activation": "tanh"}, "activation='tanh' is not one of"),
    ({"compute_dtype": torch.float16}, "compute_dtype=torch.float16 came to a convolution"),
    ({"x_pos": torch.ones(4, 2, 2, 6)}, r"maps of \(2, 6\), smaller than the kernel \(3, 3\)"),
    ({"x_pos": torch.ones(4, 3, 6, 6)}, r"x_pos has shape \(4, 3, 6, 6\); accepted: \[rows, 2, height, width\]"),
    ({"x_pos": torch.ones(4, 72)}, r"x_pos has shape \(4, 72\); accepted"),
    ({"x_pos": torch.ones(4, 2, 6, 6).double()}, "x_pos is torch.float64; accepted: torch.float32"),
    ({"x_neg": torch.ones(4, 2, 6, 7)}, r"x_neg has maps of \(2, 6, 7\); accepted: \(2, 6, 6\)"),
    ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels came with an objective without classes"),
    ({"objective": ff.Objective(loss="symba"), "x_neg": torch.ones(3, 2, 6, 6)}, "pairs rows but there are 4 positive"),
    (
        {"objective": ff.GivenLoss(lambda y, side: y.sum(), "activities"), "batch_norm": nn.BatchNorm2d(4)},
        "objective reads 'activities' but came with batch_norm",
    ),
    (
        {"objective": ff.GivenLoss(lambda y, side: y.sum(), "activities"), "backend": "triton"},
        "backend='triton' cannot run this call: a loss of whole maps",
    ),
    ({"batch_norm": nn.BatchNorm1d(4)}, "batch_norm is a BatchNorm1d; accepted: a torch.nn.BatchNorm2d"),
    ({"batch_norm": nn.BatchNorm2d(5)}, "batch_norm has 5 features; accepted: 4"),
    ({"batch_norm": nn.BatchNorm2d(4)}, r"does not hold batch_norm.weight \(4,\)"),
    ({"skip_below": 2}, "skip_below=2 is not in 0..1"),
    ({"weight": torch.ones(4, 2, 3)}, r"weight has shape \(4, 2, 3\); accepted: \[out, in / groups, height, width\]"),
    ({"weight": torch.ones(4, 2, 3, 3)}, "weight has requires_grad=False"),
    ({"sample_weight": torch.ones(3)}, r"sample_weight has shape \(3,\); accepted: \(8,\)"),
    ({"input_sumsq": torch.ones(3)}, r"input_sumsq has shape \(3,\); accepted: \(8,\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_fit_is_named(change, message):
    layer = nn.Conv2d(2, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    given = {"x_pos": torch.ones(4, 2, 6, 6), "x_neg": torch.ones(4, 2, 6, 6), "weight": layer.weight, **change}
    before = layer.weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match=message):
        ff.conv2d_step_(given.pop("x_pos"), given.pop("x_neg"), given.pop("weight"), layer.bias, optimizer, **given)
    assert torch.equal(layer.weight, before)


def test_one_place_has_no_variance():
    layer = ff.FFConv2d(2, 4, 3, batch_norm="behind")
    with pytest.raises(ValueError, match="x_pos has 1 row, which has no variance"):
        layer.step(torch.ones(1, 2, 3, 3), torch.ones(0, 2, 3, 3), None)


def test_goodness_is_that_of_an_overridden_forward():
    class Scaled(ff.FFConv2d):
        def forward(self, input):
            return super().forward(input) * 1.5

    layer, x = Scaled(2, 4, 3, dtype=torch.float64), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.goodness(x), layer(x).square().mean((1, 2, 3)), rtol=1e-10, atol=0)


def test_a_layer_that_hooks_watch_raises():
    layer = ff.FFConv2d(2, 4, 3)
    layer.register_forward_hook(lambda module, given, y: None)
    with pytest.raises(ValueError, match="watched by hooks or overridden"):
        layer.step(torch.ones(2, 2, 5, 5), torch.ones(2, 2, 5, 5), None)


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_products_are_rounded_once(groups):
    """Forward, for the weight and for the input: sums of rounded operands are float32's until they are handed on."""
    weight, x, dz = (torch.randn(of).bfloat16().double() for of in ((6, 8 // groups, 3, 3), (5, 8, 7, 6), (5, 6, 7, 6)))
    options = ConvOptions(1, 1, "zeros", groups, None, "none", 0.0, "add", "relu", None, None, torch.bfloat16, None)
    layer, geometry = options.checked(weight.float(), None)
    wide = layer._replace(weight=weight, compute_dtype=torch.float64)
    narrow = MapRows(x.bfloat16().contiguous(memory_format=torch.channels_last), None)
    found = [
        (conv.product(narrow, layer, geometry), conv.product(MapRows(x, None), wide, geometry)),
        (conv.by_weight(dz.bfloat16(), narrow.x, layer, geometry), conv.by_weight(dz, x, wide, geometry)),
        (conv.by_input(dz.bfloat16(), narrow.x, layer, geometry), conv.by_input(dz, x, wide, geometry)),
    ]
    for ours, exact in found:
        assert torch.all((ours.double() - exact).abs() <= exact.abs() / 256 + 1e-5 * exact.abs().max())
