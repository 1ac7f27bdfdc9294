"""Errors against float64 stay within twice those of plain PyTorch in the same dtype, and nothing overflows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import ffkernels as ff
from ffkernels import reference

from .steps import Problem, error, problem

LOW = [torch.bfloat16, torch.float16]
OBJECTIVES = {
    "mean": ff.Objective(),
    "sum": ff.Objective(goodness="sum", threshold=30.0),
    "norm": ff.Objective(goodness="norm", threshold=5.0, reduction="sum_of_means"),
    "symba": ff.Objective(loss="symba"),
    "swish": ff.Objective(loss="swish", alpha=6.0),
}


def gradients(p: Problem, step, **options) -> dict[str, Tensor]:
    """Results of one step, with the gradients that it used."""
    result = step(p.x_pos, p.x_neg, p.weight, p.bias, torch.optim.Adagrad([p.weight, p.bias], lr=0.0), **options)
    named = {"y": result.y, "goodness": result.goodness, "loss": result.loss}
    return {**named, "dW": p.weight.grad, "db": p.bias.grad}


def joined(results: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several results as one per name."""
    several = list(results)
    return {name: torch.stack([result[name] for result in several]) for name in several[0]}


def assert_within_budget(ours: dict, torchs: dict, exact: dict, ulp: float) -> None:
    for name, value in exact.items():
        budget = 2 * error(torchs[name], value) + ulp
        assert error(ours[name], value) <= budget, (name, error(ours[name], value), budget)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(64, 64, 100, 50), (1, 1, 1, 1), (300, 300, 33, 17)])
