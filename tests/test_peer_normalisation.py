"""Peer normalisation in both forms, against the training steps of the codes that have it, written with autograd."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends.eager import step as eager_step

from .steps import OPTIMIZERS, error, problem

EXACT = 1e-10
WIDTH, STEPS = 9, 5
LOSS = ff.Objective(goodness="sum", threshold=float(WIDTH))
RMS: dict[str, Any] = {"norm": "rms", "eps": 1e-8, "outputs": "pre"}


class WholeGradient(torch.autograd.Function):
    """A ReLU that passes on the gradient of units that are off, as loeweX has it."""

    @staticmethod
    def forward(ctx, z):
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8) @ weight.t() + bias


def hintons_gradient(x_pos, x_neg, weight, bias, mean, gated: bool) -> None:
    """His Matlab step: rates at which things get better, and their products with the rows over the rows' number."""
    with torch.no_grad():
        mean.mul_(0.9)
        totals = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for x, sign in ((x_pos, 1), (x_neg, -1)):
            z = linear(x, weight, bias)
            y = z.clamp(min=0)
            p = torch.sigmoid(y.square().sum(1) - WIDTH)
            better = (1 - p if sign == 1 else -p).unsqueeze(1) * y
            if sign == 1:
                mean.add_(0.1 * y.mean(0))
                better += 0.03 * (mean.mean() - mean) * ((z > 0) if gated else 1)
            normalised = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)
            totals[0] += better.t() @ normalised / len(x)
            totals[1] += better.sum(0) / len(x)
        weight.grad, bias.grad = -totals[0], -totals[1]


def loewex_gradient(x_pos, x_neg, weight, bias, mean, gated: bool) -> None:
    """loeweX's loss of a layer by autograd: cross-entropy, and 0.03 times the spread of the running means."""
    z = linear(torch.cat([x_pos, x_neg]), weight, bias)
    y = torch.relu(z) if gated else WholeGradient.apply(z)
    moved = mean * 0.9 + y[: len(x_pos)].mean(0) * 0.1
    target = (torch.arange(len(y)) < len(x_pos)).to(y.dtype)
    loss = nn.functional.binary_cross_entropy_with_logits(y.square().sum(1) - WIDTH, target)
    loss = loss + 0.03 * ((moved.mean() - moved) ** 2).mean()
    weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
    mean.copy_(moved.detach())


CODES: dict[str, Callable[..., None]] = {"hinton": hintons_gradient, "loewex": loewex_gradient}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", CODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_the_codes(form, gated, optimizer):
    ours = problem(8, 8, 6, WIDTH, optimizer=optimizer)
    theirs = ours.copy()
    means = [torch.full((WIDTH,), 0.5, dtype=torch.float64) for _ in range(2)]
    peer = ff.PeerNormalisation(form, gated=gated)
    for _ in range(STEPS):
        x_pos, x_neg = torch.rand(2, 8, 6, dtype=torch.float64)
        ff.linear_step_(
            x_pos, x_neg, ours.weight, ours.bias, ours.optimizer, objective=LOSS, peer=peer, peer_mean=means[0], **RMS
        )
        CODES[form](x_pos, x_neg, theirs.weight, theirs.bias, means[1], gated)
        theirs.optimizer.step()
        for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias), means):
            assert error(a, b) <= EXACT
    assert error(means[0], torch.full_like(means[0], 0.5)) > 1e-2


def test_loewex_pull_is_a_fraction_of_hintons():
    assert ff.PeerNormalisation("loewex").pull_strength(1000) == pytest.approx(0.03 * 0.2 / 1000)


