"""Every form of the kernels against the definition in float64.

bfloat16: Triton's interpreter multiplies bit patterns instead of numbers, so the kernels widen rounded operands to
float32 there (`common.operand`); and it rounds to bfloat16 by cutting bits off, hence the larger error allowed.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ffkernels as ff
from ffkernels import reference, spec
from ffkernels import validation as check
from ffkernels.objectives import GOODNESS, LOSSES, REDUCTIONS

from .. import test_ops, test_precision
from ..steps import OPTIMIZERS, Problem, error, problem, state_of
from ..test_step import LAYOUTS
from ..test_surface import after_a_large_gradient, after_a_large_mean

launch = pytest.importorskip("ffkernels.backends.triton.launch")
configs = pytest.importorskip("ffkernels.backends.triton.configs")
rules = pytest.importorskip("ffkernels.backends.triton.rules")

FLOOR = 0.1
MEANS = (torch.float32, torch.float32, torch.float64)
# In units of the compute dtype's rounding error, beside twice the error of plain torch in that dtype.
ROUNDINGS = {torch.float32: 8, torch.float16: 2, torch.bfloat16: 4}
FORMS = {
    "on the fly": ("on the fly", 1),
    "given": ("given", 1),
    "listed": ("listed", 1),
    "split": ("on the fly", 3),
    "given and split": ("given", 3),
    "listed and split": ("listed", 3),
}


PEERS = [
    None, *(ff.PeerNormalisation(form, 0.3, 0.8, gated) for form in ("hinton", "loewex") for gated in (False, True))
]  # fmt: skip
# How tiles come and programs take them, by configuration.
WAYS = {"pointers": {}, "bulk copies": {"TMA": 1}, "persistent": {"PERSISTENT": 2}, "both": {"TMA": 1, "PERSISTENT": 1}}


def go(way: str, patch: pytest.MonkeyPatch) -> None:
    """Makes the kernels run in one of these ways, where layouts allow it."""
    forward, update = (configs.INTERPRETED[kernel] for kernel in ("forward", "update"))
    patch.setitem(configs.FORCED, "forward", {**forward, **WAYS[way]})
    patch.setitem(configs.FORCED, "update", {**update, "TMA": WAYS[way].get("TMA", 0)})


def together(made: Problem) -> Problem:
    """The same rows, one side behind the other in memory."""
    both = torch.cat([made.x_pos, made.x_neg])
    return made._replace(x_pos=both[: len(made.x_pos)], x_neg=both[len(made.x_pos) :])


def use(form: str, patch: pytest.MonkeyPatch) -> None:
    """Makes the update run in one of its forms."""
    coefficients, splits = FORMS[form]
    patch.setattr(launch, "coefficient_form", lambda *_, **__: coefficients)
    patch.setattr(launch, "count_splits", lambda *_: splits)


def compare(made: Problem, dtype: torch.dtype, steps: int = 2, x_neg_is_there: bool = True, **options: object) -> None:
    """Steps in the kernels, by the definition in plain torch in the same dtype, and by that in float64."""
    input_sumsq, peer = options.pop("input_sumsq", False), options.get("peer")
    means = [None] * 3 if peer is None else [torch.full((len(made.weight),), 0.5, dtype=t) for t in MEANS]
    ours, torchs, exact = made.copy(), made.copy(), made.copy(torch.float64)
    ours = ours._replace(x_pos=made.x_pos, x_neg=made.x_neg)
    for _ in range(steps):
        x = [ours.x_pos, ours.x_neg if x_neg_is_there else None]
        known = torch.cat([v for v in x if v is not None]).square().sum(1) if input_sumsq else None
        a = ff.linear_step_(
            *x, ours.weight, ours.bias, ours.optimizer, compute_dtype=dtype, input_sumsq=known, peer_mean=means[0],
            **options,
        )  # fmt: skip
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            b = by_definition(torchs, x_neg_is_there, peer_mean=means[1], **options)
        c = by_definition(exact, x_neg_is_there, peer_mean=means[2], **options)
        for name in ("y", "sumsq", "goodness", "loss"):
            size = _logit_size(c.goodness, options["objective"])
            assert_close(getattr(a, name), getattr(b, name), getattr(c, name), dtype, name, size)
    ours_state, torchs_state, exact_state = state_of(ours), state_of(torchs), state_of(exact)
    assert ours_state.keys() == exact_state.keys()
    if peer is not None:
        assert_close(*means, dtype, "peer_mean")
    for name, value in exact_state.items():
        assert_close(ours_state[name], torchs_state[name], value, dtype, name, size)


def by_definition(p: Problem, x_neg_is_there: bool, **options: object) -> ff.StepResult:
    objective = options["objective"]
    as_weight = {"sample_weight": None, **options}
    if as_weight["sample_weight"] is not None:
        as_weight["sample_weight"] = as_weight["sample_weight"].to(p.weight.dtype)
    if isinstance(objective.threshold, torch.Tensor):
        as_weight["objective"] = replace(objective, threshold=objective.threshold.to(p.weight.dtype))
    x_neg = p.x_neg if x_neg_is_there else None
    return reference.linear_step_(p.x_pos, x_neg, p.weight, p.bias, p.optimizer, **as_weight)


def _logit_size(goodness: torch.Tensor, objective: ff.Objective) -> float:
    """How large the numbers are whose difference a loss is a function of."""
    factor = objective.alpha if objective.paired else 1 / objective.temperature
    return factor * float(goodness.detach().abs().amax()) if goodness.numel() else 0.0


def assert_close(ours, torchs, exact, dtype: torch.dtype, name: str, size: float = 0.0) -> None:
    """`size`: of the numbers whose difference decides the loss; an exponential of it decides the update."""
    relative = max(1.0, size / max(float(exact.detach().norm()), FLOOR) if name == "loss" else size)
    budget = 2 * error(torchs, exact, FLOOR) + relative * ROUNDINGS[dtype] * torch.finfo(dtype).eps
    assert error(ours, exact, FLOOR) <= budget, (name, error(ours, exact, FLOOR), budget)


layers = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(check.NORMS),
        "eps": st.sampled_from([0.0, 1e-8, 1e-4, 0.5]),
        "eps_mode": st.sampled_from(check.EPS_MODES),
        "activation": st.sampled_from(check.ACTIVATIONS),
        "outputs": st.sampled_from(check.OUTPUTS),
        "input_sumsq": st.booleans(),
    }
)
# Numbers that float32 has: the interpreter takes others for float64.
thresholds = st.floats(0, 5, width=32, allow_subnormal=False)
objectives = st.builds(
    ff.Objective,
    goodness=st.sampled_from(GOODNESS),
    threshold=st.one_of(thresholds, st.tuples(thresholds, thresholds), thresholds.map(lambda v: torch.tensor(v))),
    loss=st.sampled_from(list(LOSSES)),
    maximize=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    alpha=st.floats(0.1, 4),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    options=layers,
    objective=objectives,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    shape=st.tuples(*[st.sampled_from([1, 3, 16, 17, 20])] * 2),
    rows=st.tuples(*[st.sampled_from([0, 1, 5, 16, 19])] * 2),
    bias=st.booleans(),
    weighted=st.booleans(),
    mixed=st.booleans(),
    form=st.sampled_from(list(FORMS)),
    way=st.sampled_from(list(WAYS)),
    peer=st.sampled_from(PEERS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_agrees_with_the_definition(
    data, options, objective, optimizer, shape, rows, bias, weighted, mixed, form, way, peer, dtype, seed
):
    torch.manual_seed(seed)
    n_pos, n_neg = (rows[0], rows[0]) if objective.paired else rows
    n = n_pos + n_neg
    if not objective.paired:
        objective = replace(objective, temperature=data.draw(st.floats(0.5, 4)))
        if data.draw(st.booleans()):
            objective = replace(objective, threshold=torch.rand(n) * 4)
    made = problem(n_pos, n_neg, *shape, optimizer=optimizer, bias=bias, dtype=torch.float32)
    if options["norm"] == "none":
        made.weight.data /= shape[0] ** 0.5
    made.x_pos[: n_pos // 4] = 0
    made = together(made)
    options = {**options, "objective": objective, "peer": peer}
    if weighted:
        options["sample_weight"] = torch.rand(n // 2 if objective.paired else n)
    if mixed:
        order = torch.randperm(n)
        made = made._replace(x_pos=torch.cat([made.x_pos, made.x_neg])[order])
        options["is_positive"] = (torch.arange(n) < n_pos)[order]
    with pytest.MonkeyPatch.context() as patch:
        # Rows at rest are pulled too where the pull is gated.
        use(form.replace("listed", "given") if peer is not None and peer.gated else form, patch)
        go(way, patch)
        compare(made, dtype, x_neg_is_there=not mixed, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [(torch.float32, "sgd-nesterov"), (torch.float16, "rmsprop"), (torch.bfloat16, "adamw")],
    ids=str,
)
def test_forms(form, dtype, optimizer, monkeypatch):
    """Several tiles each way, none of them full."""
    use(form, monkeypatch)
    made = problem(35, 18, 18, 37, optimizer=optimizer, dtype=torch.float32)
    compare(made, dtype, steps=1, objective=ff.Objective())


@pytest.mark.parametrize(
    ("form", "dtype"), [("given", torch.float16), ("on the fly", torch.float32), ("given and split", torch.float32)]
)
@pytest.mark.parametrize("way", WAYS)
def test_ways(way, form, dtype, monkeypatch):
    """Tiles by bulk copies where layouts allow them, and programs that take several tiles."""
    use(form, monkeypatch)
    go(way, monkeypatch)
    seen = []
    descriptor = launch.descriptor
    monkeypatch.setattr(launch, "descriptor", lambda *a: seen.append(descriptor(*a)) or seen[-1])
    made = together(problem(35, 18, 24, 40, optimizer="adam", dtype=torch.float32))
    compare(made, dtype, steps=1, objective=ff.Objective(), norm="rms", outputs="pre")
    assert len(seen) == (4 if "TMA" in WAYS[way] else 0) and None not in seen
    made = together(problem(35, 18, 23, 41, optimizer="adam", dtype=torch.float32))
    compare(made, dtype, steps=1, objective=ff.Objective())
    assert all(found is None for found in seen[4:])


@pytest.mark.parametrize(
    ("activation", "peer"),
    [*(("relu", peer) for peer in PEERS[1:]), *((name, PEERS[2]) for name in check.ACTIVATIONS if name != "relu")],
    ids=str,
)
def test_peer_normalisation(activation, peer, monkeypatch):
    """Many more rows and units than one program of any kernel takes at a time."""
    use("given and split", monkeypatch)
    monkeypatch.setattr(launch, "INPUT_SPLITS", 3)
    made = problem(40, 23, 18, 37, optimizer="sgd-momentum", dtype=torch.float32)
    objective = ff.Objective(goodness="sum", threshold=37.0)
    compare(made, torch.float32, steps=1, objective=objective, norm="rms", activation=activation, peer=peer)


@pytest.mark.parametrize("form", ["on the fly", "given", "listed", "listed and split"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_below_a_slope_are_left_out(form, loss, monkeypatch):
    use(form, monkeypatch)
    made = problem(30, 30, 18, 37, optimizer="adam", dtype=torch.float32)
    soft = {"threshold": 333.0, "temperature": 60.0} if loss == "logistic" else {"alpha": 0.1}
    objective = ff.Objective(goodness="sum", loss=loss, **soft)
    states = []
    for skip_below, backend in ((0.3, "triton"), (0.3, "eager"), (0.0, "eager")):
        p = made.copy()
        ff.linear_step_(
            p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, skip_below=skip_below,
            norm="rms", backend=backend,
        )  # fmt: skip
        states.append(p.weight.detach())
    assert error(states[0], states[1]) < 1e-5 < error(states[1], states[2])


@pytest.mark.parametrize("norm", check.NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_shared_product(dtype, norm):
    """A product that is not the one that belongs there shows that it is used, on both sides."""
    field = 5
    made = problem(19, 19, 20, 18, optimizer="sgd", dtype=torch.float32)
    made.x_neg[:, field:] = made.x_pos[:, field:]
    for wrong in (0.0, 1.0):
        results = []
        for backend in ("triton", "eager"):
            p = made.copy()
            product = ff.shared_product(p.x_pos, p.weight, field, compute_dtype=dtype) + wrong
            step = ff.linear_step_(
                p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, compute_dtype=dtype, norm=norm, outputs="pre",
                label_field=field, product=product, backend=backend,
            )  # fmt: skip
            with torch.no_grad():
                again, _ = ff.linear_forward(
                    p.x_neg, p.weight, p.bias, compute_dtype=dtype, norm=norm, label_field=field, product=product,
                    backend=backend,
                )  # fmt: skip
            results.append([step.y, step.sumsq, step.loss, p.weight.detach(), again])
        for mine, theirs in zip(*results, strict=True):
            assert error(mine, theirs) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("large", [1e8, float("inf"), float("nan")])
def test_a_shared_product_beside_a_large_label(large):
    """It is a sum without the label field: what a row's label holds does not reach its copy."""
    field, eps = 5, torch.finfo(torch.float32).eps
    made = problem(19, 19, 20, 18, optimizer="sgd", dtype=torch.float32)
    made.x_neg[:, field:] = made.x_pos[:, field:]
    made.x_pos[:, 2] = large
    exact = made.x_neg.double() @ made.weight.detach().double().T
    room = 20 * eps * (made.x_neg.abs().double() @ made.weight.detach().abs().double().T)
    product = ff.shared_product(made.x_pos, made.weight, field)
    step = ff.linear_step_(
        made.x_pos, made.x_neg, made.weight, None, None, norm="none", activation="identity", outputs="pre",
        label_field=field, product=product,
    )  # fmt: skip
    assert step.neg is not None and ((step.neg - exact).abs() <= room).all()
    sums = step.sides(step.sumsq)[1]
    assert ((sums - exact.square().sum(1)).abs() <= ((2 * exact.abs() + room) * room).sum(1) + 20 * eps * sums).all()


