"""Class goodness without negative data: class groups against the definition, by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends import select
from ffkernels.objectives import CLASS_GOODNESS, CLASS_LOSSES

from .steps import OPTIMIZERS, Problem, assert_same_state, error, problem

NATIVE = select.load("native").library.load().library is not None
BACKENDS = ["eager", *(["native"] if NATIVE else [])]
NORMS = [("l2", "add"), ("rms", "add"), ("none", "add"), ("l2", "clamp")]


def case(
    rows: int, units: int, classes: int, optimizer: str = "adam", dtype: torch.dtype = torch.float64
) -> tuple[Problem, torch.Tensor]:
    """A layer with activities of either sign in the region where losses curve, and labels."""
    p = problem(rows, 0, 5, units, optimizer=optimizer, dtype=dtype)
    return p, torch.randint(classes, (rows,))


@st.composite
def steps(draw):
    classes = draw(st.integers(1, 7))
    loss = draw(st.sampled_from(CLASS_LOSSES))
    objective = ff.Objective(
        loss=loss,
        classes=classes,
        goodness=draw(st.sampled_from(CLASS_GOODNESS)),
        threshold=draw(st.sampled_from([0.5, -1.0, 2.0])),
        maximize=draw(st.booleans()),
        reduction=draw(st.sampled_from(["mean", "sum_of_means"])),
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])) if loss == "cross_entropy" else 0.0,
    )
    norm, eps_mode = draw(st.sampled_from(NORMS))
    options = {
        "norm": norm,
        "eps_mode": eps_mode,
        "activation": draw(st.sampled_from(list(reference.ACTIVATIONS))),
        "outputs": draw(st.sampled_from(["post", "pre"])),
    }
    return {
        "objective": objective,
        "options": options,
        "rows": draw(st.integers(1, 9)),
        "units": draw(st.integers(classes, 3 * classes + 2)),
        "optimizer": draw(st.sampled_from(list(OPTIMIZERS))),
        "weighted": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(steps())
@settings(max_examples=150, deadline=None)
def test_a_step_is_that_of_autograd(drawn):
    check(drawn, "eager", torch.float64, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=steps())
@settings(max_examples=40, deadline=None)
def test_a_step_in_float32(backend, drawn):
    check(drawn, backend, torch.float32, 2e-5)


def check(drawn: dict, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """One step and its result, against the definition in float64."""
    torch.manual_seed(drawn["seed"])
    objective, options = drawn["objective"], drawn["options"]
    theirs, labels = case(drawn["rows"], drawn["units"], objective.classes, drawn["optimizer"])
    ours = theirs.copy(dtype)
    weights = torch.rand(drawn["rows"], dtype=torch.float64) + 0.5 if drawn["weighted"] else None
    expected = reference.linear_step_(
        theirs.x_pos, None, theirs.weight, theirs.bias, theirs.optimizer,
        objective=objective, labels=labels, sample_weight=weights, **options,
    )  # fmt: skip
    result = ff.linear_step_(
        ours.x_pos, None, ours.weight, ours.bias, ours.optimizer, objective=objective, labels=labels, backend=backend,
        sample_weight=None if weights is None else weights.to(dtype), **options,
    )  # fmt: skip
    for name in ("y", "sumsq", "goodness", "loss"):
        assert error(getattr(result, name), getattr(expected, name), floor=1.0) <= tolerance, name
    if dtype == torch.float64:
        assert_same_state(ours, theirs, tolerance, floor=1.0)
    else:
        assert error(ours.weight, theirs.weight, floor=1.0) <= tolerance
        assert error(ours.bias, theirs.bias, floor=1.0) <= tolerance


def test_groups_are_consecutive_and_the_larger_ones_first():
    layer = ff.FFLinear(
        3, 7, bias=False, norm="none", activation="identity", dtype=torch.float64,
        objective=ff.Objective(loss="cross_entropy", classes=3, goodness="sum"),
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 8)[:, None].expand(7, 3))
    x = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    assert layer.goodness(x).tolist() == [[1 + 4 + 9, 16 + 25, 36 + 49]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_rows_are_left_out(backend):
    """A row whose own class has won by far has slopes of exactly zero, and may hold anything that is finite."""
    torch.manual_seed(0)
    objective = ff.Objective(loss="cross_entropy", classes=2, goodness="sum")
    p, _ = case(6, 4, 2, "sgd", torch.float32)
    with torch.no_grad():
        p.weight.abs_()
        p.weight[:2] *= 30
    labels = torch.zeros(6, dtype=torch.int64)
    before = p.weight.detach().clone()
    x = p.x_pos.abs()
    options = {"objective": objective, "backend": backend, "norm": "none", "activation": "relu"}
    result = ff.linear_step_(x, None, p.weight, p.bias, p.optimizer, labels=labels, **options)
    assert float(result.loss) == 0
    assert torch.equal(p.weight, before)


def test_rows_below_skip_below_are_left_out():
    torch.manual_seed(1)
    objective = ff.Objective(loss="cross_entropy", classes=3)
    p, labels = case(40, 9, 3, "sgd")
    goodness = ff.linear_step_(p.x_pos, None, p.weight, p.bias, None, objective=objective, labels=labels).goodness
    gone = (goodness.softmax(1) - torch.nn.functional.one_hot(labels, 3)).abs().amax(1) < 0.6
    assert 5 < int(gone.sum()) < 35
    skipped, weighted = p.copy(), p.copy()
    ff.linear_step_(
        p.x_pos, None, skipped.weight, skipped.bias, skipped.optimizer,
        objective=objective, labels=labels, skip_below=0.6,
    )  # fmt: skip
    ff.linear_step_(
        p.x_pos, None, weighted.weight, weighted.bias, weighted.optimizer,
        objective=objective, labels=labels, sample_weight=(~gone).double(),
    )  # fmt: skip
    assert_same_state(skipped, weighted, 1e-14)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_off_goodness_stays_finite(loss, backend):
    """Where the naive exponential of a goodness overflows."""
    objective = ff.Objective(loss=loss, classes=2, goodness="sum")
    p, labels = case(8, 4, 2, "sgd", torch.float32)
    with torch.no_grad():
        p.weight.mul_(1e4)
    result = ff.linear_step_(
        p.x_pos, None, p.weight, p.bias, p.optimizer, objective=objective, labels=labels, norm="none", backend=backend
    )
    assert bool(result.loss.isfinite())
    assert bool(p.weight.isfinite().all())


def network(objective: ff.Objective, **options) -> ff.FFNetwork:
    torch.manual_seed(0)
    make = {"objective": objective, "outputs": "pre", "dtype": torch.float64, **options}
    return ff.FFNetwork([ff.FFLinear(8, 12, **make), ff.FFLinear(12, 10, **make)])


def test_a_network_steps_and_predicts_in_one_pass():
    net = network(ff.Objective(loss="cross_entropy", classes=4))
    x = torch.randn(64, 8, dtype=torch.float64)
    labels = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        results = net.step(x, None, optimizer, labels=labels)
    assert [tuple(result.goodness.shape) for result in results] == [(64, 4), (64, 4)]
    goodness = net.goodness(x)
    assert goodness.shape == (64, 2, 4)
    assert torch.equal(net.predict(x), goodness.sum(1).argmax(1))
    assert torch.equal(net.predict(x, layers=[1]), goodness[:, 1].argmax(1))
    assert float((net.predict(x) == labels).double().mean()) > 0.95
    assert torch.equal(net.predict(x[:0]), torch.zeros(0, dtype=torch.int64))
    torch.testing.assert_close(net.layers[0].goodness(x), goodness[:, 0])
    assert net.features(x).shape == (64, 10)


def test_the_smallest_goodness_predicts_where_it_is_minimised():
    net = network(ff.Objective(loss="cross_entropy", classes=4, maximize=False))
    x = torch.randn(9, 8, dtype=torch.float64)
    assert torch.equal(net.predict(x), net.goodness(x).sum(1).argmin(1))


def test_a_network_whose_layers_hooks_watch_takes_the_same_step():
    objective = ff.Objective(loss="pvn", classes=4, threshold=0.3)
    x, labels = torch.randn(16, 8, dtype=torch.float64), torch.randint(4, (16,))
    found = []
    for watched in (False, True):
        net = network(objective)
        if watched:
            net.layers[0].register_forward_hook(lambda module, given, y: None)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        losses = [result.loss for result in net.step(x, None, optimizer, labels=labels)]
        found.append([*losses, *(p.detach() for p in net.parameters())])
    for plain, seen in zip(*found, strict=True):
        torch.testing.assert_close(plain, seen, rtol=1e-12, atol=1e-12)


def test_layer_by_layer_training_takes_labels():
    net = network(ff.Objective(loss="cross_entropy", classes=4))
    x, labels = torch.randn(32, 8, dtype=torch.float64), torch.randint(4, (32,))
    losses = net.train_layerwise(x, None, torch.optim.Adam(net.parameters(), lr=0.01), 20, labels=labels)
    assert all(float(loss[-1]) < float(loss[0]) for loss in losses)


def test_the_loss_alone_has_the_gradient_of_autograd():
    for loss in CLASS_LOSSES:
        objective = ff.Objective(loss=loss, classes=5, temperature=0.7)
        goodness, labels = torch.randn(11, 5, dtype=torch.float64), torch.randint(5, (11,))
        found = []
        for of in (
            lambda g, objective=objective, labels=labels: ff.goodness_loss(g, None, objective, labels=labels),
            lambda g, objective=objective, labels=labels: reference.class_loss_of(g, labels, objective, None),
        ):
            leaf = goodness.clone().requires_grad_()
            value = of(leaf)
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("goodness", CLASS_GOODNESS)
def test_a_loss_of_ones_own_reads_the_goodness_of_classes(goodness, backend):
    """The package's cross-entropy, written by hand."""
    dtype = torch.float32 if backend == "native" else torch.float64
    known = ff.Objective(loss="cross_entropy", classes=3, goodness=goodness)
    own = ff.GivenLoss(torch.nn.functional.cross_entropy, goodness=goodness, classes=3)
    p, labels = case(9, 7, 3, "adam", dtype)
    same = p.copy()
    options = {"labels": labels, "backend": backend}
    a = ff.linear_step_(p.x_pos, None, p.weight, p.bias, p.optimizer, objective=known, **options)
    b = ff.linear_step_(same.x_pos, None, same.weight, same.bias, same.optimizer, objective=own, **options)
    torch.testing.assert_close(a.goodness, b.goodness)
    assert_same_state(p, same, 1e-12 if dtype == torch.float64 else 1e-5, floor=1.0)


