"""Self-contrastive layers: the step of one product against autograd on four, greedy training, what is refused."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff

from .steps import OPTIMIZERS, error


def standardised(x: Tensor) -> Tensor:
    places = (1, 2, 3)
    return (x - x.mean(places, keepdim=True)) / (1e-10 + x.std(places, keepdim=True))


def side(layer: ff.SCFFConv2d, one: Tensor, other: Tensor) -> Tensor:
    """A pair in front of the activation, as its authors write it: two convolutions."""
    (down, across), mode = layer.padding, layer.padding_mode
    mode = "reflect" if mode == "reflect" else "constant"
    pair = standardised(F.pad(torch.cat([one, other], 1), (across, across, down, down), mode=mode))
    return sum(F.conv2d(half, layer.weight, layer.bias, layer.stride) for half in pair.chunk(2, 1))


def definition(layer: ff.SCFFConv2d, x: Tensor, partners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ScffResult` of differentiable tensors."""
    x = standardised(x)
    z_pos, z_neg = side(layer, x, x), side(layer, x, x[partners])
    g_pos, g_neg = z_pos.relu().pow(2).mean(1), z_neg.relu().pow(2).mean(1)
    zero = z_pos.new_zeros(())
    loss = torch.logaddexp(zero, layer.thresholds[0] - g_pos).mean((1, 2)).mean()
    loss = loss + torch.logaddexp(zero, g_neg - layer.thresholds[1]).mean((1, 2)).mean()
    loss = loss + layer.penalty * torch.norm(g_pos, p=2, dim=(1, 2)).mean()
    return z_pos, g_pos.mean((1, 2)), g_neg.mean((1, 2)), loss


def by_autograd(layer: ff.SCFFConv2d, x: Tensor, partners: Tensor, optimizer: Any) -> tuple[Tensor, ...]:
    layer.zero_grad()
    result = definition(layer, x, partners)
    result[-1].backward()
    if optimizer is not None:
        optimizer.step()
    return result


def made(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[ff.SCFFConv2d, Tensor]:
    torch.manual_seed(0)
    given = {"padding": 2, "thresholds": (0.5, 1.5), "penalty": 0.01, **options}
    layer = ff.SCFFConv2d(3, 10, 5, dtype=dtype, **given)
    return layer, torch.randn(8, 3, 9, 8, dtype=dtype) * 2 + 1


SHIFTED = (torch.arange(8) + 3) % 8


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": 0.0, "bias": False},
        {"padding_mode": "zeros", "stride": 2},
        {"padding": (1, 0), "stride": (1, 2)},
        {"padding": 0},
    ],
)
def test_a_step_is_that_of_autograd(options, optimizer):
    ours, x = made(**options)
    theirs = deepcopy(ours)
    of_ours, of_theirs = OPTIMIZERS[optimizer](ours.parameters()), OPTIMIZERS[optimizer](theirs.parameters())
    for _ in range(3):
        found = ours.step(x, of_ours, SHIFTED)
        for name, value in zip(found._fields, by_autograd(theirs, x, SHIFTED, of_theirs), strict=True):
            assert error(getattr(found, name), value, 1.0) <= 1e-10, name
    for name, value in theirs.state_dict().items():
        assert error(ours.state_dict()[name], value) <= 1e-10, name


def test_partners_may_be_any_rows():
    """One row beside several, and beside itself."""
    ours, x = made()
    theirs, partners = deepcopy(ours), torch.tensor([1, 1, 1, 3, 0, 7, 7, 7])
    ours.step(x, None, partners)
    by_autograd(theirs, x, partners, None)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert error(mine.grad, other.grad) <= 1e-10


def test_a_row_that_fires_nowhere_and_one_without_variance():
    ours, x = made(bias=True)
    x[0] = 4.0
    with torch.no_grad():
        ours.bias.fill_(-1.0)
        ours.weight.mul_(0.5)
    theirs = deepcopy(ours)
    assert float(ours.step(x, None, SHIFTED).goodness_pos[0]) == 0
    theirs.penalty = 0.0
    ours.zero_grad()
    ours.penalty = 0.0
    ours.step(x, None, SHIFTED)
    by_autograd(theirs, x, SHIFTED, None)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad.isfinite().all() and error(mine.grad, other.grad) <= 1e-10


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("channels", [3, 16])
def test_precision_is_that_of_torch(channels, dtype, floor):
    torch.manual_seed(1)
    exact = ff.SCFFConv2d(channels, 24, 3, padding=1, dtype=torch.float64, penalty=0.001)
    ours, torchs = deepcopy(exact).float(), deepcopy(exact).float()
    ours.compute_dtype = None if dtype == torch.float32 else dtype
    x, partners = torch.randn(16, channels, 12, 12).relu(), (torch.arange(16) + 5) % 16
    result = by_autograd(exact, x.double(), partners, None)
    found = ours.step(x, None, partners)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        theirs = by_autograd(torchs, x, partners, None)
    pairs = list(zip(found, theirs, result, strict=True))
    parameters = zip(ours.parameters(), torchs.parameters(), exact.parameters(), strict=True)
    for mine, other, known in [*pairs, *((a.grad, b.grad, c.grad) for a, b, c in parameters)]:
        assert error(mine, known) <= 2 * error(other, known) + floor


