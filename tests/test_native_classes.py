"""One-call steps by class goodness in the compiled library: each element against float64, on every instruction set."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ffkernels as ff
from ffkernels import ops, optim, reference
from ffkernels import validation as check
from ffkernels.objectives import CLASS_GOODNESS, CLASS_LOSSES
from ffkernels.spec import Layer, Outputs, PeerPull, Rows

from .steps import OPTIMIZERS, assert_same_state, error, problem, state_of
from .test_native import BEST, LOADED, SETS, needs_library

pytestmark = needs_library

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
FLOOR = 0.05  # the least norm that counts


@st.composite
def objectives(draw):
    loss = draw(st.sampled_from(CLASS_LOSSES))
    return ff.Objective(
        loss=loss,
        classes=draw(st.one_of(st.integers(1, 12), st.just(90))),
        goodness=draw(st.sampled_from(CLASS_GOODNESS)),
        threshold=draw(st.sampled_from([0.5, -1.0, 2.0])),
        maximize=draw(st.booleans()),
        reduction=draw(st.sampled_from(["mean", "sum_of_means"])),
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])) if loss == "cross_entropy" else 0.0,
    )


@contextmanager
def running_on(instruction_set: str, threads: int = 1):
    """The library on one instruction set, torch on so many threads."""
    before = torch.get_num_threads()
    LOADED.library.ffk_limit(instruction_set.encode())
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        LOADED.library.ffk_limit(BEST)


def stepped(step, p, objective, labels, compute_dtype, options):
    """Two steps; their results by name, and what they leave."""
    found = {}
    low = compute_dtype == torch.bfloat16 and step is reference.linear_step_ and p.weight.dtype == torch.float32
    given = {**options, "sample_weight": None if (w := options["sample_weight"]) is None else w.to(p.weight.dtype)}
    if step is ff.linear_step_:
        given |= {"backend": "native", "compute_dtype": compute_dtype}
    if given["peer"] is not None:
        given["peer_mean"] = torch.full((len(p.weight),), 0.5, dtype=p.weight.dtype)
    for i in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            result = step(
                p.x_pos, None, p.weight, p.bias, p.optimizer, objective=objective, labels=labels, **given
            )  # fmt: skip
        for name in ("y", "sumsq", "goodness", "loss"):
            found[f"{name} of step {i}"] = getattr(result, name).detach().clone()
    return {**found, **state_of(p), "peer_mean": given.get("peer_mean")}


@settings(max_examples=300, deadline=None)
@given(
    objective=objectives(),
    rows=st.one_of(st.integers(1, 40), st.just(1)),
    wider=st.one_of(st.just(0), st.integers(0, 60), st.just(500)),
    columns=st.integers(1, 40),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    activation=st.sampled_from(check.ACTIVATIONS),
    norm=st.sampled_from(["l2", "rms", "none"]),
    outputs=st.sampled_from(["post", "pre"]),
    bias=st.booleans(),
    weighted=st.booleans(),
    pulled=st.sampled_from([None, "straight through", "gated"]),
    instruction_set=st.sampled_from(SETS),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**20),
)
def test_agrees_with_autograd(
    objective, rows, wider, columns, optimizer, activation, norm, outputs, bias, weighted, pulled,
    instruction_set, threads, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    units = objective.classes + wider
    ours = problem(rows, 0, columns, units, optimizer=optimizer, bias=bias, dtype=torch.float32)
    ours.weight.data /= columns**0.5
    ours.x_pos[: rows // 4] = 0
    labels = torch.randint(objective.classes, (rows,))
    weights = torch.rand(rows) * 2 if weighted else None
    if weighted:
        weights[rows // 2] = 0
    peer = ff.PeerNormalisation(strength=0.3, gated=pulled == "gated") if pulled else None
    options = {"activation": activation, "norm": norm, "outputs": outputs, "sample_weight": weights, "peer": peer}
    exact, plain = ours.copy(torch.float64), ours.copy()
    with running_on(instruction_set, threads):
        a = stepped(ff.linear_step_, ours, objective, labels, torch.float32, options)
    b = stepped(reference.linear_step_, exact, objective, labels, torch.float32, options)
    c = stepped(reference.linear_step_, plain, objective, labels, torch.float32, options)
    for name, value in b.items():
        budget = 2 * error(c[name], value, FLOOR) + ROUNDING[torch.float32]
        assert error(a[name], value, FLOOR) <= budget, (name, error(a[name], value, FLOOR), budget)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("goodness", CLASS_GOODNESS)
@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_bfloat16_products(loss, goodness, norm, instruction_set):
    """The error of a single number is luck, torch's too: the mean square over many small layers stands for it."""
    squares: dict[str, list[float]] = {}
    draw = random.Random(0)
    for seed in range(60):
        torch.manual_seed(seed)
        classes = draw.choice([1, 2, 5, 10])
        objective = ff.Objective(loss=loss, classes=classes, goodness=goodness, threshold=0.5)
        rows, columns, units = draw.randint(1, 40), draw.randint(1, 40), classes + draw.choice([0, 7, 60])
        ours = problem(rows, 0, columns, units, optimizer=draw.choice(["sgd", "adam"]), dtype=torch.float32)
        ours.weight.data /= columns**0.5
        labels = torch.randint(classes, (rows,))
        options = {
            "activation": draw.choice(check.ACTIVATIONS), "norm": norm,
            "outputs": draw.choice(["post", "pre"]), "sample_weight": None, "peer": None,
        }  # fmt: skip
        exact, plain = ours.copy(torch.float64), ours.copy()
        with running_on(instruction_set):
            a = stepped(ff.linear_step_, ours, objective, labels, torch.bfloat16, options)
        b = stepped(reference.linear_step_, exact, objective, labels, torch.bfloat16, options)
        c = stepped(reference.linear_step_, plain, objective, labels, torch.bfloat16, options)
        for name, value in b.items():
            own, torchs = squares.setdefault(name, [0.0, 0.0])
            squares[name] = [own + error(a[name], value, FLOOR) ** 2, torchs + error(c[name], value, FLOOR) ** 2]
    for name, (own, torchs) in squares.items():
        assert (own / 60) ** 0.5 <= 2 * (torchs / 60) ** 0.5 + ROUNDING[torch.bfloat16] / 4, name


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("goodness", CLASS_GOODNESS)
@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_blocks_of_a_large_batch(loss, goodness, compute_dtype):
    """More activities than are kept at once; groups that end inside a chunk."""
    torch.manual_seed(0)
    objective = ff.Objective(loss=loss, classes=7, goodness=goodness, threshold=0.5)
    p = problem(5000, 0, 9, 1500, optimizer="sgd", dtype=torch.float32)
    labels, exact, plain = torch.randint(7, (5000,)), p.copy(torch.float64), p.copy()
    options = {"activation": "relu", "norm": "l2", "outputs": "pre", "sample_weight": torch.rand(5000), "peer": None}
    a = stepped(ff.linear_step_, p, objective, labels, compute_dtype, options)
    b = stepped(reference.linear_step_, exact, objective, labels, compute_dtype, options)
    c = stepped(reference.linear_step_, plain, objective, labels, compute_dtype, options)
    for name, value in b.items():
        assert error(a[name], value) <= 2 * error(c[name], value) + ROUNDING[compute_dtype], name


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_threads_move_no_bit(loss):
    objective, found = ff.Objective(loss=loss, classes=10), []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        p = problem(200, 0, 70, 333, optimizer="adam", dtype=torch.float32)
        with running_on("", threads):
            result = ff.linear_step_(
                p.x_pos, None, p.weight, p.bias, p.optimizer,
                objective=objective, labels=torch.randint(10, (200,)), backend="native",
            )  # fmt: skip
        found.append((p.weight, p.bias, result.y, result.goodness, result.loss))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_without_rows_only_decay_moves_a_weight(loss):
    p = problem(0, 0, 5, 7, optimizer="sgd-decay", dtype=torch.float32)
    before = p.weight.detach().clone()
    result = ff.linear_step_(
        p.x_pos, None, p.weight, p.bias, p.optimizer,
        objective=ff.Objective(loss=loss, classes=3), labels=torch.zeros(0, dtype=torch.int64), backend="native",
    )  # fmt: skip
    assert float(result.loss) == 0 and result.goodness.shape == (0, 3)
    torch.testing.assert_close(p.weight, before * (1 - 0.1 * 0.05))


