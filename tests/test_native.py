"""The compiled CPU backend: against the definition in float64, on every instruction set of this CPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ffkernels as ff
from ffkernels import reference
from ffkernels import validation as check
from ffkernels.backends.native import library, records

from .steps import OPTIMIZERS, Problem, assert_same_state, error, problem, state_of
from .test_step import LAYOUTS, objectives, specification

LOADED = library.load()
pytestmark = pytest.mark.skipif(LOADED.library is None, reason=LOADED.reason)
needs_library = pytestmark

BEST = b""
SETS = [
    name
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "baseline")
    if LOADED.library and LOADED.library.ffk_limit(name.encode()) == 0
]
if LOADED.library:
    LOADED.library.ffk_limit(BEST)

NEAR = 5e-5  # of float32 numbers that went through a few steps, in the Frobenius norm
FLOOR = 0.1  # the least norm that counts: differences of goodness cancel to the rounding of goodness


@contextmanager
def limited_to(name: str) -> Iterator[None]:
    """Calls inside run on this instruction set."""
    assert LOADED.library.ffk_limit(name.encode()) == 0
    try:
        yield
    finally:
        LOADED.library.ffk_limit(BEST)


@pytest.fixture(params=SETS)
def instruction_set(request):
    with limited_to(request.param):
        yield request.param


def in_float64(options: dict) -> dict:
    """Options whose tensors are widened, for the definition."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    objective = wide["objective"]
    if isinstance(objective.threshold, torch.Tensor):
        wide["objective"] = replace(objective, threshold=objective.threshold.double())
    return wide