def test_compiled_code_takes_the_same_step():
    objective = ff.Objective(loss="cross_entropy", classes=3)
    p, labels = case(9, 7, 3, "sgd-momentum")
    same = p.copy()

    def step(q: Problem) -> torch.Tensor:
        return ff.linear_step_(
            q.x_pos, None, q.weight, q.bias, q.optimizer, objective=objective, labels=labels
        ).goodness

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(p), step(same))
    assert_same_state(p, same, 1e-12)


def test_a_label_that_nobody_could_check_makes_the_loss_nan_and_nothing_else():
    """As on a device, where looking at the labels would wait for it."""
    objective = ff.Objective(loss="cross_entropy", classes=3)
    p, labels = case(9, 7, 3, "sgd")
    without = p.copy()
    labels[4] = 7

    def step(q: Problem, **options) -> torch.Tensor:
        return ff.linear_step_(q.x_pos, None, q.weight, q.bias, q.optimizer, objective=objective, **options).loss

    assert bool(torch.compile(step, fullgraph=True)(p, labels=labels).isnan())
    weights = torch.ones(9, dtype=torch.float64)
    weights[4] = 0
    step(without, labels=labels.clamp(max=2), sample_weight=weights)
    assert_same_state(p, without, 1e-12)


WRONG = [
    ({"labels": None}, "labels=None came with an objective of 3 classes"),
    ({"labels": torch.tensor([0, 1, 3, 0])}, "labels hold 3; accepted: 0..2"),
    ({"labels": torch.tensor([0, -1, 2, 0])}, "labels hold -1; accepted: 0..2"),
    ({"labels": torch.tensor([0, 1])}, r"labels has shape \(2,\); accepted: \(4,\)"),
    ({"labels": torch.tensor([0, 1, 2, 0], dtype=torch.int32)}, "labels is torch.int32; accepted: torch.int64"),
    ({"labels": [0, 1, 2, 0]}, "labels is a list"),
    ({"x_neg": torch.ones(4, 5)}, "x_neg came with an objective of classes"),
    ({"is_positive": torch.ones(4, dtype=torch.bool)}, "is_positive came with an objective of classes"),
    ({"label_field": 2}, "label_field came with an objective of classes"),
    ({"objective": ff.Objective()}, "labels came with an objective without classes"),
    ({"objective": ff.Objective(loss="cwc", classes=8)}, "classes=8 came to a layer of 7 units; accepted: 1..7"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_is_named_before_anything_is_written(change, message):
    objective = ff.Objective(loss="cross_entropy", classes=3)
    p = problem(4, 0, dtype=torch.float32)
    given = {"x_neg": None, "objective": objective, "labels": torch.tensor([0, 1, 2, 0]), **change}
    before = p.copy()
    with pytest.raises((ValueError, TypeError), match=message):
        ff.linear_step_(p.x_pos, given.pop("x_neg"), p.weight, p.bias, p.optimizer, **given)
    assert_same_state(p, before, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "cross_entropy"}, "loss='cross_entropy' came without classes"),
        ({"loss": "logistic", "classes": 3}, "loss='logistic' is not one of 'cross_entropy', 'pvn', 'cwc'"),
        ({"loss": "cwc", "classes": 0}, "classes=0 is not None or an integer >= 1"),
        ({"loss": "cwc", "classes": True}, "classes=True is not None or an integer >= 1"),
        ({"loss": "cwc", "classes": 3, "goodness": "norm"}, "goodness='norm' is not one of"),
        ({"goodness": "activity"}, "goodness='activity' is not one of"),
        ({"loss": "cwc", "classes": 3, "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning"),
        ({"loss": "cross_entropy", "classes": 3, "label_smoothing": 2}, "label_smoothing=2 is not a number in 0..1"),
        ({"loss": "pvn", "classes": 3, "threshold": (1.0, 2.0)}, r"threshold=\(1.0, 2.0\) is not a number"),
    ],
)
def test_objectives_that_make_no_sense(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ff.Objective(**options)


def test_layers_of_a_network_must_agree_on_their_classes():
    options = {"loss": "cross_entropy"}
    net = ff.FFNetwork([
        ff.FFLinear(8, 12, objective=ff.Objective(classes=4, **options)),
        ff.FFLinear(12, 12, objective=ff.Objective(classes=3, **options)),
    ])  # fmt: skip
    x, before = torch.randn(5, 8), [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"labels hold 3; accepted: 0\.\.2"):
        net.step(x, None, torch.optim.SGD(net.parameters(), lr=1.0), labels=torch.tensor([0, 1, 2, 3, 0]))
    assert all(map(torch.equal, net.parameters(), before))
    with pytest.raises(ValueError, match=r"4, 3 classes|3, 4 classes"):
        net.predict(x)
    assert net.predict(x, layers=[0]).shape == (5,)