def test_a_unit_that_is_off_is_pulled_back_unless_gated():
    weight = nn.Parameter(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    x = torch.ones(4, 1, dtype=torch.float64)
    for gated in (False, True):
        p, mean = nn.Parameter(weight.detach().clone()), torch.full((2,), 0.5, dtype=torch.float64)
        ff.linear_step_(
            x, x, p, None, SGD([p], lr=1.0), norm="none", objective=ff.Objective(threshold=0.5),
            peer=ff.PeerNormalisation(gated=gated), peer_mean=mean,
        )  # fmt: skip
        assert torch.allclose(mean, torch.tensor([0.55, 0.45], dtype=torch.float64), atol=1e-15)
        # Both sides hold the same rows at the threshold, so that only the pull moves anything.
        moved = (p - weight).detach().squeeze(1)
        expected = torch.tensor([-0.03 * 0.05, 0.0 if gated else 0.03 * 0.05], dtype=torch.float64)
        assert torch.allclose(moved, expected, atol=1e-15)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", ["copies", "copies in blocks", "mask", "pairs by mask", "blocks", "saturated"])
def test_special_batches(case, gated, monkeypatch):
    """Shared products, rows in any order, several blocks and rows left out change nothing."""
    if "blocks" in case:
        monkeypatch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 8)
        monkeypatch.setattr(eager_step, "MIN_BLOCK_ROWS", 6)
        monkeypatch.setattr(eager_step, "BLOCK_ELEMENTS", 8)
    made = problem(20, 20, 40, WIDTH, optimizer="adam")
    options: dict[str, Any] = {"peer": ff.PeerNormalisation(strength=0.5, gated=gated), "objective": ff.Objective()}
    if "copies" in case:
        made.x_neg.copy_(made.x_pos)
        made.x_neg[:, :4] = torch.randn(20, 4, dtype=torch.float64)
    if "mask" in case:
        order = torch.randperm(40)
        made = made._replace(x_pos=torch.cat([made.x_pos, made.x_neg])[order])
        options["is_positive"] = order < 20
        if "pairs" in case:
            options["objective"] = ff.Objective(loss="symba")
    if case == "saturated":
        options["objective"] = ff.Objective(goodness="sum", threshold=1.0, temperature=1e-3)
    ours, theirs = made, made.copy()
    means = [torch.full((WIDTH,), 0.5, dtype=torch.float64) for _ in range(2)]
    for _ in range(3):
        results = [
            step(p.x_pos, None if "mask" in case else p.x_neg, p.weight, p.bias, p.optimizer, peer_mean=m, **options)
            for step, p, m in (
                (ff.linear_step_, ours, means[0]),
                (reference.linear_step_, theirs, means[1]),
            )
        ]
        assert error(results[0].y, results[1].y) <= EXACT
        assert error(results[0].loss, results[1].loss, 1e-3) <= EXACT
        assert error(*means) <= EXACT
    assert error(ours.weight, theirs.weight) <= EXACT and error(ours.bias, theirs.bias) <= EXACT


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["hinton", "loewex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_within_those_of_plain_pytorch(form, dtype, gated, copies):
    made = problem(64, 64, 48, 32, dtype=torch.float32)
    if copies:
        made.x_neg.copy_(made.x_pos)
        made.x_neg[:, :5] = torch.randn(64, 5)
    # A strong pull: most of the gradient.
    peer = ff.PeerNormalisation(form, strength=1.0 if form == "hinton" else 30.0, gated=gated)

    def run(step: Callable, p: Any, **options: Any) -> dict[str, Tensor]:
        mean = torch.full_like(p.bias.detach(), 0.5)
        sgd = torch.optim.Adagrad([p.weight, p.bias], lr=0.0)
        options = {"objective": ff.Objective(), "outputs": "pre", **options}
        step(p.x_pos, p.x_neg, p.weight, p.bias, sgd, peer=peer, peer_mean=mean, **options)
        return {"dW": p.weight.grad, "db": p.bias.grad, "mean": mean}

    exact = run(reference.linear_step_, made.copy(torch.float64))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        torchs = run(reference.linear_step_, made.copy())
    ours = run(ff.linear_step_, made.copy(), compute_dtype=None if dtype == torch.float32 else dtype)
    slack = 2 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    for name, value in exact.items():
        assert error(ours[name], value) <= 2 * error(torchs[name], value) + slack, name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_without_positive_rows_pulls_nothing(gated, masked):
    made = problem(0, 6, 5, WIDTH)
    options: dict[str, Any] = {}
    x_pos, x_neg = made.x_pos, made.x_neg
    if masked:
        x_pos, x_neg, options = x_neg, None, {"is_positive": torch.zeros(6, dtype=torch.bool)}
    mean = torch.rand(WIDTH, dtype=torch.float64)
    before, plain = mean.clone(), made.copy()
    ff.linear_step_(
        x_pos, x_neg, made.weight, made.bias, made.optimizer, peer_mean=mean,
        peer=ff.PeerNormalisation(gated=gated), **options,
    )  # fmt: skip
    ff.linear_step_(x_pos, x_neg, plain.weight, plain.bias, plain.optimizer, **options)
    assert torch.equal(mean, before) and error(made.weight, plain.weight) <= 1e-15


def test_a_step_that_fails_leaves_the_mean(monkeypatch):
    from ffkernels.backends.eager import rules

    def fails(*args):
        raise MemoryError

    monkeypatch.setitem(rules.RULES, "sgd", fails)
    p, mean = problem(), torch.full((7,), 0.5, dtype=torch.float64)
    with pytest.raises(MemoryError):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, peer=ff.PeerNormalisation(), peer_mean=mean)
    assert (mean == 0.5).all()


def test_the_mean_is_marked_as_changed():
    p, mean = problem(), torch.full((7,), 0.5, dtype=torch.float64)
    version = mean._version
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, peer=ff.PeerNormalisation(), peer_mean=mean)
    assert mean._version > version


def test_layers_keep_the_mean_in_their_state():
    peer = ff.PeerNormalisation()
    net = ff.FFNetwork([ff.FFLinear(6, 5, peer=peer, dtype=torch.float64), ff.FFLinear(5, 4, dtype=torch.float64)])
    assert list(net.state_dict()) == [
        "layers.0.weight", "layers.0.bias", "layers.0.peer_mean", "layers.1.weight", "layers.1.bias"
    ]  # fmt: skip
    assert (net.layers[0].peer_mean == 0.5).all()
    other = copy.deepcopy(net)
    optimizer = Adam(net.parameters())
    x_pos, x_neg = torch.rand(2, 8, 6, dtype=torch.float64)
    net.step(x_pos, x_neg, optimizer)
    layer, mean = other.layers[0], other.layers[0].peer_mean.clone()
    reference.linear_step_(
        x_pos, x_neg, layer.weight, layer.bias, Adam(layer.parameters()), objective=layer.objective,
        peer=peer, peer_mean=mean,
    )  # fmt: skip
    assert error(net.layers[0].peer_mean, mean) <= EXACT and error(net.layers[0].weight, layer.weight) <= EXACT
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.layers[0].peer_mean, net.layers[0].peer_mean)
    assert net.to(torch.float32).layers[0].peer_mean.dtype == torch.float32
    # An option like the others: it can be taken away, and needs its mean where it is set later.
    net.layers[0].peer = None
    net.step(x_pos.float(), x_neg.float(), None)
    net.layers[1].peer = peer
    with pytest.raises(ValueError, match="peer came without peer_mean"):
        net.step(x_pos.float(), x_neg.float(), None)