@pytest.mark.parametrize("form", ["on the fly", "split"])
@pytest.mark.parametrize("optimizer", ["sgd-nesterov", "adamw", "rmsprop"])
def test_the_rounded_weight_feeds_the_second_forward(form, optimizer, monkeypatch):
    use(form, monkeypatch)
    given = []
    forward = launch.forward
    monkeypatch.setattr(
        launch, "forward", lambda rows, layer, *a, **o: given.append(layer) or forward(rows, layer, *a, **o)
    )
    p = problem(9, 4, 17, 19, optimizer=optimizer, dtype=torch.float32)
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, compute_dtype=torch.float16)
    expected = p.weight.half()
    second = torch.float32 if optimizer == "rmsprop" else torch.float16
    assert [layer.weight.dtype for layer in given] == [torch.float32, second]
    assert torch.equal(given[1].weight.half(), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("outputs", ["pre", "none"])
def test_what_the_forward_keeps(activation, outputs):
    compare(
        problem(9, 20, 17, 18, dtype=torch.float32), torch.float16,
        activation=activation, outputs=outputs, objective=ff.Objective(),
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("goodness", GOODNESS)
def test_coefficients(loss, goodness):
    """The list holds the rows whose coefficient is not exactly zero, in order, and nothing is written beyond it."""
    rows, width, blocks = 50, 40, 3
    objective = ff.Objective(goodness, threshold=20.0, loss=loss, alpha=8.0, temperature=1.0)
    partials = torch.rand(blocks, rows) * torch.logspace(-3, 3, rows)[torch.randperm(rows)]
    sumsq, total = torch.empty(rows), torch.empty(())
    index, coefficient = torch.full((rows,), -1, dtype=torch.int32), torch.empty(rows)
    count = torch.empty((), dtype=torch.int32)
    share = 1.0 / (rows // 2 if objective.paired else rows)
    scale = 8.0 if objective.paired else 1.0
    launch.coefficient_kernel[(1,)](
        rows=launch.batch(spec.Rows(torch.empty(rows // 2, 1), torch.empty(rows // 2, 1))),
        terms=launch.Terms(partials, blocks, None, None, None, 20.0, 20.0, scale, share, share, 0.0),
        width=width,
        written=launch.Written(sumsq, total),
        made=launch.Coefficients(coefficient, index, count),
        GOODNESS=goodness, LOSS=loss, THRESHOLD_PER_ROW=False, PARTIALS=4, BLOCK=16,
    )  # fmt: skip
    is_positive = torch.arange(rows) < rows // 2
    exact = objective.terms(partials.double().sum(0), width, is_positive, (rows // 2, rows // 2))
    listed = index[: int(count)].long()
    size = exact.coefficient.abs()
    # Between float32's smallest normal number and half its smallest denormal one, devices differ.
    assert set((size > 1e-37).nonzero().squeeze(1).tolist()) <= set(listed.tolist())
    assert (size[listed] > 1e-46).all() and (listed.diff() > 0).all()
    if goodness == "sum":
        assert 0 < len(listed) < rows
    assert torch.allclose(coefficient[: len(listed)].double(), exact.coefficient[listed], rtol=2e-5, atol=1e-12)
    assert coefficient[len(listed) :].isnan().all() and (index[len(listed) :] == -1).all()
    assert error(sumsq, partials.double().sum(0)) < 1e-6
    assert error(total, exact.loss) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(layout):
    made = problem(18, 5, 17, 9, dtype=torch.float32)
    strange = made._replace(x_pos=LAYOUTS[layout](made.x_pos), x_neg=LAYOUTS[layout](made.x_neg))
    compare(strange, torch.float32, steps=1, objective=ff.Objective())


def test_sides_with_different_layouts():
    made = problem(18, 5, 17, 9, dtype=torch.float32)
    strange = made._replace(x_pos=LAYOUTS["strided"](made.x_pos))
    assert strange.x_pos.stride(1) != strange.x_neg.stride(1)
    compare(strange, torch.float32, steps=1, objective=ff.Objective())


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "rmsprop"])
@pytest.mark.parametrize("form", ["on the fly", "split"])
def test_parameters_with_gaps(optimizer, form, monkeypatch):
    """A transposed weight, a bias with every other element its own, and vectors that are expanded."""
    use(form, monkeypatch)
    made = problem(18, 5, 17, 19, optimizer=optimizer, dtype=torch.float32)
    theirs = made.copy()
    weight = torch.nn.Parameter(made.weight.detach().t().contiguous().t())
    bias = torch.nn.Parameter(made.bias.detach().repeat_interleave(2)[::2])
    ours = made._replace(weight=weight, bias=bias, optimizer=OPTIMIZERS[optimizer]([weight, bias]))
    options = {"objective": ff.Objective(), "sample_weight": torch.tensor(0.5).expand(23)}
    for _ in range(2):
        ff.linear_step_(ours.x_pos, ours.x_neg, weight, bias, ours.optimizer, **options)
        reference.linear_step_(
            theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer, **options
        )  # fmt: skip
    for name, value in state_of(theirs).items():
        assert error(state_of(ours)[name], value, FLOOR) < 2e-6, name


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "adamw"])
@pytest.mark.parametrize("form", ["on the fly", "split"])
def test_learning_rate_and_step_count_on_the_device(optimizer, form, monkeypatch):
    """What a CUDA graph replays: numbers that are read by the kernel when it runs."""
    use(form, monkeypatch)
    monkeypatch.setattr(rules, "on_host", lambda number: False)
    made = problem(18, 5, 17, 19, optimizer=optimizer, dtype=torch.float32)
    theirs = made.copy()
    rate = torch.tensor(0.1)
    for group in made.optimizer.param_groups:
        group["lr"] = rate
    for value in (0.1, 0.02):
        rate.fill_(value)
        for group in theirs.optimizer.param_groups:
            group["lr"] = value
        ff.linear_step_(made.x_pos, made.x_neg, made.weight, made.bias, made.optimizer)
        ff.linear_step_(theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer, backend="eager")
    for name, expected in state_of(theirs).items():
        assert error(state_of(made)[name], expected) < 2e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_repeats_bit_by_bit(form, monkeypatch):
    use(form, monkeypatch)
    made = problem(20, 13, 18, 21, optimizer="adam", dtype=torch.float32)
    runs = []
    for _ in range(2):
        p = made.copy()
        result = ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, compute_dtype=torch.float16)
        runs.append([result.y, result.sumsq, result.loss, *state_of(p).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forward_agrees_with_the_step():
    made = problem(20, 13, 37, 21, dtype=torch.float32)
    with torch.no_grad():  # with a gradient the sums of squares of the rows are formed, and kept, before the kernel
        y, sumsq = ff.linear_forward(torch.cat([made.x_pos, made.x_neg]), made.weight, made.bias)
    result = ff.linear_step_(made.x_pos, made.x_neg, made.weight, made.bias, made.optimizer, outputs="pre")
    assert torch.equal(result.y, y)
    assert error(result.sumsq, sumsq) < 1e-6


def test_rows_already_in_the_compute_dtype():
    test_precision.test_rounded_activities_feed_the_next_layer(torch.float16)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_weight_that_is_rounded_first(rows, monkeypatch):
    monkeypatch.setattr(launch, "ROUND_WEIGHT_ROWS", 1)
    compare(problem(rows, rows, 17, 19, dtype=torch.float32), torch.float16, objective=ff.Objective())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_huge_logits(loss, dtype):
    test_precision.test_huge_logits(dtype, loss, True)


@pytest.mark.parametrize("eps_mode", check.EPS_MODES)
@pytest.mark.parametrize(("dtype", "goodness"), [(torch.float32, "norm"), (torch.float16, "mean")], ids=str)
def test_rows_of_zeros(dtype, eps_mode, goodness):
    test_precision.test_rows_of_zeros(dtype, 3.72e-44, eps_mode, goodness)


def test_goodness_beyond_float16():
    test_precision.test_goodness_beyond_float16()


def test_tiny_coefficients_survive_float16(monkeypatch):
    """Coefficients of 1e-9 are below float16's smallest number."""
    made = problem(9, 9, 17, 19, dtype=torch.float32)
    ours, exact = made.copy(), made.copy(torch.float64)
    for p in (ours, exact):
        weights = torch.full((18,), 1e-9, dtype=p.weight.dtype)
        low = torch.float16 if p is ours else None
        backend = "triton" if p is ours else "eager"
        ff.linear_step_(
            p.x_pos, p.x_neg, p.weight, p.bias, None, sample_weight=weights, compute_dtype=low, backend=backend
        )
    assert error(ours.weight.grad, exact.weight.grad) < 2 * torch.finfo(torch.float16).eps
    assert error(ours.bias.grad, exact.bias.grad) < 2 * torch.finfo(torch.float16).eps


def test_not_a_number_shows():
    made = problem(9, 9, 17, 19, dtype=torch.float32)
    made.x_pos[3, 5] = torch.nan
    result = ff.linear_step_(made.x_pos, made.x_neg, made.weight, made.bias, made.optimizer, outputs="pre")
    assert result.y[3].isnan().all() and not result.y[[0, 1, 2, 4]].isnan().any()
    assert result.loss.isnan() and made.weight.isnan().all()


def test_known_losses_only():
    """`ff.explain` says why a call that the kernels do not know goes elsewhere."""
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot run this call: float64 runs on the eager backend"):
        ff.explain(weight)


def test_is_not_the_default_of_the_interpreter(monkeypatch):
    monkeypatch.delenv("FFKERNELS_BACKEND")
    text = ff.explain(torch.nn.Parameter(torch.zeros(3, 2)))
    assert "backend: triton" not in text and "passed over: triton: Triton's interpreter" in text


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "rmsprop"])
def test_opcheck_step(optimizer):
    arguments = test_ops.step_arguments(optimizer, True, torch.float16, ff.Objective())
    torch.library.opcheck(test_ops.STEP, (*arguments[:-1], "triton"))


def test_opcheck_forward():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = test_ops.forward_arguments(torch.float16, False)
    with torch.no_grad():
        torch.library.opcheck(test_ops.FORWARD, (*arguments[:-1], "triton"), test_utils=checks)


def test_a_network_learns():
    net = ff.FFNetwork([ff.FFLinear(12, 17), ff.FFLinear(17, 8)])
    x = torch.rand(6, 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    losses = [sum(float(r.loss) for r in net.step(x, x.flip(1), optimizer)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_tuning(monkeypatch, tmp_path):
    """Every candidate runs on scratch tensors; a clock that prefers one finds that one in the file."""
    tune = pytest.importorskip("ffkernels.backends.triton.tune")
    tile = {"forward": configs.INTERPRETED["forward"], "update": configs.INTERPRETED["update"]}
    candidates = {kernel: [{**tile[kernel], "TMA": 0, "GROUP": group} for group in (1, 2, 3)] for kernel in tile}
    monkeypatch.setattr(tune, "CANDIDATES", candidates)
    monkeypatch.setattr(tune, "SHAPES", [(20, 17, 18)])
    monkeypatch.setattr(tune, "MAPS", [])
    monkeypatch.setattr(configs, "device_names", lambda index: ("A GPU", "sm_90"))

    def timed(run, warmup, rep):
        run()
        (config,) = configs.FORCED.values()
        if config["GROUP"] == 3:
            raise RuntimeError("no such tile")
        return 2.0 - config["GROUP"]

    monkeypatch.setattr(tune, "do_bench", timed)
    configs.for_device.cache_clear()
    said = []
    path = tune.tune(tmp_path, 60, said.append, torch.device("cpu"))
    found = json.loads(path.read_text())
    assert path.name == "A_GPU.json" and found["tuned"] and found["kernels"] == tune.kernel_hash()
    for kernel in configs.LINEAR_KERNELS:
        for kind in configs.KINDS:
            best = configs.nearest(found[kernel][kind], (20, 17, 18))
            assert best == {**tile[kernel], "TMA": 0, "GROUP": 2}
    assert sum("no such tile" in line for line in said) == 6
    assert tune.tune(tmp_path, -1, said.append, torch.device("cpu")) == path
    assert said[-1].endswith("no time left")


def test_a_small_gradient_after_a_large_one():
    after_a_large_gradient("triton")


def test_a_small_mean_after_a_large_one():
    after_a_large_mean("triton")