def test_float32(name, activation, shape):
    options = {"objective": OBJECTIVES[name], "activation": activation, "outputs": "pre"}
    # The error of a single number is luck, torch's too: many draws of a tiny layer stand for one of a large one.
    draws = [problem(*shape, dtype=torch.float32) for _ in range(100 if shape == (1, 1, 1, 1) else 1)]
    exact = joined(gradients(made.copy(torch.float64), reference.linear_step_, **options) for made in draws)
    torchs = joined(gradients(made.copy(), reference.linear_step_, **options) for made in draws)
    ours = joined(gradients(made.copy(), ff.linear_step_, **options) for made in draws)
    assert_within_budget(ours, torchs, exact, 2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", ["eager", None], ids=["eager", "default"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("name", "activation", "norm"), list(itertools.product(OBJECTIVES, ["relu", "gelu"], ["l2", "none"]))
)
def test_low_precision_products(name, activation, norm, dtype, backend):
    """Budget: plain PyTorch under autocast, with its sums of squares in float32, which favours it."""
    made = problem(96, 96, 64, 48, dtype=torch.float32)
    options = {"objective": OBJECTIVES[name], "activation": activation, "norm": norm, "outputs": "pre"}
    exact = gradients(made.copy(torch.float64), reference.linear_step_, **options)
    with torch.autocast("cpu", dtype=dtype):
        torchs = gradients(made.copy(), reference.linear_step_, **options)
    ours = gradients(made.copy(), ff.linear_step_, compute_dtype=dtype, backend=backend, **options)
    assert ours["y"].dtype == dtype
    assert ours["goodness"].dtype == ours["dW"].dtype == torch.float32
    assert_within_budget(ours, torchs, exact, torch.finfo(dtype).eps / 4)
    if norm == "l2":
        assert error(ours["goodness"], exact["goodness"]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_chooses_the_compute_dtype(dtype):
    made = problem(8, 8, dtype=torch.float32)
    a, b = made.copy(), made.copy()
    with torch.autocast("cpu", dtype=dtype):
        by_autocast = ff.linear_step_(a.x_pos, a.x_neg, a.weight, a.bias, a.optimizer)
        y, _ = ff.linear_forward(a.x_pos, a.weight, a.bias)
    asked_for = ff.linear_step_(b.x_pos, b.x_neg, b.weight, b.bias, b.optimizer, compute_dtype=dtype)
    assert by_autocast.y.dtype == y.dtype == dtype
    assert torch.equal(by_autocast.y, asked_for.y) and torch.equal(a.weight, b.weight)
    assert torch.equal(y, by_autocast.pos)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounded_activities_feed_the_next_layer(dtype):
    """Rows that come in the compute dtype are taken as they are; the scale follows the product in float32."""
    made = problem(20, 20, dtype=torch.float32)
    low = made.copy()._replace(x_pos=made.x_pos.to(dtype), x_neg=made.x_neg.to(dtype))
    exact = made.copy(torch.float64)._replace(x_pos=low.x_pos.double(), x_neg=low.x_neg.double())
    options = {"objective": ff.Objective(), "outputs": "pre"}
    a = gradients(low, ff.linear_step_, compute_dtype=dtype, **options)
    b = gradients(exact, reference.linear_step_, **options)
    for name, value in b.items():
        assert error(a[name], value) < 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("loss", ["logistic", "symba", "swish"])
@pytest.mark.parametrize("maximize", [True, False])
def test_huge_logits(dtype, loss, maximize):
    """Logits of +-1e4: loss and gradient are finite, and those of float64."""
    made = problem(4, 4, dtype=torch.float32)
    options = {
        "objective": ff.Objective(goodness="sum", threshold=(1e4, 1e2), loss=loss, alpha=500.0, maximize=maximize),
        "norm": "none",
        "outputs": "pre",
    }
    scale = torch.tensor([0.01, 0.1, 10.0, 100.0]).unsqueeze(1)
    made = made._replace(x_pos=made.x_pos * scale, x_neg=made.x_neg * scale.flip(0))
    master = torch.float64 if dtype == torch.float64 else torch.float32
    exact = gradients(made.copy(torch.float64), reference.linear_step_, **options)
    assert exact["goodness"].max() > 2e4
    ours = gradients(made.copy(master), ff.linear_step_, compute_dtype=None if dtype == master else dtype, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    for name, value in exact.items():
        assert ours[name].isfinite().all(), name
        assert error(ours[name], value) <= tolerance, name


def test_goodness_beyond_float16():
    """Goodness of 256 activities of 64 is 2^20, sixteen times float16's largest number; half products keep it."""
    weight = torch.nn.Parameter(torch.full((256, 4), 16.0))
    x = torch.ones(3, 4)
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    result = ff.linear_step_(
        x, x, weight, None, optimizer, norm="none", outputs="pre", compute_dtype=torch.float16,
        objective=ff.Objective(goodness="sum", threshold=2.0**20),
    )  # fmt: skip
    assert torch.equal(result.goodness, torch.full((6,), 2.0**20))
    assert torch.equal(result.loss, torch.log(torch.tensor(2.0)))
    # Both sides hold the same rows at the threshold: their gradients are opposite and cancel.
    assert torch.equal(weight.detach(), torch.full((256, 4), 16.0))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("eps", [0.0, 3.72e-44, 1e-4])
@pytest.mark.parametrize("eps_mode", ["add", "clamp", "inside"])
@pytest.mark.parametrize("goodness", ["mean", "norm"])
def test_rows_of_zeros(dtype, eps, eps_mode, goodness):
    """A row of zeros stays zero under any norm, also where eps is 0 or a denormal (Hinton's exp(-100))."""
    made = problem(4, 4, bias=False, dtype=torch.float32)
    made.x_pos[1] = 0
    made.x_neg[:] = 0
    options = {
        "objective": ff.Objective(goodness=goodness),
        "eps": eps,
        "eps_mode": eps_mode,
        "outputs": "pre",
    }
    compute = None if dtype == torch.float32 else dtype
    ours, exact = made.copy(), made.copy(torch.float64)
    result = ff.linear_step_(
        ours.x_pos, ours.x_neg, ours.weight, None, ours.optimizer, compute_dtype=compute, **options
    )
    expected = reference.linear_step_(exact.x_pos, exact.x_neg, exact.weight, None, exact.optimizer, **options)
    assert torch.equal(result.y[1], torch.zeros(7, dtype=dtype))
    assert torch.equal(result.goodness_neg, torch.zeros(4))
    assert error(ours.weight, expected_weight := exact.weight) <= 2 * torch.finfo(dtype).eps, expected_weight
    assert error(result.loss, expected.loss) <= 2 * torch.finfo(dtype).eps


def test_tiny_coefficients_survive_float16():
    """Coefficients carry 1 / (rows width): below float16's smallest number for a large layer, yet kept."""
    made = problem(1024, 1024, 16, 256, dtype=torch.float32)
    options = {"objective": ff.Objective(threshold=9.0), "outputs": "none"}
    a, b = made.copy(), made.copy(torch.float64)
    ff.linear_step_(a.x_pos, a.x_neg, a.weight, a.bias, None, compute_dtype=torch.float16, **options)
    ff.linear_step_(b.x_pos, b.x_neg, b.weight, b.bias, None, **options)
    assert torch.finfo(torch.float16).tiny > 10 * 2 / (2048 * 256)
    assert error(a.weight.grad, b.weight.grad) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rounded", [False, True], ids=["float32 input", "rounded input"])
def test_copies_in_low_precision(dtype, rounded):
    """Sides that differ in a label field only, as they come and already in the compute dtype."""
    made = problem(40, 40, 64, 24, dtype=torch.float32)
    made.x_pos.copy_(made.x_pos.to(dtype))
    made.x_neg.copy_(made.x_pos)
    made.x_neg[:, :5] = torch.randn(40, 5).to(dtype)
    exact = made.copy(torch.float64)
    low = made.copy()
    if rounded:
        low = low._replace(x_pos=low.x_pos.to(dtype), x_neg=low.x_neg.to(dtype))
    options = {"objective": ff.Objective(), "outputs": "pre"}
    a = gradients(low, ff.linear_step_, compute_dtype=dtype, **options)
    b = gradients(exact, reference.linear_step_, **options)
    for name, value in b.items():
        assert error(a[name], value) < 2 * torch.finfo(dtype).eps, name
    field = slice(0, 5)
    assert error(a["dW"][:, field], b["dW"][:, field]) < 2 * torch.finfo(dtype).eps
