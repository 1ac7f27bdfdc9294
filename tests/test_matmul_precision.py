"""float32 under `torch.set_float32_matmul_precision`: read at every call, and "high" is three products on AMX's unit.

The unit's own tests are in `csrc/tests/products.cpp`; here it is that of the CPU, or of a library that emulates it
(`make sanitize-library`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

import ffkernels as ff
from ffkernels import ops, reference
from ffkernels.backends import select
from ffkernels.spec import Layer

from .steps import Problem, error, problem, state_of
from .test_native import SETS, limited_to, needs_library

SPLITS = "amx"
OBJECTIVES = {
    "rows": ff.Objective(goodness="sum", threshold=30.0),
    "pairs": ff.Objective(loss="symba"),
    "classes": ff.Objective(loss="cross_entropy", classes=3),
}


@contextmanager
def precision(name: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision`, until the end of the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Seen:
    """The precisions with which a function of `ops` or of a backend was called, in turn."""

    precisions: list[str] = field(default_factory=list)

    def around(self, function):
        def call(*records, **options):
            layers = [step.layer for of in records if isinstance(of, list) for step in of]
            self.precisions += [r.precision for r in (*layers, *records) if isinstance(r, Layer)]
            return function(*records, **options)

        return call


def results(p: Problem, **options) -> dict:
    """Two steps: what they hand out, and what they leave."""
    found = {}
    for i in range(2):
        labels = {"labels": torch.arange(len(p.x_pos)) % 3} if options["objective"].classes else {}
        x_neg = None if labels else p.x_neg
        step = ff.linear_step_(p.x_pos, x_neg, p.weight, p.bias, p.optimizer, backend="native", **labels, **options)
        found |= {(i, name): getattr(step, name) for name in ("y", "sumsq", "loss")}
    return found | state_of(p)


def copies(p: Problem) -> Problem:
    """The same with negatives that differ from the positives in three columns."""
    x_neg = p.x_pos.clone()
    x_neg[:, :3] = p.x_neg[:, :3]
    return p._replace(x_neg=x_neg)


@needs_library
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("instruction_set", [s for s in SETS if s != SPLITS])
def test_without_the_unit_nothing_changes(instruction_set, name, shared):
    made = problem(33, 33, 70, 40, optimizer="adam", dtype=torch.float32)
    made = copies(made) if shared else made
    with limited_to(instruction_set):
        plain = results(made.copy(), objective=OBJECTIVES[name])
        with precision("high"):
            high = results(made.copy(), objective=OBJECTIVES[name])
    for key, value in plain.items():
        assert torch.equal(high[key], value), key


@needs_library
@pytest.mark.skipif(SPLITS not in SETS, reason="needs AMX, of the CPU or emulated")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("activation", "shape"),
    [("relu", (65, 65, 200, 70)), ("gelu", (65, 65, 200, 70)), ("relu", (2200, 2200, 40, 1000))],
    ids=["relu", "gelu", "several blocks"],
)
def test_on_the_unit_the_error_lies_between_float32s_and_bfloat16s(activation, shape, shared):
    made = problem(*shape, optimizer="sgd", dtype=torch.float32)
    made = copies(made) if shared else made
    options = {"objective": ff.Objective(), "activation": activation, "outputs": "pre"}

    def gradients(p: Problem, step, **more) -> dict:
        out = step(p.x_pos, p.x_neg, p.weight, p.bias, torch.optim.Adagrad([p.weight, p.bias], lr=0.0), **more)
        return {"y": out.y, "dW": p.weight.grad, "db": p.bias.grad}

    exact = gradients(made.copy(torch.float64), reference.linear_step_, **options)
    options["backend"] = "native"
    plain = gradients(made.copy(), ff.linear_step_, **options)
    narrow = gradients(made.copy(), ff.linear_step_, compute_dtype=torch.bfloat16, **options)
    with precision("medium"):
        medium = gradients(made.copy(), ff.linear_step_, **options)
    with precision("high"):
        high = gradients(made.copy(), ff.linear_step_, **options)
    for name, value in exact.items():
        assert torch.equal(high[name], medium[name]), name
        assert error(plain[name], value) < 2e-6, name
        assert error(high[name], value) < 2**-15, name
        assert error(high[name], value) < error(narrow[name], value) / 30, name
    assert error(high["y"], exact["y"]) > error(plain["y"], exact["y"])


@needs_library
@pytest.mark.skipif(SPLITS not in SETS, reason="needs AMX, of the CPU or emulated")
def test_infinities_and_nan_are_where_float32_has_them():
    x, weight = torch.randn(20, 40), torch.randn(30, 40)
    x[3, 5], x[4, 39], x[5, 0] = torch.inf, -torch.inf, torch.nan
    weight[7, 5], weight[8, 6], weight[9, 5] = torch.inf, torch.nan, 0.0
    options = {"norm": "none", "activation": "identity", "backend": "native"}
    plain, _ = ff.linear_forward(x, weight, **options)
    with precision("high"):
        high, _ = ff.linear_forward(x, weight, **options)
    assert not torch.equal(high, plain)
    assert plain.isinf().any() and plain.isnan().any()
    torch.testing.assert_close(high, plain, rtol=2**-14, atol=2**-14 * 40, equal_nan=True)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_step_reads_the_setting_when_it_is_called(monkeypatch, compute_dtype):
    made, seen = problem(dtype=torch.float32), Seen()
    optimizer = torch.optim.Adam([made.weight, made.bias])
    net = ff.FFNetwork([ff.FFLinear(5, 7, compute_dtype=compute_dtype), ff.FFLinear(7, 3, compute_dtype=compute_dtype)])
    optimizers = torch.optim.Adam(net.parameters())
    for backend in map(select.load, ("native", "eager")):
        for name in {"linear_step_", "linear_steps_"} & set(vars(backend)):
            monkeypatch.setattr(backend, name, seen.around(getattr(backend, name)))
    for name in ("highest", "high", "medium", "highest", "high"):
        with precision(name):
            for _ in range(2):  # the second by the plan of the first
                ff.linear_step_(made.x_pos, made.x_neg, made.weight, made.bias, optimizer, compute_dtype=compute_dtype)
                net.step(made.x_pos, made.x_neg, optimizers)
        expected = "high" if name != "highest" and compute_dtype is None else "highest"
        assert seen.precisions == [expected] * 6
        seen.precisions.clear()


def test_a_forward_pass_and_its_backward_read_it_too(monkeypatch):
    weight, seen = torch.randn(7, 5, requires_grad=True), Seen()
    monkeypatch.setattr(ops, "linear_forward", seen.around(ops.linear_forward))
    for name in ("high", "highest"):
        with precision(name):
            y, _ = ff.linear_forward(torch.rand(4, 5), weight, activation="gelu")
        y.sum().backward()  # multiplies again, as the forward pass did
        with precision(name), torch.no_grad():
            ff.linear_forward(torch.rand(4, 5), weight)
        assert seen.precisions == [name] * 3
        seen.precisions.clear()


def test_compiled_code_is_compiled_anew_for_another_setting(monkeypatch):
    made, seen, eager = problem(dtype=torch.float32), Seen(), select.load("eager")
    monkeypatch.setattr(eager, "linear_step_", seen.around(eager.linear_step_))
    optimizer = torch.optim.Adam([made.weight, made.bias])

    def step() -> torch.Tensor:
        of = (made.x_pos, made.x_neg, made.weight, made.bias, optimizer)
        return ff.linear_step_(*of, backend="eager").loss

    compiled = torch.compile(step, backend="aot_eager")
    for name in ("highest", "high", "highest"):
        with precision(name):
            compiled()
    assert seen.precisions == ["highest", "high", "highest"]
