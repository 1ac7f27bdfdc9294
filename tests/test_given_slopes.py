"""Updates by given slopes of every shape that the border has, low rank too: the compiled library against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffkernels.autograd import NEEDS_Z
from ffkernels.backends.eager import step as eager_step
from ffkernels.backends.native import step
from ffkernels.reference import ACTIVATIONS
from ffkernels.spec import Layer, Numbers, PeerPull, Rows, Slopes, Slot, Update

from .steps import error
from .test_native import BEST, LOADED, SETS, needs_library

pytestmark = needs_library


def by_unit(slope: Tensor, units: int) -> Tensor:
    """`[rows, groups]` as `[rows, units]`: each unit has its group's number."""
    return torch.cat([g.expand(-1, len(u)) for g, u in zip(slope.split(1, 1), torch.arange(units).tensor_split(
        slope.shape[1]), strict=True)], 1)  # fmt: skip


def expected(
    x: Tensor, slopes: Slopes, activation: str, product: torch.dtype, of_magnitudes: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradients by weight and bias, in the dtype of `x`, of operands rounded to `product`.

    `of_magnitudes`: the sums of their terms' magnitudes, which rounding is relative to.
    """
    z = slopes.activity.detach().clone().requires_grad_()
    slope = torch.zeros_like(x[:, :1])
    if slopes.first is not None:
        slope = slope + (slopes.first @ slopes.basis if slopes.basis is not None else by_unit(slopes.first, z.shape[1]))
    if slopes.second is not None:
        y = ACTIVATIONS[activation](z) if activation in NEEDS_Z else z
        slope = slope + 2 * by_unit(slopes.second, z.shape[1]) * y.detach()
    (dz,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, slope.expand_as(z))
    scale = 1 / (x.square().sum(1, keepdim=True).sqrt() + 1e-4)
    left, right = ((dz * scale).to(product).to(x.dtype), x.to(product).to(x.dtype))
    if of_magnitudes:
        left, right, dz = left.abs(), right.abs(), dz.abs()
    return left.t() @ right, dz.sum(0)


def spread(values: Tensor, how: str) -> Tensor:
    """The same numbers with other strides."""
    if how == "columns":
        return values.t().contiguous().t()
    wide = torch.full((2 * len(values), values.shape[1] + 3), torch.nan)
    wide[::2, : values.shape[1]] = values
    return wide[::2, : values.shape[1]] if how == "gaps" else values


def update_of(
    x_pos: Tensor,
    x_neg: Tensor,
    slopes: Slopes,
    activation: str,
    product: torch.dtype,
    mean: Tensor | None,
    peers: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients that the library hands out."""
    units = slopes.activity.shape[1]
    weight, bias = torch.full((units, x_pos.shape[1]), torch.nan), torch.full((units,), torch.nan)
    layer = Layer(torch.zeros_like(weight), torch.zeros_like(bias), "l2", 1e-4, "add", activation, product)
    update = Update("grad", Slot([weight], Numbers()), Slot([bias], Numbers()))
    # A pull of no strength: the activities are seen, and nothing else changes.
    pull = PeerPull(mean, 0.0, 0.9, peers == "gated")
    step.linear_update_(Rows(x_pos, x_neg), layer, slopes, pull, update)
    return weight, bias


@settings(max_examples=300, deadline=None)
@given(
    rows=st.tuples(*[st.integers(0, 40)] * 2).filter(any),
    units=st.one_of(st.integers(1, 80), st.just(700)),
    columns=st.integers(1, 70),
    first=st.sampled_from(["none", "row", "groups", "units", "basis"]),
    second=st.sampled_from(["none", "row", "groups", "units"]),
    rank=st.one_of(st.integers(1, 12), st.just(90)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    product=st.sampled_from([torch.float32, torch.bfloat16]),
    how=st.sampled_from(["whole", "columns", "gaps"]),
    copies=st.booleans(),
    peers=st.sampled_from([None, "straight through", "gated"]),
    instruction_set=st.sampled_from(SETS),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**20),
)
def test_given_slopes(
    rows, units, columns, first, second, rank, activation, product, how, copies, peers, instruction_set, threads, seed
):
    if first == second == "none":
        second = "groups"
    torch.manual_seed(seed)
    total = sum(rows)
    x = torch.randn(total, columns)
    if copies and rows[0] and columns > 8:
        rows = (rows[0], rows[0] * 2)
        total = sum(rows)
        x = torch.randn(rows[0], columns).repeat(3, 1)
        x[:, 0] = torch.randn(total)
    y = torch.randn(total, units)
    if activation not in NEEDS_Z:
        y = ACTIVATIONS[activation](y)
    wide = {"row": 1, "groups": min(rank, units), "units": units, "basis": rank}
    found = [None if kind == "none" else torch.randn(total, wide[kind]) / 8 for kind in (first, second)]
    left_out = torch.rand(total) < 0.3
    for slope in found:
        if slope is not None:
            slope[left_out] = 0
    basis = torch.randn(rank, units) / rank**0.5 if first == "basis" else None
    slopes = Slopes(*(None if t is None else spread(t, how) for t in (y, *found, basis)))
    mean = torch.rand(units) if peers else None
    before = torch.get_num_threads()
    LOADED.library.ffk_limit(instruction_set.encode())
    torch.set_num_threads(threads)
    try:
        ours = update_of(spread(x[: rows[0]], how), spread(x[rows[0] :], how), slopes, activation, product, mean, peers)
    finally:
        torch.set_num_threads(before)
        LOADED.library.ffk_limit(BEST)
    plain = Slopes(y, *found, basis)
    wide_slopes = Slopes(*(None if t is None else t.double() for t in plain))
    exact, sizes = (expected(x.double(), wide_slopes, activation, torch.float64, of) for of in (False, True))
    rounding = 1e-6 if product == torch.float32 else 2e-3
    for a, b, torchs, size in zip(ours, exact, expected(x, plain, activation, product), sizes, strict=True):
        floor = max(0.1, float(size.norm()))
        assert error(a, b, floor) <= 2 * error(torchs, b, floor) + rounding


def test_rows_left_out_may_hold_anything():
    x, y = torch.rand(20, 9), torch.rand(20, 30)
    slopes, basis = torch.randn(20, 4), torch.randn(4, 30)
    slopes[5] = 0
    whole = update_of(x, x[:0], Slopes(y, slopes, None, basis), "relu", torch.float32, None)
    y[5] = torch.nan
    for a, b in zip(
        whole, update_of(x, x[:0], Slopes(y, slopes, None, basis), "relu", torch.float32, None), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_pull_over_several_blocks(gated, activation):
    """More activities than are kept at once, under a pull that all positive rows have a part in."""
    rows, units = 4300, 1000
    x, z = torch.randn(rows, 9), torch.randn(rows, units)
    activity = z if activation in NEEDS_Z else z.relu()
    slopes = Slopes(activity, torch.randn(rows, 1) / rows, torch.randn(rows, 5) / rows)
    sides = torch.rand(rows) < 0.5

    def gradients(backend, dtype: torch.dtype) -> list[Tensor]:
        mean, weight, bias = (
            torch.full((units,), 0.5, dtype=dtype),
            torch.zeros(units, 9, dtype=dtype),
            torch.zeros(units),
        )
        state = [torch.zeros_like(weight)], [torch.zeros_like(bias, dtype=dtype)]
        layer = Layer(weight, bias.to(dtype), "l2", 1e-4, "add", activation, dtype)
        given = Slopes(*(None if t is None else t.to(dtype) for t in slopes))
        update = Update("grad", *(Slot(own, Numbers()) for own in state))
        backend.linear_update_(
            Rows(x.to(dtype), x[:0].to(dtype), sides), layer, given, PeerPull(mean, 0.5, 0.9, gated), update
        )
        return [*state[0], *state[1], mean]

    exact, torchs = gradients(eager_step, torch.float64), gradients(eager_step, torch.float32)
    for a, b, c in zip(gradients(step, torch.float32), exact, torchs, strict=True):
        assert error(a, b) <= 2 * error(c, b) + 1e-6
