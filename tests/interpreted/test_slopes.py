"""The update with given slopes against float64 autograd, of the loss `sum (first y + second y^2)` that has them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import ffkernels as ff
from ffkernels import optim, spec
from ffkernels import peer as peers
from ffkernels import validation as check
from ffkernels.autograd import ACTIVATIONS, NEEDS_Z
from ffkernels.backends import select
from ffkernels.normalisation import row_scale, row_sumsq

from ..steps import OPTIMIZERS, Problem, error, problem, state_of
from .test_kernels import assert_close, go, launch, use

# How many slopes a row has, of each order, in a layer of 37 units; groups of 8, 8, 7, 7 and 7.
UNITS = 37
SHAPES = [(None, 1), (1, None), (None, 5), (5, 1), (UNITS, None), (5, UNITS), (UNITS, UNITS), (None, None)]
PULLS = [ff.PeerNormalisation(strength=0.3, momentum=0.8, gated=gated) for gated in (False, True)]


class Options(NamedTuple):
    norm: spec.Norm = "l2"
    eps_mode: spec.EpsMode = "add"
    activation: spec.Activation = "relu"
    peer: ff.PeerNormalisation | None = None
    is_positive: Tensor | None = None
    sumsq_known: bool = False


def drawn(n: int, first: int | None, second: int | None) -> list[Tensor | None]:
    return [None if width is None else torch.randn(n, width) for width in (first, second)]


def by_unit(slope: Tensor | None, units: int) -> Tensor:
    if slope is None:
        return torch.zeros(1, units)
    groups = torch.arange(units).tensor_split(slope.shape[1])
    return torch.cat([slope[:, g : g + 1].expand(-1, len(group)) for g, group in enumerate(groups)], 1)


def activities(p: Problem, options: Options) -> tuple[Tensor, Tensor]:
    """`z` and `y` by the definition."""
    x = torch.cat([p.x_pos, p.x_neg])
    z = x
    if options.norm != "none":
        z = row_scale(row_sumsq(x, x.dtype), x.shape[1], options.norm, 1e-4, options.eps_mode).unsqueeze(1) * x
    z = torch.nn.functional.linear(z, p.weight, p.bias)
    return z, ACTIVATIONS[options.activation](z)


def positives(p: Problem, options: Options) -> Tensor:
    sides = torch.arange(len(p.x_pos) + len(p.x_neg)) < len(p.x_pos)
    return sides if options.is_positive is None else options.is_positive


def by_autograd(p: Problem, slopes: list[Tensor | None], options: Options) -> dict[str, Tensor]:
    """A step of the optimizer itself, and the running mean that it leaves."""
    z, y = activities(p, options)
    given = [None if slope is None else slope.double() for slope in slopes]
    if len(given) == 3:
        given = [given[0] @ given[2], given[1]]
    first, second = (by_unit(slope, len(p.weight)).double() for slope in given)
    loss = (first * y + second * y.square()).sum()
    found = {}
    if options.peer is not None:
        positive = positives(p, options)
        count, mean = int(positive.sum()), torch.full_like(y[0], 0.5)
        given = peers.pull(options.peer, mean, len(p.weight))
        with torch.no_grad():
            found["mean"] = peers.moved_mean(mean, y[positive].sum(0), count, given.momentum)
            pull = peers.pull_of(found["mean"], given.strength, count)
        loss = loss + ((y if options.peer.gated else z)[positive] * pull).sum()
    p.optimizer.zero_grad()
    loss.backward()
    p.optimizer.step()
    return {**found, **state_of(p)}


def updated(
    backend: str, p: Problem, kept: Tensor, slopes: list[Tensor | None], options: Options, compute: torch.dtype
) -> dict[str, Tensor]:
    dtype = p.weight.dtype
    mean = None if options.peer is None else torch.full((len(p.weight),), 0.5, dtype=dtype)
    known = torch.cat([p.x_pos, p.x_neg]).to(dtype).square().sum(1) if options.sumsq_known else None
    plan = optim.plan(p.optimizer, p.weight, p.bias)
    with torch.no_grad():
        select.load(backend).linear_update_(
            spec.Rows(p.x_pos, p.x_neg, options.is_positive, known),
            spec.Layer(p.weight, p.bias, options.norm, 1e-4, options.eps_mode, options.activation, compute),
            spec.Slopes(kept, *slopes),
            peers.pull(options.peer, mean, len(p.weight)),
            plan.record,
        )
        plan.finish(p.optimizer)
    return {**({} if mean is None else {"mean": mean}), **state_of(p)}


def compare(made: Problem, slopes: list[Tensor | None], options: Options, compute: torch.dtype = torch.float32) -> None:
    """The kernels, plain torch in the same dtype, and autograd in float64, all on the same activities."""
    exact = made.copy(torch.float64)
    kept = activities(exact, options)[options.activation not in NEEDS_Z].detach().float()
    expected = by_autograd(exact, slopes, options)
    # A copy has its rows in the weight's dtype.
    ours, torchs = (made.copy()._replace(x_pos=made.x_pos, x_neg=made.x_neg) for _ in range(2))
    found = updated("triton", ours, kept, slopes, options, compute)
    plain = updated("eager", torchs, kept, slopes, options, compute)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], plain[name], value, compute, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", check.ACTIVATIONS)
def test_every_activation_and_shape_of_slopes(activation, shape):
    optimizer = ("sgd-momentum", "adam", "rmsprop")[(check.ACTIVATIONS.index(activation) + SHAPES.index(shape)) % 3]
    made = problem(14, 9, 18, UNITS, optimizer=optimizer, dtype=torch.float32)
    compare(made, drawn(23, *shape), Options(activation=activation))


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", [(None, 1), (5, 1), (UNITS, UNITS)], ids=str)
def test_narrow_operands(shape, rounded, compute):
    """Rows of float32 and rows that are rounded already; slopes of 1e-9, which float16 does not have."""
    made = problem(14, 9, 18, UNITS, optimizer="sgd-momentum", dtype=torch.float32)
    rows = [x.to(compute) for x in (made.x_pos, made.x_neg)]
    small = [None if slope is None else 1e-9 * slope for slope in drawn(23, *shape)]
    for slopes in (drawn(23, *shape), small):
        begun = made.copy()
        begun = begun._replace(x_pos=rows[0], x_neg=rows[1]) if rounded else begun
        compare(begun, slopes, Options(activation="gelu", norm="rms"), compute)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bias", [False, True])
def test_optimizers(optimizer, bias):
    made = problem(14, 9, 18, UNITS, optimizer=optimizer, bias=bias, dtype=torch.float32)
    compare(made, drawn(23, UNITS, 5), Options(activation="silu"))


@pytest.mark.parametrize("peer", PULLS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [(None, 1), (None, 5), (UNITS, UNITS)], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_peer_normalisation(mixed, shape, activation, peer, monkeypatch):
    use("listed and split", monkeypatch)
    monkeypatch.setattr(launch, "INPUT_SPLITS", 3)
    if peer.gated:
        use("given and split", monkeypatch)
    made = problem(70, 30, 18, UNITS, optimizer="adam", dtype=torch.float32)
    side = torch.arange(100)[torch.randperm(100)] < 70 if mixed else None
    if mixed:
        both = torch.cat([made.x_pos, made.x_neg])
        made = made._replace(x_pos=both, x_neg=both[:0])
    slopes = drawn(100, *shape)
    slopes[1][::3] = 0
    compare(made, slopes, Options(activation=activation, peer=peer, is_positive=side))


@pytest.mark.parametrize("form", ["given", "listed", "split", "listed and split"])
@pytest.mark.parametrize("shape", [(None, 1), (5, 5)], ids=str)
def test_forms(shape, form, monkeypatch):
    use(form, monkeypatch)
    made = problem(35, 18, 18, UNITS, optimizer="adam", dtype=torch.float32)
    compare(made, drawn(53, *shape), Options())


@pytest.mark.parametrize("way", ["pointers", "bulk copies"])
@pytest.mark.parametrize("shape", [(None, 1), (5, 40)], ids=str)
def test_ways(shape, way, monkeypatch):
    go(way, monkeypatch)
    seen = []
    descriptor = launch.descriptor
    monkeypatch.setattr(launch, "descriptor", lambda *a: seen.append(descriptor(*a)) or seen[-1])
    made = problem(53, 0, 24, 40, dtype=torch.float32)
    compare(made, drawn(53, *shape), Options())
    assert len(seen) == (2 if way == "bulk copies" else 0) and None not in seen


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("eps_mode", check.EPS_MODES)
@pytest.mark.parametrize("norm", check.NORMS)
def test_row_scales(norm, eps_mode, known):
    made = problem(21, 14, 37, 18, dtype=torch.float32)
    made.x_pos[3] = 0
    compare(made, drawn(35, 18, 1), Options(norm, eps_mode, sumsq_known=known))


def test_slopes_with_gaps():
    """Expanded, transposed, and every other column of a tensor, as autograd hands them out."""
    made = problem(14, 9, 18, UNITS, dtype=torch.float32)
    compare(made, [torch.randn(()).expand(23, UNITS), torch.randn(UNITS, 23).t()], Options())
    compare(made, [torch.randn(23, 10)[:, ::2], torch.randn(5, 23).t()], Options())
    compare(made, [None, torch.randn(23, 2)[:, 1:]], Options())


def of_low_rank(n: int, rank: int, second: int | None, units: int = UNITS) -> list[Tensor | None]:
    """First slopes, second ones, and the basis of the first."""
    return [*drawn(n, rank, second), torch.randn(rank, units)]


@pytest.mark.parametrize("second", [None, 1, 5, UNITS])
@pytest.mark.parametrize("rank", [1, 5, 16, 19])
def test_slopes_of_low_rank(rank, second, monkeypatch):
    """Up to 16 groups are multiplied out tile by tile, in the kernel; more of them before it."""
    seen = []
    launch_tiles = launch.launch_tiles
    monkeypatch.setattr(launch, "launch_tiles", lambda *a: seen.append(a[3].basis.groups) or launch_tiles(*a))
    activation = check.ACTIVATIONS[rank % len(check.ACTIVATIONS)]
    made = problem(14, 9, 18, UNITS, optimizer="adam", bias=rank != 5, dtype=torch.float32)
    compare(made, of_low_rank(23, rank, second), Options(activation=activation))
    assert seen == [rank if rank <= 16 else None]


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_slopes_of_low_rank_with_narrow_operands(rounded, compute):
    made = problem(14, 9, 18, UNITS, optimizer="sgd-momentum", dtype=torch.float32)
    if rounded:
        made = made._replace(x_pos=made.x_pos.to(compute), x_neg=made.x_neg.to(compute))
    slopes = of_low_rank(23, 10, 1)
    for size in (1.0, 1e-9):
        compare(made, [size * slope for slope in slopes[:2]] + slopes[2:], Options(activation="silu"), compute)


@pytest.mark.parametrize("way", ["pointers", "bulk copies"])
def test_slopes_of_low_rank_split(way, monkeypatch):
    use("split", monkeypatch)
    go(way, monkeypatch)
    compare(problem(70, 0, 24, 40, optimizer="adam", dtype=torch.float32), of_low_rank(70, 5, 5, 40), Options())


def test_slopes_of_low_rank_with_gaps():
    made = problem(14, 9, 18, UNITS, dtype=torch.float32)
    compare(made, [torch.randn(5, 23).t(), None, torch.randn(UNITS, 5).t()], Options())
    compare(made, [torch.randn(23, 10)[:, ::2], None, torch.randn(UNITS).expand(5, UNITS)], Options())


def test_slopes_of_low_rank_beside_a_pull():
    made = problem(14, 9, 18, UNITS, dtype=torch.float32)
    for peer in PULLS:
        compare(made.copy(), of_low_rank(23, 5, None), Options(peer=peer))


@pytest.mark.parametrize("shape", [(None, 1), (5, UNITS)], ids=str)
def test_no_rows(shape):
    compare(problem(0, 0, 18, UNITS, optimizer="adam", dtype=torch.float32), drawn(0, *shape), Options())
    compare(problem(0, 0, 18, UNITS, optimizer="adam", dtype=torch.float32), of_low_rank(0, 5, None), Options())


def test_rows_without_a_slope_are_left_out(monkeypatch):
    """Where rows are listed, what a row at rest holds does not matter."""
    use("listed", monkeypatch)
    made = problem(14, 9, 18, UNITS, dtype=torch.float32)
    slopes = drawn(23, None, 1)
    slopes[1][::2] = 0
    results = []
    for held in (0.0, torch.nan):
        p = made.copy()
        p.x_pos[::2] = held
        kept = torch.ones(23, UNITS)
        results.append(updated("triton", p, kept, slopes, Options(), torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_one_slope_a_row_is_the_coefficient_of_the_step():
    """What a step does that makes its coefficients `2 dLoss/dq` itself."""
    made = problem(14, 9, 18, UNITS, optimizer="adam", dtype=torch.float32)
    objective = ff.Objective("sum", threshold=3.0)
    step, ours = made.copy(), made.copy()
    result = ff.linear_step_(*step[3:], *step[:3], objective=objective, outputs="pre")
    terms = objective.terms(result.sumsq, UNITS, torch.arange(23) < 14, (14, 9))
    slope = terms.coefficient.unsqueeze(1) / 2
    found = updated("triton", ours, result.y, [None, slope], Options(), torch.float32)
    for name, value in state_of(step).items():
        assert error(found[name], value) < 1e-6, name
