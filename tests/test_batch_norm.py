"""Batch normalisation behind a layer: its step against PyTorch's own module under autograd."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends import select

from .steps import OPTIMIZERS, error

NATIVE = select.load("native").library.load().library is not None
PLACES = [
    ("eager", torch.float64, 1e-10),
    ("eager", torch.float32, 5e-5),
    *([("native", torch.float32, 5e-5)] if NATIVE else []),
]
OBJECTIVES = {
    "sides": ff.Objective(goodness="sum", threshold=3.0),
    "pairs": ff.Objective(loss="symba"),
    "classes": ff.Objective(loss="cross_entropy", classes=3),
    "activity": ff.Objective(loss="cross_entropy", classes=3, goodness="activity"),
    "own": ff.GivenLoss(lambda y, side: (y.tanh() * torch.linspace(-1, 1, 7, dtype=y.dtype)).mean(), "activities"),
}


def loss_of(objective, u: Tensor, side: Tensor) -> Tensor:
    if isinstance(objective, ff.GivenLoss):
        return objective.function(u, side)
    if objective.classes is not None:
        return reference.class_loss_of(reference.class_goodness_of(u, objective), side, objective, None)
    return reference.loss_of(reference.goodness_of(u, objective.goodness), side, objective, None)


def layers(objective, dtype: torch.dtype, backend: str) -> tuple[ff.FFLinear, ff.FFLinear]:
    torch.manual_seed(2)
    ours = ff.FFLinear(5, 7, objective=objective, batch_norm="behind", outputs="pre", dtype=dtype, backend=backend)
    with torch.no_grad():
        ours.batch_norm.weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0, 1.5, 0.3, 1.0]))
        ours.batch_norm.bias.copy_(torch.linspace(-1, 1, 7))
    return ours, deepcopy(ours).double()


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("mode", ["train", "eval", "watched"])
def test_a_step_is_that_of_autograd(objective, optimizer, mode, backend, dtype, tolerance):
    objective = OBJECTIVES[objective]
    ours, theirs = layers(objective, dtype, backend)
    for layer in (ours, theirs):
        layer.train(mode != "eval")
    if mode == "watched":
        ours.register_forward_hook(lambda module, given, y: None)
    x = torch.randn(12, 5, dtype=dtype)
    has_classes = not isinstance(objective, ff.GivenLoss) and objective.classes is not None
    side = torch.randint(3, (12,)) if has_classes else torch.arange(12) < 6
    given = (x, None) if has_classes else (x[:6], x[6:])
    optimizers = [OPTIMIZERS[optimizer](layer.parameters()) for layer in (ours, theirs)]
    for _ in range(3):
        result = ours.step(*given, optimizers[0], **({"labels": side} if has_classes else {}))
        optimizers[1].zero_grad()
        y = reference.linear_forward(
            x.double(), theirs.weight, theirs.bias, norm="l2", eps=1e-4, eps_mode="add", activation="relu"
        )
        u = theirs.batch_norm(y)
        loss = loss_of(objective, u, side)
        loss.backward()
        optimizers[1].step()
    assert error(result.y, u, 1.0) <= tolerance
    assert error(result.sumsq, u.square().sum(1), 1.0) <= tolerance
    assert error(result.loss, loss, 1.0) <= tolerance
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert error(p, q, 1.0) <= tolerance, name


def test_only_a_step_moves_the_running_statistics():
    layer, _ = layers(OBJECTIVES["classes"], torch.float64, "eager")
    net, x = ff.FFNetwork([layer]), torch.randn(9, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in layer.batch_norm.state_dict().items()}
    net.predict(x), net(x), net.goodness(x)
    for name, value in layer.batch_norm.state_dict().items():
        assert torch.equal(value, before[name])
    layer.step(x, None, torch.optim.SGD(layer.parameters(), lr=0.1), labels=torch.randint(3, (9,)))
    assert int(layer.batch_norm.num_batches_tracked) == 1


def test_in_eval_mode_rows_do_not_hang_on_each_other():
    layer, _ = layers(OBJECTIVES["classes"], torch.float64, "eager")
    x = torch.randn(9, 5, dtype=torch.float64)
    for _ in range(3):
        layer.step(x, None, torch.optim.SGD(layer.parameters(), lr=0.1), labels=torch.randint(3, (9,)))
    layer.eval()
    torch.testing.assert_close(layer.goodness(x)[2:5], layer.goodness(x[2:5]))
    expected = layer.batch_norm(ff.linear_forward(x, layer.weight, layer.bias)[0])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": "post"}, "outputs='post' came with batch_norm"),
        ({"batch_norm": nn.BatchNorm1d(6)}, "batch_norm has 6 features; accepted: 7"),
        ({"batch_norm": nn.LayerNorm(7)}, "batch_norm is a LayerNorm; accepted"),
        ({"batch_norm": nn.BatchNorm1d(7).double()}, "batch_norm.weight is torch.float64; accepted: torch.float32"),
        ({"peer": ff.PeerNormalisation(), "peer_mean": torch.zeros(7)}, "peer came with batch_norm"),
        ({"x_pos": torch.ones(1, 5), "x_neg": torch.ones(0, 5)}, "x_pos has 1 row, which has no variance"),
        ({"optimizer": "weights alone"}, r"does not hold batch_norm.weight \(7,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    layer = ff.FFLinear(5, 7)
    norm = nn.BatchNorm1d(7)
    optimizer = torch.optim.SGD([*layer.parameters(), *norm.parameters()], lr=1.0)
    if change.pop("optimizer", None):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    given = {"x_pos": torch.ones(3, 5), "x_neg": torch.ones(3, 5), "batch_norm": norm, "outputs": "pre", **change}
    before = layer.weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match=message):
        ff.linear_step_(given.pop("x_pos"), given.pop("x_neg"), layer.weight, layer.bias, optimizer, **given)
    assert torch.equal(layer.weight, before)
