"""Losses of the caller's own: some of the literature that the package lacks, against autograd; what may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff
from ffkernels.backends import select
from ffkernels.objectives import LOSSES
from ffkernels.reference import ACTIVATIONS

from .steps import OPTIMIZERS, Problem, assert_same_state, problem, state_of

NATIVE = select.load("native").library.load().library is not None
BACKENDS = [("eager", torch.float64), ("eager", torch.float32), *([("native", torch.float32)] if NATIVE else [])]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class Made(NamedTuple):
    """A loss of the literature on one layer of 7 units, and what in it learns."""

    function: Callable[..., Tensor]
    reads: str
    learned: list[Tensor]


def sign(is_positive: Tensor) -> Tensor:
    return 1 - 2 * is_positive.double()


def pvn(dtype: torch.dtype) -> Made:
    """Positive-versus-negative margin: every negative row's goodness stays a margin below every positive row's."""

    def loss(goodness: Tensor, is_positive: Tensor) -> Tensor:
        gaps = goodness[~is_positive][None, :] - goodness[is_positive][:, None]
        return F.relu(gaps + 0.3).square().mean()

    return Made(loss, "goodness", [])


def learned_threshold(dtype: torch.dtype) -> Made:
    """The logistic loss around a threshold that learns as well."""
    threshold = torch.tensor(0.6, dtype=dtype, requires_grad=True)

    def loss(goodness: Tensor, is_positive: Tensor) -> Tensor:
        return F.softplus(sign(is_positive).to(goodness.dtype) * (goodness - threshold)).mean()

    return Made(loss, "goodness", [threshold])


def layer_collaboration(dtype: torch.dtype) -> Made:
    """Lorberbom et al. (2023): the other layers' goodness, a constant, is added to this one's."""
    others = torch.linspace(-1, 1, 12, dtype=dtype)

    def loss(goodness: Tensor, is_positive: Tensor) -> Tensor:
        return F.softplus(sign(is_positive).to(goodness.dtype) * (goodness + others[: len(goodness)] - 2)).mean()

    return Made(loss, "goodness", [])


def n_pair(dtype: torch.dtype) -> Made:
    """N-pair distance margin on the normalised activities: positives lie nearer to their centre than negatives."""

    def loss(y: Tensor, is_positive: Tensor) -> Tensor:
        unit = y / (y.square().sum(1, keepdim=True) + 1e-3).sqrt()
        distance = (unit - unit[is_positive].mean(0)).square().sum(1)
        return F.softplus(distance[is_positive][:, None] - distance[~is_positive][None, :]).mean()

    return Made(loss, "activities", [])


def top_k(dtype: torch.dtype) -> Made:
    """Goodness of the k largest activities alone (arXiv 2604.13081)."""

    def loss(y: Tensor, is_positive: Tensor) -> Tensor:
        goodness = y.square().topk(3, dim=1).values.mean(1)
        return F.softplus(sign(is_positive).to(y.dtype) * (goodness - 1)).mean()

    return Made(loss, "activities", [])


def kurtosis(dtype: torch.dtype) -> Made:
    """A function of the moments of a row: how uneven its squared activities are, and how large."""
    scale = torch.tensor(0.7, dtype=dtype, requires_grad=True)

    def loss(moments: ff.Moments, is_positive: Tensor) -> Tensor:
        mean, square = moments.first.mean(1), moments.second.mean(1)
        spread = moments.second.square().mean(1) / (square.square() + 0.1)
        return (sign(is_positive).to(mean.dtype) * (square + scale * spread - mean)).tanh().mean()

    return Made(loss, "moments", [scale])


LITERATURE = [pvn, learned_threshold, layer_collaboration, n_pair, top_k, kurtosis]


def expected_of(p: Problem, made: Made, options: dict, rows: Tensor, side: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients to weight, bias and what it has learned of its own, by autograd."""
    weight, bias = (t.detach().clone().requires_grad_() for t in (p.weight, p.bias))
    x = rows / (rows.square().sum(1, keepdim=True).sqrt() + 1e-4)
    y = ACTIVATIONS[options["activation"]](x @ weight.t() + bias)
    squares = y.square()
    read = {"goodness": squares.mean(1), "activities": y, "moments": ff.Moments(y, squares)}[made.reads]
    loss = made.function(read, side)
    return loss.detach(), list(torch.autograd.grad(loss, [weight, bias, *made.learned]))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("loss", LITERATURE, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_of_the_literature(loss, activation, backend, dtype, mixed):
    check_loss(loss, activation, backend, dtype, mixed)


def check_loss(loss: Callable[[torch.dtype], Made], activation: str, backend: str, dtype: torch.dtype, mixed: bool):
    """One step by a loss is the one that autograd makes."""
    p = problem(dtype=dtype)
    made, rows = loss(dtype), torch.cat([p.x_pos, p.x_neg])
    side = torch.arange(12) < 6
    options: dict = {"activation": activation}
    given = (p.x_pos, p.x_neg)
    if mixed:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        rows, side, given = rows[order], side[order], (rows[order], None)
        options["is_positive"] = side
    value, (of_weight, of_bias, *of_learned) = expected_of(p, made, options, rows, side)
    before = p.weight.detach().clone(), p.bias.detach().clone()
    optimizer = torch.optim.SGD([p.weight, p.bias], lr=1.0)
    objective = ff.GivenLoss(made.function, reads=made.reads)
    result = ff.linear_step_(*given, p.weight, p.bias, optimizer, objective=objective, backend=backend, **options)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(result.loss, value, **close)
    torch.testing.assert_close(before[0] - p.weight, of_weight, **close)
    torch.testing.assert_close(before[1] - p.bias, of_bias, **close)
    for parameter, gradient in zip(made.learned, of_learned, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **close)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd-nesterov", "adam", "rmsprop"])
@pytest.mark.parametrize("backend", ["eager", *(["native"] if NATIVE else [])])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_a_backend_does_not_know_goes_by_stages(loss, backend, optimizer, compute_dtype, monkeypatch):
    """Every loss of the package without its kernel: the same step, to rounding."""
    objective = ff.Objective(loss=loss, goodness="sum", threshold=1.5)
    peer = {"peer": ff.PeerNormalisation(strength=0.3)}
    found = []
    for known in (LOSSES, ()):
        monkeypatch.setattr(select.load(backend), "LOSSES", known)
        torch.manual_seed(3)
        p = problem(20, 20, dtype=torch.float32, optimizer=optimizer)
        mean = torch.full((7,), 0.5)
        weights = torch.linspace(0, 2, 20 if objective.paired else 40)
        results = [
            ff.linear_step_(
                p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, backend=backend,
                compute_dtype=compute_dtype, sample_weight=weights, peer_mean=mean, skip_below=0.1, **peer,
            )
            for _ in range(3)
        ]  # fmt: skip
        found.append((p, mean, results))
    (p, mean, results), (q, other_mean, others) = found
    assert_same_state(p, q, 1e-5 if compute_dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(mean, other_mean, rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if compute_dtype == torch.float32 else 1e-2
    for a, b in zip(results, others, strict=True):
        for name in ("y", "sumsq", "goodness", "loss"):
            torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=tolerance, atol=tolerance)


def logistic(goodness: Tensor, is_positive: Tensor) -> Tensor:
    return F.softplus(sign(is_positive).to(goodness.dtype) * (goodness - 2)).mean()


@pytest.mark.parametrize("outputs", ["post", "pre"])
def test_a_network_learns_by_a_function_as_by_the_objective(outputs):
    torch.manual_seed(0)
    x_pos, x_neg = torch.rand(30, 12), torch.rand(30, 12)
    found = []
    for objective in (ff.Objective(), logistic):
        torch.manual_seed(1)
        net = ff.FFNetwork([ff.FFLinear(a, b, objective=objective, outputs=outputs) for a, b in ((12, 9), (9, 5))])
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        results = [net.step(x_pos, x_neg, optimizer) for _ in range(4)]
        found.append((torch.stack([r.loss for r in results[-1]]), net.goodness(x_pos), net.predict(x_pos, 4)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_watched_layer_and_a_frozen_one_take_such_a_loss():
    torch.manual_seed(0)
    x_pos, x_neg, threshold = torch.rand(30, 12), torch.rand(30, 12), torch.tensor(0.5, requires_grad=True)

    def loss(goodness: Tensor, is_positive: Tensor) -> Tensor:
        return F.softplus(sign(is_positive).to(goodness.dtype) * (goodness - threshold)).mean()

    found = []
    for watched in (False, True):
        torch.manual_seed(1)
        threshold.grad = None
        layer = ff.FFLinear(12, 9, objective=loss)
        if watched:
            layer.register_forward_hook(lambda *_: None)
        result = layer.step(x_pos, x_neg, torch.optim.SGD(layer.parameters(), lr=1.0))
        found.append((result.loss, layer.weight.detach(), threshold.grad))
    for plain, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, plain, rtol=1e-5, atol=1e-6)
    frozen = ff.FFLinear(12, 9, objective=logistic).requires_grad_(False)
    (result,) = ff.FFNetwork([frozen]).step(x_pos, x_neg, None)
    assert torch.equal(result.loss, logistic(frozen.goodness(torch.cat([x_pos, x_neg])), torch.arange(60) < 30))


def test_compiled_code_leaves_such_a_step_to_the_interpreter():
    def body(x_pos: Tensor, x_neg: Tensor, layer: ff.FFLinear, optimizer: torch.optim.Optimizer) -> Tensor:
        return layer.step(x_pos * 2, x_neg * 2, optimizer).loss + 1

    x_pos, x_neg, found = torch.rand(6, 5), torch.rand(6, 5), []
    for run in (body, torch.compile(body, backend="eager")):
        torch.manual_seed(1)
        layer = ff.FFLinear(5, 4, objective=logistic)
        optimizer = torch.optim.Adam(layer.parameters())
        found.append((run(x_pos, x_neg, layer, optimizer), layer.weight.detach()))
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a loss of your own runs in plain PyTorch"):
        torch.compile(body, backend="eager", fullgraph=True)(x_pos, x_neg, layer, optimizer)


def raises(message: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(goodness: Tensor, is_positive: Tensor) -> Tensor:
        raise RuntimeError(message)

    return loss


WRONG = [
    (lambda g, p: 3.0, TypeError, "objective returned a float; accepted: a 0-dim torch.Tensor"),
    (lambda g, p: g, ValueError, r"objective returned a torch.float32 tensor of shape \(12,\); accepted: a 0-dim loss"),
    (
        lambda g, p: (g > 1).sum(),
        ValueError,
        r"objective returned a torch.int64 tensor of shape \(\); accepted: a 0-dim loss",
    ),
    (lambda g, p: g.sum() * torch.nan, ValueError, "objective returned a loss of nan; accepted: a finite one"),
    (lambda g, p: g.sum() / 0, ValueError, "objective returned a loss of inf; accepted: a finite one"),
    (
        lambda g, p: g.detach().sum(),
        ValueError,
        "objective returned a loss detached from the goodness that it was given",
    ),
    (lambda g, p: g.sum().to("meta"), ValueError, "objective returned a loss on meta but the layer is on cpu"),
    (
        lambda g, p: nn.Parameter(g.mean().detach()) * 2,
        ValueError,
        "the loss that objective returned does not hang on the goodness",
    ),
    (
        lambda g, p: (g - g).sqrt().sum(),
        ValueError,
        "the loss that objective returned has a slope by the goodness that is not finite",
    ),
    (raises("of the caller's"), RuntimeError, "of the caller's"),
]


@pytest.mark.parametrize("backend", ["eager", *(["native"] if NATIVE else [])])
@pytest.mark.parametrize(("function", "kind", "said"), WRONG, ids=[said[:30] for _, _, said in WRONG])
def test_a_wrong_loss_changes_nothing(function, kind, said, backend):
    p = problem(dtype=torch.float32, optimizer="adam")
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    before, mean = {name: t.clone() for name, t in state_of(p).items()}, torch.full((7,), 0.5)
    peer = {"peer": ff.PeerNormalisation(), "peer_mean": mean}
    with pytest.raises(kind, match=said):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=function, backend=backend, **peer)
    assert all(torch.equal(t, before[name]) for name, t in state_of(p).items()) and mean.eq(0.5).all()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"objective": 3}, TypeError, "objective=3 is not an ffkernels.Objective, a ProjectionHead, a GivenLoss or a"),
        ({"objective": logistic, "skip_below": 0.1}, ValueError, "skip_below=0.1 came with a loss of your own"),
        ({"objective": logistic, "sample_weight": torch.ones(12)}, ValueError, "sample_weight came with a loss of"),
    ],
)
def test_what_does_not_go_with_it(options, kind, said):
    p = problem(dtype=torch.float32)
    with pytest.raises(kind, match=said):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, **options)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"function": None}, TypeError, "objective=None is not"),
        ({"function": logistic, "reads": "everything"}, ValueError, "reads='everything' is not one of 'goodness'"),
        ({"function": logistic, "goodness": "max"}, ValueError, "goodness='max' is not one of 'mean'"),
        ({"function": logistic, "maximize": 1}, TypeError, "maximize=1 is not a bool"),
    ],
)
def test_wrong_fields(arguments, kind, said):
    with pytest.raises(kind, match=said):
        ff.GivenLoss(**arguments)


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "rmsprop"])
def test_explain_says_where_the_loss_runs(optimizer):
    weight = nn.Parameter(torch.zeros(3, 2))
    text = ff.explain(weight, OPTIMIZERS[optimizer]([weight]), objective=logistic)
    assert "loss: in plain PyTorch, between the backend's forward and its update" in text
    assert "loss: symba, which the backend knows" in ff.explain(weight, objective=ff.Objective(loss="symba"))