@pytest.mark.parametrize("hands_on", ["triangle", "relu"])
def test_what_is_handed_on(hands_on):
    pool = nn.MaxPool2d(4, 2, 1, ceil_mode=True)
    layer, x = made(hands_on=hands_on, pool=pool)
    z = side(layer, standardised(x), standardised(x))
    expected = pool(F.relu(z - z.mean(1, keepdim=True) if hands_on == "triangle" else z))
    assert error(layer(x), expected) <= 1e-12
    assert error(layer.hand_on(layer.step(x, None).z), expected) <= 1e-12
    gradient = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert error(gradient, torch.autograd.grad(expected.square().sum(), layer.weight)[0]) <= 1e-10
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_greedy_training_tells_textures_apart_without_labels():
    """Layer after layer, the lower ones as they are; then one linear read-out."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    tiles = torch.randint(2, (4, 1, 4, 4)).float()
    x = tiles.repeat(1, 1, 4, 4)[labels] + torch.rand(200, 1, 16, 16)
    pool = {"pool": nn.AvgPool2d(2), "padding": 1}
    net = nn.Sequential(ff.SCFFConv2d(1, 8, 3, **pool), ff.SCFFConv2d(8, 16, 3, thresholds=(1.0, 2.0), **pool))
    below, losses = x, []
    for layer in net:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        for _ in range(10):
            losses.append([float(layer.step(rows, optimizer).loss) for rows in below.split(50)])
        layer.requires_grad_(False)
        below = layer(below)
    assert sum(losses[9]) < sum(losses[0]) and sum(losses[19]) < sum(losses[10])
    assert torch.equal(net(x), below)
    features = below.mean((2, 3))
    features = (features - features.mean(0)) / features.std(0)
    read_out = torch.linalg.lstsq(features[:100], F.one_hot(labels[:100]).float()).solution
    assert float(((features[100:] @ read_out).argmax(1) != labels[100:]).float().mean()) < 0.05


def test_partners_are_drawn_one_shift_for_all():
    layer, x = made()
    torch.manual_seed(3)
    shift = int(torch.randint(1, 8, ()))
    torch.manual_seed(3)
    mine = layer.step(x, None).goodness_neg
    assert torch.equal(mine, layer.step(x, None, (torch.arange(8) + shift) % 8).goodness_neg)


def test_no_row():
    layer, x = made()
    before = deepcopy(layer.state_dict())
    result = layer.step(x[:0], torch.optim.SGD(layer.parameters(), lr=0.1), SHIFTED[:0])
    assert float(result.loss) == 0 and result.z.shape == (0, 10, 9, 8)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"partners": SHIFTED + 5}, ValueError, "partners hold 12; accepted: 0..7"),
        ({"partners": SHIFTED[:4]}, ValueError, r"partners has shape"),
        ({"partners": SHIFTED.float()}, TypeError, "partners is torch.float32"),
        ({"x": torch.zeros(8, 2, 9, 8).double()}, ValueError, r"x has shape \(8, 2, 9, 8\); accepted: \[rows, 3"),
        ({"x": torch.zeros(8, 3, 9, 8)}, TypeError, "x is torch.float32"),
        ({"thresholds": 1.0}, ValueError, "thresholds=1.0; accepted: a pair"),
        ({"penalty": -1.0}, ValueError, "penalty=-1.0"),
        ({"padding": 9}, ValueError, r"padding=\(9, 9\) reflects more"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, ValueError, "does not hold weight"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(change, kind, match):
    layer, x = made()
    before = deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    given = {"x": x, "partners": SHIFTED, "weight": layer.weight, "bias": layer.bias, "optimizer": optimizer, **change}
    with pytest.raises(kind, match=match):
        ff.scff_step_(**given)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_wrong_layers_are_refused():
    with pytest.raises(ValueError, match="hands_on='leaky'"):
        ff.SCFFConv2d(3, 4, 3, hands_on="leaky")
    with pytest.raises(TypeError, match="pool is a int"):
        ff.SCFFConv2d(3, 4, 3, pool=2)
    with pytest.raises(ValueError, match="x has 1 rows"):
        ff.SCFFConv2d(3, 4, 3).step(torch.rand(1, 3, 8, 8), None)
    watched = ff.SCFFConv2d(3, 4, 3)
    watched.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the layer has hooks"):
        watched.step(torch.rand(2, 3, 8, 8), None)
