"""The step against the definition, in float64, over the whole specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ffkernels as ff
from ffkernels import reference
from ffkernels import validation as check
from ffkernels.backends.eager import step as eager_step
from ffkernels.objectives import GOODNESS, LOSSES, REDUCTIONS
from ffkernels.peer import FORMS

from .steps import OPTIMIZERS, Problem, assert_same_state, error, problem

EXACT = 1e-10
FLOOR = 1e-2


def compare(ours: Problem, theirs: Problem, steps: int = 3, x_neg_is_there: bool = True, **options: object) -> None:
    """`steps` steps by the package and by the definition: the same results, parameters and optimizer state."""
    x_neg = ours.x_neg if x_neg_is_there else None
    peer = options.get("peer")
    means = [None if peer is None else torch.full_like(ours.weight.detach()[:, 0], 0.5) for _ in range(2)]
    for _ in range(steps):
        a = ff.linear_step_(ours.x_pos, x_neg, ours.weight, ours.bias, ours.optimizer, peer_mean=means[0], **options)
        b = reference.linear_step_(
            theirs.x_pos, x_neg, theirs.weight, theirs.bias, theirs.optimizer, peer_mean=means[1], **options
        )
        for name in ("y", "sumsq", "goodness", "loss", "pos", "neg", "goodness_pos", "goodness_neg"):
            assert error(getattr(a, name), getattr(b, name), FLOOR) <= EXACT, name
        assert error(*means, FLOOR) <= EXACT
    assert_same_state(ours, theirs, EXACT, FLOOR)


specification = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(check.NORMS),
        "eps": st.sampled_from([0.0, 1e-8, 1e-4, 0.5]),
        "eps_mode": st.sampled_from(check.EPS_MODES),
        "activation": st.sampled_from(check.ACTIVATIONS),
        "outputs": st.sampled_from(check.OUTPUTS),
    }
)
objectives = st.builds(
    ff.Objective,
    goodness=st.sampled_from(GOODNESS),
    threshold=st.one_of(
        st.floats(-3, 30),
        st.tuples(st.floats(-3, 30), st.floats(-3, 30)),
        st.floats(-3, 30).map(lambda v: torch.tensor(v, dtype=torch.float64)),
    ),
    loss=st.sampled_from(list(LOSSES)),
    maximize=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    alpha=st.floats(0.1, 8),
)
# A mean over one unit, or a pull stronger than the loss, leaves rounding to decide.
peers = st.builds(
    ff.PeerNormalisation,
    form=st.sampled_from(FORMS),
    strength=st.floats(0, 1),
    momentum=st.floats(0, 0.99),
    gated=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    options=specification,
    objective=objectives,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    shape=st.tuples(*[st.integers(1, 9)] * 2),
    rows=st.tuples(*[st.integers(0, 9)] * 2),
    bias=st.booleans(),
    weighted=st.booleans(),
    mixed=st.booleans(),
    blocked=st.booleans(),
    peer=st.none() | peers,
    seed=st.integers(0, 2**20),
)
def test_agrees_with_the_definition(
    data, options, objective, optimizer, shape, rows, bias, weighted, mixed, blocked, peer, seed
):
    torch.manual_seed(seed)
    n_pos, n_neg = (rows[0], rows[0]) if objective.paired else rows
    n = n_pos + n_neg
    if not objective.paired:
        objective = replace(objective, temperature=data.draw(st.floats(0.1, 10)))
        if data.draw(st.booleans()):
            objective = replace(objective, threshold=torch.rand(n, dtype=torch.float64) * 4)
    ours = problem(n_pos, n_neg, *shape, optimizer=optimizer, bias=bias)
    ours.x_pos[: n_pos // 4] = 0
    options = {**options, "objective": objective, "peer": peer if shape[1] > 1 else None}
    if weighted:
        options["sample_weight"] = torch.rand(n // 2 if objective.paired else n, dtype=torch.float64)
    if mixed:
        order = torch.randperm(n)
        ours = ours._replace(x_pos=torch.cat([ours.x_pos, ours.x_neg])[order])
        options["is_positive"] = (torch.arange(n) < n_pos)[order]
    with pytest.MonkeyPatch.context() as patch:
        if blocked:
            patch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 8)
            patch.setattr(eager_step, "MIN_BLOCK_ROWS", 3)
            patch.setattr(eager_step, "BLOCK_ELEMENTS", 8)
        compare(ours, ours.copy(), x_neg_is_there=not mixed, **options)


LAYOUTS = {
    "strided": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "offset": lambda x: torch.cat([torch.full_like(x[:1], torch.nan), x])[1:],
    "columns of a wider tensor": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocked", [False, True])
def test_input_layouts(layout, blocked, monkeypatch):
    if blocked:
        monkeypatch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 8)
        monkeypatch.setattr(eager_step, "MIN_BLOCK_ROWS", 4)
        monkeypatch.setattr(eager_step, "BLOCK_ELEMENTS", 8)
    made = problem(n_pos=9, n_neg=5)
    ours = made._replace(x_pos=LAYOUTS[layout](made.x_pos), x_neg=LAYOUTS[layout](made.x_neg))
    theirs = made.copy()._replace(x_pos=ours.x_pos.clone(), x_neg=ours.x_neg.clone())
    for _ in range(2):
        a = ff.linear_step_(ours.x_pos, ours.x_neg, ours.weight, ours.bias, ours.optimizer)
        b = reference.linear_step_(
            theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer, objective=ff.Objective()
        )
        assert error(a.y, b.y) <= EXACT
    assert_same_state(ours, theirs, EXACT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_transposed_weight(optimizer):
    made = problem(optimizer=optimizer)
    weight = torch.nn.Parameter(made.weight.detach().t().contiguous().t())
    ours = made._replace(weight=weight, optimizer=OPTIMIZERS[optimizer]([weight, made.bias]))
    theirs = made.copy()
    assert not weight.is_contiguous()
    compare(ours, theirs, objective=ff.Objective())


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam"])
def test_gradient_in_panels(optimizer, monkeypatch):
    from ffkernels.backends.eager import gradient

    monkeypatch.setattr(gradient, "PANEL_ELEMENTS", 15)
    ours = problem(optimizer=optimizer)
    compare(ours, ours.copy(), objective=ff.Objective())


def test_rows_with_zero_coefficient_are_left_out_exactly(monkeypatch):
    """With a saturated loss the update's product runs over the other rows only, and the numbers stay."""
    from ffkernels.backends.eager.gradient import Gradient

    seen = []
    add = Gradient.add

    def spy(self, *args):
        add(self, *args)
        seen.append(len(self.pending[1]))

    monkeypatch.setattr(Gradient, "add", spy)
    ours = problem(n_pos=40, n_neg=40, in_features=20, out_features=30)
    ours.weight.data *= 20
    objective = ff.Objective(
        goodness="sum", threshold=float(ff.linear_forward(ours.x_pos, ours.weight)[1].detach().median())
    )
    compare(ours, ours.copy(), steps=1, objective=objective)
    assert 0 < seen[0] < 60