@pytest.mark.parametrize("label", [-1, 3, 2**40])
@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_a_label_that_nobody_has_checked_takes_no_part(loss, label):
    """As compiled code brings it, past the checks of values."""
    found = []
    for of_row, weight in ((label, 1.0), (0, 0.0)):
        torch.manual_seed(0)
        p = problem(6, 0, 5, 7, optimizer="sgd", dtype=torch.float32)
        labels, weights, loss_out = torch.tensor([0, 1, 2, 0, of_row, 1]), torch.ones(6), torch.zeros(())
        weights[4] = weight
        ops.linear_step_(
            Rows(p.x_pos, p.x_neg, sample_weight=weights, labels=labels),
            Layer(p.weight.detach(), p.bias.detach(), "l2", 1e-4, "add", "relu", torch.float32),
            ff.Objective(loss=loss, classes=3).goal(0.0),
            PeerPull(None, 0.0, 0.0, False),
            optim.plan(p.optimizer, p.weight, p.bias).record,
            Outputs(None, torch.zeros(6), loss_out, None, torch.zeros(6, 3)),
            "native",
        )
        found.append((p.weight, p.bias, loss_out))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert bool(found[0][2].isnan()) and bool(found[1][2].isfinite())


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_rows_below_skip_below_are_those_of_the_eager_backend(loss):
    found = []
    for backend in ("native", "eager"):
        torch.manual_seed(0)
        p = problem(60, 0, 5, 9, optimizer="sgd", dtype=torch.float32)
        ff.linear_step_(
            p.x_pos, None, p.weight, p.bias, p.optimizer, objective=ff.Objective(loss=loss, classes=3),
            labels=torch.randint(3, (60,)), skip_below=0.3, backend=backend,
        )  # fmt: skip
        found.append(p)
    assert_same_state(*found, 1e-6)
