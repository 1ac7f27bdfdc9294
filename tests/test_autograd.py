"""`linear_forward` and `goodness_loss` under autograd, against the definition written plainly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ffkernels as ff
from ffkernels import reference
from ffkernels import validation as check
from ffkernels.objectives import GOODNESS, LOSSES, REDUCTIONS

from .steps import error, problem

EXACT = 1e-10
FLOOR = 1e-2


def plain(p, options: dict) -> tuple[Tensor, Tensor]:
    y = reference.linear_forward(p.x_pos, p.weight, p.bias, **options)
    return y, y.square().sum(1)


def gradients(loss: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in parameters if p is not None], allow_unused=True))


@settings(max_examples=150, deadline=None)
@given(
    norm=st.sampled_from(check.NORMS),
    eps_mode=st.sampled_from(check.EPS_MODES),
    activation=st.sampled_from(check.ACTIVATIONS),
    bias=st.booleans(),
    known=st.booleans(),
    used=st.sampled_from(["y", "sumsq", "both"]),
    shape=st.tuples(*[st.integers(1, 9)] * 2),
    rows=st.integers(0, 9),
    seed=st.integers(0, 2**20),
)
def test_gradients_of_a_layer_are_those_of_the_definition(
    norm, eps_mode, activation, bias, known, used, shape, rows, seed
):
    torch.manual_seed(seed)
    p = problem(rows, 0, *shape, bias=bias)
    p.x_pos[: rows // 4] = 0
    options = {"norm": norm, "eps": 1e-4, "eps_mode": eps_mode, "activation": activation}
    sumsq = p.x_pos.square().sum(1) if known else None
    mix = torch.randn(rows, shape[1], dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    found = []
    for y, q in (ff.linear_forward(p.x_pos, p.weight, p.bias, input_sumsq=sumsq, **options), plain(p, options)):
        loss = (mix[0] * y.sin()).sum() * (used != "sumsq") + (mix[1] * q).sum() * (used != "y")
        found.append([y, q, *gradients(loss, p.weight, p.bias)])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs, FLOOR) <= EXACT


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(frozen):
    p = problem()
    p.weight.requires_grad_(frozen == "bias")
    p.bias.requires_grad_(frozen == "weight")
    _, q = ff.linear_forward(p.x_pos, p.weight, p.bias)
    assert q.requires_grad == (frozen != "both")
    if frozen != "both":
        q.sum().backward()
        assert (p.weight.grad is None) == (frozen == "weight") and (p.bias.grad is None) == (frozen == "bias")


def test_no_gradient_reaches_the_input():
    p = problem()
    x = p.x_pos.requires_grad_()
    y, q = ff.linear_forward(x, p.weight, p.bias)
    (y.sum() + q.sum()).backward()
    assert x.grad is None and p.weight.grad is not None
    with torch.no_grad():
        assert not ff.linear_forward(x, p.weight, p.bias)[0].requires_grad


def test_the_normalised_input_is_not_stored():
    p = problem(n_pos=50, in_features=40)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = ff.linear_forward(p.x_pos, p.weight, p.bias)
    of_input_size = [t for t in kept if t.shape == p.x_pos.shape]
    assert [t.data_ptr() for t in of_input_size] == [p.x_pos.data_ptr()]
    assert sum(t.numel() for t in kept) == p.x_pos.numel() + y.numel() + 50


def test_the_weight_may_be_updated_before_the_backward_as_under_plain_autograd():
    p = problem()
    (expected,) = torch.autograd.grad(ff.linear_forward(p.x_pos, p.weight, p.bias)[1].sum(), p.weight)
    loss = ff.linear_forward(p.x_pos, p.weight, p.bias)[1].sum()
    smooth = ff.linear_forward(p.x_pos, p.weight, p.bias, activation="gelu")[1].sum()
    with torch.no_grad():
        p.weight.mul_(2)
    assert torch.equal(torch.autograd.grad(loss, p.weight)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(smooth, p.weight)


@pytest.mark.parametrize("what", ["linear_forward", "goodness_loss"])
def test_double_backward_is_refused(what):
    p = problem()
    if what == "linear_forward":
        start, loss = p.weight, ff.linear_forward(p.x_pos, p.weight, p.bias)[1].sum()
    else:
        start = torch.rand(4, requires_grad=True)
        loss = ff.goodness_loss(start, torch.ones(4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=f"ffkernels.{what} has a closed-form backward"):
        torch.autograd.grad(loss, start, create_graph=True)
    assert torch.autograd.grad(loss, start)[0].isfinite().all()


objectives = st.builds(
    ff.Objective,
    goodness=st.sampled_from(GOODNESS),
    threshold=st.one_of(st.floats(-3, 30), st.tuples(st.floats(-3, 30), st.floats(-3, 30))),
    loss=st.sampled_from(list(LOSSES)),
    maximize=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    alpha=st.floats(0.1, 8),
)


@settings(max_examples=150, deadline=None)
@given(
    objective=objectives,
    rows=st.tuples(*[st.integers(0, 9)] * 2),
    weighted=st.booleans(),
    per_row=st.booleans(),
    factor=st.floats(-2, 2),
    seed=st.integers(0, 2**20),
)
def test_goodness_loss_is_the_definition(objective, rows, weighted, per_row, factor, seed):
    torch.manual_seed(seed)
    n_pos, n_neg = (rows[0], rows[0]) if objective.paired else rows
    n = n_pos + n_neg
    side = (torch.arange(n) < n_pos)[torch.randperm(n)]
    goodness = (torch.rand(n, dtype=torch.float64) * 8).requires_grad_()
    weight = torch.rand(n // 2 if objective.paired else n, dtype=torch.float64) if weighted else None
    if per_row and not objective.paired:
        objective = replace(objective, threshold=torch.rand(n, dtype=torch.float64), temperature=0.5)
    ours = ff.goodness_loss(goodness, side, objective, sample_weight=weight)
    theirs = reference.loss_of(goodness, side, objective, weight)
    assert error(ours, theirs, FLOOR) <= EXACT
    assert error(*gradients(ours * factor, goodness), *gradients(theirs * factor, goodness), FLOOR) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_goodness_loss_is_finite_where_the_naive_one_overflows(dtype):
    goodness = torch.tensor([0.0, 19.0, 40.0, 6e4], dtype=dtype, requires_grad=True)
    side = torch.tensor([True, False, True, False])
    naive = torch.log(1 + torch.exp(torch.where(side, 20 - goodness, goodness - 20))).mean()
    assert naive.isinf()
    loss = ff.goodness_loss(goodness, side, ff.Objective(threshold=20.0))
    loss.backward()
    assert loss.dtype == torch.float32 and goodness.grad.dtype == dtype
    exact = goodness.detach().double().requires_grad_()
    expected = reference.loss_of(exact, side, ff.Objective(threshold=20.0), None)
    expected.backward()
    assert error(loss, expected) < 1e-6
    assert error(goodness.grad, exact.grad) < torch.finfo(dtype).eps


class GraphLayer(nn.Module):
    """`gelu(A X W)` of graphs beside their adjacency: `[graphs, nodes, nodes + in]` in, `[graphs, nodes, out]` out."""

    def __init__(self, nodes: int, features: int, out: int) -> None:
        super().__init__()
        self.nodes, self.linear = nodes, nn.Linear(features, out)

    def forward(self, x: Tensor) -> Tensor:
        adjacency, features = x[..., : self.nodes], x[..., self.nodes :]
        return nn.functional.gelu(self.linear(adjacency @ features))


NOT_OURS = {
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.GELU(), nn.AvgPool2d(2)), (2, 9, 9)
    ),
    "transformer block": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True), (5, 8)
    ),
    "graph layer": (lambda: GraphLayer(4, 6, 7), (4, 10)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_OURS)
def test_goodness_loss_around_layers_that_are_not_ours(kind):
    """Under one optimizer: the gradients of the plain writing."""
    make, shape = NOT_OURS[kind]
    net, x, side = make().double(), torch.randn(8, *shape, dtype=torch.float64), torch.arange(8) < 3
    objective = ff.Objective(threshold=0.3, reduction="sum_of_means")
    found = []
    for loss in (ff.goodness_loss, lambda g, s, o: reference.loss_of(g, s, o, None)):
        goodness = net(x).square().flatten(1).mean(1)
        found.append(gradients(loss(goodness, side, objective), *net.parameters()))
    assert sum(float(g.abs().sum()) for g in found[0]) > 1e-3
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs, FLOOR) <= EXACT


def two_layers(dtype: torch.dtype, objective: ff.Objective, activation: str) -> ff.FFNetwork:
    options = {"objective": objective, "activation": activation, "dtype": dtype}
    return ff.FFNetwork([ff.FFLinear(20, 16, **options), ff.FFLinear(16, 12, **options)])


@pytest.mark.parametrize("goodness", GOODNESS)
def test_one_backward_and_one_optimizer_is_a_step_of_every_layer(goodness):
    """The sum of all layers' losses through autograd trains as `FFNetwork.step` does, zero rows included."""
    torch.manual_seed(2)
    objective = ff.Objective(goodness=goodness, threshold=0.7)
    net, other = (two_layers(torch.float64, objective, "relu") for _ in range(2))
    other.load_state_dict(net.state_dict())
    for layer in other:
        layer.outputs = "pre"
    ours, theirs = (torch.optim.SGD(n.parameters(), lr=0.5, momentum=0.9) for n in (net, other))
    x, side = torch.rand(14, 20, dtype=torch.float64), torch.arange(14) < 7
    x[0] = 0
    with torch.no_grad():
        for n in (net, other):
            n.layers[0].bias.fill_(-0.1)
    for _ in range(4):
        ours.zero_grad()
        sum(ff.goodness_loss(g, side, objective) for g in net.goodness(x).unbind(1)).backward()
        ours.step()
        other.step(x[:7], x[7:], theirs)
    for name, value in other.state_dict().items():
        assert error(net.state_dict()[name], value) <= EXACT, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_error_stays_within_that_of_plain_pytorch(dtype, activation):
    """Twice plain autograd's error in the same dtype, against float64."""
    objective = ff.Objective(threshold=0.1)
    exact = two_layers(torch.float64, objective, activation)
    net = two_layers(torch.float32, objective, activation)
    net.load_state_dict(exact.state_dict())
    x, side = torch.rand(96, 20), torch.arange(96) < 40

    def by_definition(layers, x):
        loss = x.new_zeros((), dtype=layers.layers[0].weight.dtype)
        for layer in layers:
            y = reference.linear_forward(
                x, layer.weight, layer.bias, norm="l2", eps=1e-4, eps_mode="add", activation=activation
            ).to(layer.weight.dtype)
            loss = loss + reference.loss_of(reference.goodness_of(y, "mean"), side, objective, None)
            x = y.detach()
        return gradients(loss, *layers.parameters())

    truth = by_definition(exact, x.double())
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        plainly = by_definition(net, x)
        ours = gradients(
            sum(ff.goodness_loss(g, side, objective) for g in net.goodness(x).unbind(1)), *net.parameters()
        )
    ulp = torch.finfo(dtype or torch.float32).eps
    for a, b, wanted in zip(ours, plainly, truth, strict=True):
        assert a.dtype == torch.float32
        assert error(a, wanted) <= 2 * error(b, wanted) + ulp