def test_neighbouring_sides_are_not_copied():
    """Two halves of one tensor are worked on where they lie."""
    from ffkernels.backends.eager.batch import joined

    joint = torch.randn(7, 3)
    assert joined([joint[:4], joint[4:]]).data_ptr() == joint.data_ptr()
    apart = joined([joint[:4], joint[4:].clone()])
    assert apart.data_ptr() != joint.data_ptr() and torch.equal(apart, joint)
    assert torch.equal(joined([joint[:4], joint[1:4]]), torch.cat([joint[:4], joint[1:4]]))


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("columns", [slice(0, 4), slice(17, 20), slice(36, 40), slice(0, 0), slice(0, 40)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("saturated", [False, True])
def test_sides_that_differ_in_a_label_field(rows, columns, activation, blocked, saturated, monkeypatch):
    """Copies share their products where they differ in few columns; the numbers are those of the definition."""
    if blocked:
        monkeypatch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 8)
        monkeypatch.setattr(eager_step, "MIN_BLOCK_ROWS", 7)
        monkeypatch.setattr(eager_step, "BLOCK_ELEMENTS", 8)
    ours = problem(rows, rows, 40, 12, optimizer="adam")
    ours.x_neg.copy_(ours.x_pos)
    ours.x_neg[:, columns] = torch.randn(rows, columns.stop - columns.start, dtype=torch.float64)
    objective = ff.Objective()
    if saturated:
        ours.weight.data *= 40
        threshold = float(ff.linear_forward(ours.x_pos, ours.weight, activation=activation)[1].detach().median())
        objective = ff.Objective(goodness="sum", threshold=threshold, temperature=0.1)
    for outputs in ("post", "none"):
        compare(ours, ours.copy(), objective=objective, activation=activation, outputs=outputs)


def test_copies_are_told_from_strangers():
    from ffkernels.backends.eager.batch import label_field

    x = torch.rand(30, 64)
    marked = ff.overlay_label(x, torch.arange(30) % 5, 5)
    other = ff.overlay_label(x, (torch.arange(30) + 1) % 5, 5)
    assert label_field(marked, other) == slice(0, 5)
    assert label_field(marked, other.flip(0)) is None
    assert label_field(marked, marked.clone()) == slice(0, 0)
    stranger = other.clone()
    stranger[29, 63] += 1
    assert label_field(marked, stranger) is None
    unknown = marked.clone()
    unknown[3, 40] = torch.nan
    assert label_field(unknown, unknown.clone()) == slice(40, 41), "NaN equals nothing"
    assert label_field(marked, other[:20]) is None


def test_no_optimizer_fills_the_gradient_only():
    ours, theirs = problem(), None
    theirs = ours.copy()
    before = ours.weight.detach().clone()
    ff.linear_step_(ours.x_pos, ours.x_neg, ours.weight, ours.bias, None)
    reference.linear_step_(
        theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer, objective=ff.Objective()
    )
    assert torch.equal(ours.weight, before)
    assert error(ours.weight.grad, theirs.weight.grad) <= EXACT
    assert error(ours.bias.grad, theirs.bias.grad) <= EXACT


def test_known_sums_of_squares_of_the_input_change_nothing():
    ours = problem()
    theirs = ours.copy()
    sumsq = torch.cat([ours.x_pos, ours.x_neg]).square().sum(1)
    a = ff.linear_step_(ours.x_pos, ours.x_neg, ours.weight, ours.bias, ours.optimizer, input_sumsq=sumsq)
    b = ff.linear_step_(theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer)
    assert error(a.y, b.y) <= 1e-14
    assert_same_state(ours, theirs, 1e-14)


def test_threshold_tensor_is_read_at_every_step():
    threshold = torch.tensor(1.0, dtype=torch.float64)
    ours = problem()
    theirs = ours.copy()
    for value in (1.0, 3.0):
        threshold.fill_(value)
        a = ff.linear_step_(
            ours.x_pos,
            ours.x_neg,
            ours.weight,
            ours.bias,
            ours.optimizer,
            objective=ff.Objective(threshold=threshold),
        )
        b = reference.linear_step_(
            theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer,
            objective=ff.Objective(threshold=value),
        )  # fmt: skip
        assert error(a.loss, b.loss) <= EXACT
    assert_same_state(ours, theirs, EXACT)