def compare(
    made: Problem, steps: int = 2, x_neg_is_there: bool = True, sets: Sequence[str] = SETS[:1], **options: object
) -> None:
    """Steps by the library, and by the definition in float64 and in float32, whose own error is part of the budget."""

    def run(step: Callable[..., Any], p: Problem, given: dict[str, Any]) -> dict[Any, Tensor | None]:
        numbers: dict[Any, Tensor | None] = {}
        for i in range(steps):
            found = step(p.x_pos, p.x_neg if x_neg_is_there else None, p.weight, p.bias, p.optimizer, **given)
            numbers |= {(i, name): getattr(found, name) for name in ("y", "sumsq", "goodness", "loss")}
        return numbers | state_of(p)

    expected = run(reference.linear_step_, made.copy(torch.float64), in_float64(options))
    torchs = run(reference.linear_step_, made.copy(), options)
    for name in sets:
        with limited_to(name):
            actual = run(ff.linear_step_, made.copy(), {**options, "backend": "native"})
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert error(actual[key], value, FLOOR) <= NEAR + 4 * error(torchs[key], value, FLOOR), (name, key)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    options=specification,
    objective=objectives,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    rows=st.tuples(*[st.integers(0, 70)] * 2),
    bias=st.booleans(),
    weighted=st.booleans(),
    mixed=st.booleans(),
    instruction_set=st.sampled_from(SETS),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**20),
)
def test_agrees_with_the_definition(
    data, options, objective, optimizer, shape, rows, bias, weighted, mixed, instruction_set, threads, seed
):
    torch.manual_seed(seed)
    n_pos, n_neg = (rows[0], rows[0]) if objective.paired else rows
    n = n_pos + n_neg
    if isinstance(objective.threshold, torch.Tensor):
        objective = replace(objective, threshold=objective.threshold.float())
    if not objective.paired and data.draw(st.booleans()):
        objective = replace(objective, threshold=torch.rand(n) * 4)
    ours = problem(n_pos, n_neg, *shape, optimizer=optimizer, bias=bias, dtype=torch.float32)
    ours.weight.data /= shape[0] ** 0.5
    ours.x_pos[: n_pos // 4] = 0
    options = {**options, "objective": objective}
    if weighted:
        options["sample_weight"] = torch.rand(n // 2 if objective.paired else n)
    if mixed:
        order = torch.randperm(n)
        ours = ours._replace(x_pos=torch.cat([ours.x_pos, ours.x_neg])[order])
        options["is_positive"] = (torch.arange(n) < n_pos)[order]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(ours, x_neg_is_there=not mixed, sets=[instruction_set], **options)
    finally:
        torch.set_num_threads(before)


# Beyond one depth of a tile, one chunk of units, one block of rows; in vectors that are and are not whole.
LARGE = [(450, 380, 130, 70), (300, 300, 900, 50), (4300, 4300, 37, 530), (513, 513, 512, 96), (700, 0, 20, 1000)]


@pytest.mark.parametrize(
    ("optimizer", "activation"), [("sgd-momentum", "relu"), ("adam", "relu"), ("rmsprop", "relu"), ("adam", "gelu")]
)
@pytest.mark.parametrize("shape", LARGE)
def test_large_shapes(shape, optimizer, activation):
    ours = problem(*shape, optimizer=optimizer, dtype=torch.float32)
    ours.weight.data /= shape[2] ** 0.5
    compare(ours, steps=2, sets=SETS, objective=ff.Objective(threshold=0.5), outputs="pre", activation=activation)


@pytest.mark.parametrize("rows", [1, 9, 130, 4200])
@pytest.mark.parametrize("columns", [slice(0, 10), slice(90, 101), slice(501, 512), slice(0, 0), slice(40, 300)])
@pytest.mark.parametrize(("saturated", "activation"), [(False, "relu"), (True, "relu"), (False, "gelu")])
def test_sides_that_differ_in_a_label_field(rows, columns, saturated, activation):
    ours = problem(rows, rows, 512, 530 if rows > 4000 else 40, optimizer="adam", dtype=torch.float32)
    ours.weight.data /= 512**0.5
    ours.x_neg.copy_(ours.x_pos)
    ours.x_neg[:, columns] = torch.randn(rows, columns.stop - columns.start)
    objective = ff.Objective(goodness="sum", threshold=20.0, temperature=0.02 if saturated else 5.0)
    compare(ours, steps=1, sets=SETS, objective=objective, norm="none", outputs="pre", activation=activation)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_rows_with_zero_coefficient_are_left_out_exactly(activation, instruction_set):
    """Half of the rows have no say: their values, infinity among them, reach no sum of the update."""
    ours = problem(60, 60, 30, 50, dtype=torch.float32)
    theirs = ours.copy()
    objective = ff.Objective(goodness="sum", threshold=torch.cat([torch.full((60,), -1e6), torch.full((60,), 30.0)]))
    for p, scale in ((ours, 1.0), (theirs, 1e3)):
        options = {"objective": objective, "norm": "none", "activation": activation, "backend": "native"}
        ff.linear_step_(p.x_pos * scale, p.x_neg, p.weight, p.bias, p.optimizer, **options)
    assert_same_state(ours, theirs, 0)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_coefficients_below_the_smallest_normal_number_count_as_zero(compute, instruction_set):
    """A float32 below 1.2e-38 in a product takes a hundred times as long and moves no weight: its row is saturated."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.eye(2)
    # One side alone, half of the mean's weight: coefficients are sigmoid(t), t the logit of each row.
    for logit, there in ((-86.0, True), (-88.0, False)):
        threshold = rows.square().sum(1) - logit
        gradient = torch.nn.Parameter(weight.clone())
        objective = ff.Objective(goodness="sum", threshold=threshold)
        options = {"objective": objective, "norm": "none", "compute_dtype": compute, "backend": "native"}
        ff.linear_step_(rows[:0], rows, gradient, None, None, **options)
        expected = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) * (rows.T @ rows).double()
        assert gradient.grad is not None
        if there:
            torch.testing.assert_close(gradient.grad.double(), expected, rtol=1e-2, atol=0)
        else:
            assert not gradient.grad.any()


@pytest.mark.parametrize("shape", [(200, 200, 300, 200), (4300, 4300, 37, 530), (64, 64, 100, 5)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_number_of_threads_changes_no_bit(shape, compute, activation, instruction_set):
    made = problem(*shape, optimizer="adam", dtype=torch.float32)
    runs, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            run = made.copy()
            given = {"compute_dtype": compute, "activation": activation, "backend": "native"}
            results = [
                ff.linear_step_(run.x_pos, run.x_neg, run.weight, run.bias, run.optimizer, **given) for _ in range(2)
            ]
        finally:
            torch.set_num_threads(before)
        runs.append([*state_of(run).values(), *(t for r in results for t in (r.y, r.sumsq, r.loss))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(layout, dtype):
    made = problem(9, 5, 40, 30, dtype=torch.float32)
    compute = None if dtype == torch.float32 else dtype
    ours = made._replace(x_pos=LAYOUTS[layout](made.x_pos.to(dtype)), x_neg=LAYOUTS[layout](made.x_neg.to(dtype)))
    theirs = made.copy()._replace(x_pos=ours.x_pos.contiguous(), x_neg=ours.x_neg.contiguous())
    for p in (ours, theirs):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, compute_dtype=compute, backend="native")
    assert_same_state(ours, theirs, 0)


@pytest.mark.parametrize("case", ["sides", "copies", "mask", "pairs by mask", "saturated", "no positives"])
@pytest.mark.parametrize("shape", [(30, 30, 120, 40), (4300, 4300, 37, 530)])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [("relu", False), ("identity", False), ("leaky_relu", False), ("gelu", False), ("relu", True), ("silu", True)],
)
def test_peer_normalisation(case, shape, activation, gated):
    """The pull of all positive rows, whichever of them the update leaves out, block by block."""
    made = problem(*shape, optimizer="adam", dtype=torch.float32)
    made.weight.data /= shape[2] ** 0.5
    rows = shape[0]
    goodness = {"goodness": "sum", "threshold": 1.0, "temperature": 1e-3} if case == "saturated" else {"threshold": 0.5}
    options: dict = {"objective": ff.Objective(**goodness), "activation": activation, "outputs": "none"}
    if case == "copies":
        made.x_neg.copy_(made.x_pos)
        made.x_neg[:, 5:9] = torch.randn(rows, 4)
    if "mask" in case:
        order = torch.randperm(2 * rows)
        made = made._replace(x_pos=torch.cat([made.x_pos, made.x_neg])[order])
        options["is_positive"] = order < rows
        if "pairs" in case:
            options["objective"] = ff.Objective(loss="symba")
    if case == "no positives":
        made = made._replace(x_pos=made.x_pos[:0])
    peer = ff.PeerNormalisation(strength=0.5, gated=gated)

    def run(step, p, **asked) -> dict[str, Tensor]:
        mean = torch.full((shape[3],), 0.5, dtype=p.weight.dtype)
        for _ in range(2):
            step(
                p.x_pos, None if "mask" in case else p.x_neg, p.weight, p.bias, p.optimizer,
                peer=peer, peer_mean=mean, **options, **asked,
            )  # fmt: skip
        return {**state_of(p), "mean": mean}

    exact, plain = run(reference.linear_step_, made.copy(torch.float64)), run(reference.linear_step_, made.copy())
    for instruction_set in SETS:
        with limited_to(instruction_set):
            ours = run(ff.linear_step_, made.copy(), backend="native")
        for name, value in exact.items():
            assert error(ours[name], value, FLOOR) <= NEAR + 4 * error(plain[name], value, FLOOR), (
                instruction_set,
                name,
            )


@pytest.mark.parametrize("loss", ["logistic", "symba", "swish"])
def test_rows_below_a_fraction_are_left_out(loss, instruction_set):
    made = problem(60, 60, 50, 40, optimizer="sgd", dtype=torch.float32)
    made.weight.data /= 50**0.5
    objective = ff.Objective(loss=loss, threshold=0.5, temperature=0.05 if loss == "logistic" else 1.0, alpha=200.0)
    ours, theirs = made.copy(), made.copy()
    results = [
        ff.linear_step_(
            p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, skip_below=0.3, backend=backend
        )
        for p, backend in ((ours, "native"), (theirs, "eager"))
    ]
    kept = objective.in_doubt(results[0].goodness, torch.arange(120) < 60, 0.3)
    assert 0 < kept.sum() < len(kept)
    assert_same_state(ours, theirs, NEAR)
    assert not torch.equal(ours.weight, made.weight)


SHAPES = [(1, 1, 1, 1), (7, 5, 33, 17), (60, 60, 129, 50), *LARGE]
COPIES = [(shape, columns) for shape in SHAPES[2:] if shape[0] == shape[1] for columns in (slice(0, 4), slice(3, 4))]


@pytest.mark.parametrize(("shape", "columns"), [*((shape, None) for shape in SHAPES), *COPIES])
@pytest.mark.parametrize(("saturated", "activation"), [(False, "relu"), (True, "relu"), (False, "gelu")])
@pytest.mark.parametrize("compute", check.COMPUTE_DTYPES, ids=str)
def test_narrow_products(shape, columns, saturated, activation, compute):
    """What is rounded is known, so results before the update agree with float64 on the rounded operands closely."""
    made = problem(*shape, dtype=torch.float32)
    made.weight.data.div_(shape[2] ** 0.5)
    made = made._replace(x_pos=made.x_pos.to(compute).float(), x_neg=made.x_neg.to(compute).float())
    if columns is not None:
        changed = made.x_neg[:, columns].sign()
        made.x_neg.copy_(made.x_pos)
        made.x_neg[:, columns] = changed
        made.x_pos[:, columns] = 0
    objective = ff.Objective(threshold=(-1e4, 0.5) if saturated else 0.5)
    exact = made.copy(torch.float64)
    exact.weight.data.copy_(made.weight.data.to(compute))
    options = {"objective": objective, "outputs": "pre", "activation": activation}
    b = reference.linear_step_(
        exact.x_pos, exact.x_neg, exact.weight, exact.bias, torch.optim.SGD([exact.weight, exact.bias]), **options
    )
    half_ulp = torch.finfo(compute).eps / 2
    for instruction_set, rows_in in product(SETS, (torch.float32, compute)):
        ours = made.copy()
        with limited_to(instruction_set):
            a = ff.linear_step_(
                ours.x_pos.to(rows_in), ours.x_neg.to(rows_in), ours.weight, ours.bias, None,
                compute_dtype=compute, backend="native", **options,
            )  # fmt: skip
        where = instruction_set, rows_in
        for name in ("sumsq", "goodness", "loss"):
            assert error(getattr(a, name), getattr(b, name)) <= NEAR, (*where, name)
        assert error(a.y, b.y) <= half_ulp + NEAR, where
        assert error(ours.weight.grad, exact.weight.grad) <= half_ulp + NEAR, where
        assert error(ours.bias.grad, exact.bias.grad) <= NEAR, where


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_float16_products_of_rows_of_any_length(size, instruction_set):
    """A power of two moves no digit of a normalised row, far beyond what float16 can hold."""
    made = problem(20, 20, 30, 40, dtype=torch.float32)
    ours, theirs = made.copy(), made.copy()._replace(x_pos=made.x_pos * size, x_neg=made.x_neg * size)
    options = {"eps": 0.0, "compute_dtype": torch.float16, "backend": "native"}
    for p in (ours, theirs):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, **options)
    assert bool(theirs.weight.isfinite().all())
    assert_same_state(ours, theirs, 1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_transposed_weight(optimizer):
    made = problem(20, 20, 30, 40, optimizer=optimizer, dtype=torch.float32)
    weight = torch.nn.Parameter(made.weight.detach().t().contiguous().t())
    compare(
        made._replace(weight=weight, optimizer=OPTIMIZERS[optimizer]([weight, made.bias])), objective=ff.Objective()
    )


def test_it_is_the_default_for_what_it_has():
    p = problem(dtype=torch.float32)
    assert "backend: native" in ff.explain(p.weight, p.optimizer)
    assert "float64" in ff.explain(p.weight.double(), None)
    for activation, gated in product(check.ACTIVATIONS, (False, True)):
        options = {"activation": activation, "peer": ff.PeerNormalisation(gated=gated)}
        assert "backend: native" in ff.explain(p.weight, p.optimizer, **options)
    for compute in check.COMPUTE_DTYPES:
        assert "backend: native" in ff.explain(p.weight, p.optimizer, compute_dtype=compute)
    with pytest.raises(ValueError, match=r"backend='native' cannot run this call: torch.float64 parameters"):
        ff.linear_forward(p.x_pos.double(), p.weight.double(), backend="native")


def test_no_memory_is_an_error_and_changes_nothing():
    p = problem(dtype=torch.float32)
    before = {name: value.clone() for name, value in state_of(p).items()}
    positive = torch.ones(1, dtype=torch.bool)
    at, call = dict(records.offsets()), bytearray(records.LAYOUT.size)
    for path, format, value in (
        ("rows.x_pos.rows", "q", 1),
        ("rows.is_positive", "P", positive.data_ptr()),
        ("layer.weight.at", "P", p.weight.data_ptr()),
        ("layer.weight.rows", "q", 7),
        ("layer.weight.columns", "q", 2**44),
        ("threads", "i", 1),
    ):
        struct.pack_into(format, call, at[path], value)
    for name in ("ffk_linear_step", "ffk_linear_forward", "ffk_linear_update"):
        assert getattr(LOADED.library, name)(bytes(call)) == 1
    assert all(torch.equal(value, before[name]) for name, value in state_of(p).items())


def test_members_lie_where_the_library_looks_for_them():
    found = ctypes.POINTER(ctypes.c_size_t)()
    LOADED.library.ffk_layout.restype = ctypes.c_int64
    count = LOADED.library.ffk_layout(ctypes.byref(found))
    of_calls = [records.LAYOUT.size, *(at for _, at in records.offsets())]
    of_passes = [records.PASS_LAYOUT.size, *(at for _, at in records.pass_offsets())]
    assert found[:count] == of_calls + of_passes


def test_the_header_is_that_of_the_records():
    path = Path(__file__).parents[1] / "csrc" / "cpu" / "records.h"
    assert path.read_text() == records.header()


def test_a_library_from_other_sources_is_refused(monkeypatch):
    needed = records.interface()
    monkeypatch.setattr(records, "interface", lambda: needed + 1)
    library.load.cache_clear()
    try:
        assert "built from other sources" in library.load().reason
        p = problem(dtype=torch.float32)
        assert "backend: eager" in ff.explain(p.weight, p.optimizer)
    finally:
        monkeypatch.undo()
        library.load.cache_clear()


def test_without_the_library_the_reason_is_told(monkeypatch):
    monkeypatch.delenv("FFKERNELS_LIBRARY", raising=False)
    monkeypatch.setattr(library, "build_record", lambda folder: {"reason": "FFKERNELS_BUILD=off"})
    library.load.cache_clear()
    try:
        assert library.describe() == ["the compiled library was not built: FFKERNELS_BUILD=off"]
    finally:
        monkeypatch.undo()
        library.load.cache_clear()


@pytest.mark.parametrize("shape", [(4, 4, 192), (4, 4, 385), (4, 4, 6000), (64, 16, 6000)])
def test_sums_of_many_squares_keep_their_digits(shape):
    """However many units there are: within twice the error of PyTorch's own sum."""
    rows, width, units = shape
    torch.manual_seed(3)
    ours, torchs = [], []
    for _ in range(30):
        x, weight = torch.randn(rows, width), torch.randn(units, width)
        _, found = ff.linear_forward(x, weight, norm="none", activation="identity", backend="native")
        exact = (x.double() @ weight.double().t()).square().sum(1)
        ours.append(found / exact - 1)
        torchs.append((x @ weight.t()).square().sum(1) / exact - 1)
    error, plain = (torch.cat(errors).square().mean().sqrt() for errors in (ours, torchs))
    assert error <= 2 * plain


def test_negative_views_have_their_sign():
    x, weight = torch.rand(5, 8), torch.randn(6, 8)
    negative = torch._neg_view(x)
    expected = ff.linear_forward(-x, weight, activation="identity", backend="native")
    found = ff.linear_forward(negative, weight, activation="identity", backend="native")
    assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))