def test_float16_products_keep_small_gradients():
    """Gradients that float16 cannot hold, by many rows and a long tail of the loss, come back."""
    p = problem(400, 0, 30, 20, dtype=torch.float32)
    _, q = ff.linear_forward(p.x_pos * 1e3, p.weight, p.bias, norm="none", compute_dtype=torch.float16)
    (low,) = torch.autograd.grad(q.mean() * 1e-12, p.weight)
    _, q = ff.linear_forward(p.x_pos * 1e3, p.weight, p.bias, norm="none")
    (exact,) = torch.autograd.grad(q.mean() * 1e-12, p.weight)
    assert error(low, exact) < 4 * torch.finfo(torch.float16).eps


BAD = {
    "goodness [rows, 1]": ({"goodness": torch.rand(4, 1)}, ValueError, r"goodness has shape \(4, 1\)"),
    "goodness of integers": ({"goodness": torch.arange(4)}, TypeError, "goodness is torch.int64"),
    "no tensor": ({"goodness": [1.0]}, TypeError, "goodness is a list"),
    "sides as numbers": ({"is_positive": torch.ones(4)}, TypeError, "is_positive is torch.float32"),
    "another length": ({"is_positive": torch.ones(3, dtype=torch.bool)}, ValueError, r"is_positive has shape \(3,\)"),
    "another device": (
        {"is_positive": torch.ones(4, dtype=torch.bool, device="meta")},
        ValueError,
        "is_positive is on meta but goodness is on cpu",
    ),
    "no objective": ({"objective": "mean"}, TypeError, "objective='mean'"),
    "pairs": ({"objective": ff.Objective(loss="symba")}, ValueError, "is_positive marks 1 positive and 3 negative"),
    "weights": ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight has shape \(5,\)"),
    "learnt weights": (
        {"sample_weight": torch.ones(4, requires_grad=True)},
        ValueError,
        "sample_weight has requires_grad=True but gets no gradient",
    ),
    "learnt threshold": (
        {"objective": ff.Objective(threshold=torch.ones((), requires_grad=True))},
        ValueError,
        "threshold has requires_grad=True",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, exception, message = BAD[name]
    arguments = {"goodness": torch.rand(4), "is_positive": torch.arange(4) < 1, **change}
    with pytest.raises(exception, match=message):
        ff.goodness_loss(**arguments)
