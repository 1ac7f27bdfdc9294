"""Label fields beside which the rest of a row is small, or not finite: each row has the numbers it would have alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends.eager import step as eager_step

from .test_native import BEST, LOADED, SETS, needs_library

K, WIDTH, OUT, ROWS = 4, 64, 37, 19
BACKENDS = ["eager", *SETS]
FIELDS = [slice(0, K), slice(21, 21 + K), slice(WIDTH - K, WIDTH)]
RATIOS = [(torch.float32, ratio) for ratio in (1.0, 1e3, 1e6, 1e8)] + [(torch.bfloat16, r) for r in (100.0, 1000.0)]
ON_EAGER_ALONE = [(torch.float64, 1e12), (torch.float16, 100.0), (torch.float16, 1000.0)]
KINDS = [
    *[(name, *kind) for name in SETS for kind in RATIOS],
    *[("eager", *kind) for kind in RATIOS + ON_EAGER_ALONE],
]
MASTERS = {torch.float64: torch.float64}
FEW = 4  # how many neighbouring float32 numbers an epilogue may be off


@pytest.fixture
def backend(request):
    """A backend by its name, or the compiled one on one of this CPU's instruction sets."""
    if request.param == "eager":
        yield request.param
        return
    assert LOADED.library.ffk_limit(request.param.encode()) == 0
    yield "native"
    LOADED.library.ffk_limit(BEST)


def rows_under_labels(copies: int, field: slice, values: list[float], rows: int = ROWS) -> Tensor:
    """`[copies, rows, WIDTH]`: the same rows, in a column of the field the k-th value the k-th time, else zeros."""
    x = torch.randn(rows, WIDTH).repeat(copies, 1, 1)
    x[:, :, field] = 0
    at = torch.randint(K, (copies, rows, 1)) + field.start
    return x.scatter_(2, at, torch.tensor(values).view(-1, 1, 1).expand(copies, rows, 1))


def master_of(dtype: torch.dtype) -> torch.dtype:
    return MASTERS.get(dtype, torch.float32)


def as_multiplied(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Operands as a product in `dtype` takes them, in float64."""
    return values.to(dtype).double()


def product_and_room(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x W^T` in float64, and how far a sum in the master dtype may be from it: `n eps sum |w| |x|`."""
    x, weight = as_multiplied(x, dtype), as_multiplied(weight, dtype)
    return x @ weight.T, WIDTH * torch.finfo(master_of(dtype)).eps * (x.abs() @ weight.abs().T)


def assert_activities(y: Tensor, sumsq: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    """Rectified activities of un-normalised rows and their sums of squares, element by element."""
    product, room = product_and_room(x, weight, dtype)
    exact = (product + bias.double()).relu()
    room = room + FEW * torch.finfo(master_of(dtype)).eps * bias.double().abs()
    squares = ((2 * exact + room) * room).sum(1) + WIDTH * torch.finfo(master_of(dtype)).eps * exact.square().sum(1)
    assert ((sumsq.double() - exact.square().sum(1)).abs() <= squares).all()
    if dtype == torch.float16:  # activities beyond its largest number are infinite
        exact = exact.to(dtype).double()
    rounding = torch.finfo(dtype).eps * exact
    close = (y.double() - exact).abs() <= room + rounding
    assert (close | (y.double() == exact)).all()


def layer(dtype: torch.dtype) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    master = master_of(dtype)
    return torch.nn.Parameter(torch.randn(OUT, WIDTH).to(master) / 8), torch.nn.Parameter(torch.randn(OUT).to(master))


def rows_for(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as a caller has them: float16 ones come rounded, since wider ones are scaled first and share nothing."""
    return x.to(dtype if dtype == torch.float16 else master_of(dtype))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_rest_of_a_row_beside_a_masked_pixel(backend):
    weight = torch.full((1, 8), 0.1)
    weight[0, 0] = 0.3
    x_pos = torch.ones(1, 8)
    x_neg = x_pos.clone()
    x_pos[0, 0], x_neg[0, 0] = 1e8, 0.0
    w = torch.nn.Parameter(weight)
    neg = ff.linear_step_(x_pos, x_neg, w, None, SGD([w], lr=0.0), outputs="pre", backend=backend).neg
    assert neg.item() == pytest.approx(0.7 / (7**0.5 + 1e-4), rel=1e-6)  # 0.26457


@pytest.mark.parametrize(("backend", "dtype", "ratio"), KINDS, ids=str, indirect=["backend"])
@pytest.mark.parametrize("field", FIELDS, ids=str)
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_activities_of_both_sides(backend, dtype, ratio, field, outputs):
    for values in ([ratio, 1.0], [1.0, ratio], [ratio, -ratio]):
        x_pos, x_neg = rows_for(rows_under_labels(2, field, values), dtype)
        weight, bias = layer(dtype)
        before = weight.detach().clone(), bias.detach().clone()
        result = ff.linear_step_(
            x_pos, x_neg, weight, bias, SGD([weight, bias], lr=1e-3 / ratio**2), norm="none", outputs=outputs,
            backend=backend, objective=ff.Objective(goodness="sum", threshold=20.0), compute_dtype=dtype,
        )  # fmt: skip
        used = before if outputs == "pre" else (weight.detach(), bias.detach())
        assert_activities(result.y, result.sumsq, torch.cat([x_pos, x_neg]), *used, dtype)


@pytest.mark.parametrize(("backend", "dtype", "ratio"), KINDS, ids=str, indirect=["backend"])
@pytest.mark.parametrize("field", FIELDS, ids=str)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_gradient(backend, dtype, ratio, field, blocks, monkeypatch):
    """Each element as near to float64 as its own terms allow, or twice as near as plain torch's."""
    if blocks:
        monkeypatch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 64)
        monkeypatch.setattr(eager_step, "BLOCK_ELEMENTS", 5 * OUT)
        monkeypatch.setattr(eager_step, "MIN_BLOCK_ROWS", 3)
    for values in ([ratio, 1.0], [1.0, ratio]):
        x_pos, x_neg = rows_for(rows_under_labels(2, field, values), dtype)
        weight, bias = layer(dtype)
        objective = ff.Objective(threshold=0.02)
        ff.linear_step_(
            x_pos, x_neg, weight, bias, None, objective=objective, outputs="none", compute_dtype=dtype, backend=backend
        )
        x, w, b = as_multiplied(torch.cat([x_pos, x_neg]), dtype), as_multiplied(weight.detach(), dtype), bias.double()
        r = 1 / (torch.cat([x_pos, x_neg]).double().norm(dim=1, keepdim=True) + 1e-4)
        y = (r * (x @ w.T) + b).relu()
        sign = torch.ones(2 * ROWS, 1, dtype=torch.float64)
        sign[:ROWS] = -1
        c = sign * torch.sigmoid(sign * (y.square().mean(1, keepdim=True) - 0.02)) * 2 / (2 * ROWS * OUT)
        # Of each term: its left operand is rounded to the compute dtype, from a sum in the master dtype.
        eps, operand = torch.finfo(master_of(dtype)).eps, torch.finfo(dtype).eps
        off = WIDTH * eps * (r * (x.abs() @ w.abs().T) + b.abs()) + (0 if operand == eps else operand) * y
        assert ((weight.grad.double() - (c * r * y).T @ x).abs() <= 2 * (c * r * off).abs().T @ x.abs()).all()
        assert ((bias.grad.double() - (c * y).sum(0)).abs() <= 2 * (c * off).abs().sum(0)).all()


@needs_library
def test_the_gradient_over_several_blocks_of_the_compiled_backend():
    x = rows_under_labels(2, FIELDS[1], [1e6, 1.0], rows=1100)
    weight = torch.nn.Parameter(torch.randn(4096, WIDTH) / 8)
    exact = torch.nn.Parameter(weight.detach().double())
    plain = torch.nn.Parameter(weight.detach().clone())
    ff.linear_step_(*x, weight, None, None, outputs="none", backend="native")
    for w in (exact, plain):
        reference.linear_step_(*x.to(w.dtype), w, None, SGD([w], lr=0.0), objective=ff.Objective(), outputs="none")
    ours, torchs = ((w.grad.double() - exact.grad).norm(dim=0) for w in (weight, plain))
    assert (ours <= 2 * torchs + 4 * torch.finfo(torch.float32).eps * exact.grad.norm(dim=0)).all()


@pytest.mark.parametrize(("backend", "dtype", "ratio"), KINDS, ids=str, indirect=["backend"])
@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_copies(backend, dtype, ratio, field):
    """A chain of labels: none is reached through another."""
    values = [ratio, 1.0, -ratio, 2.0, ratio, 0.0]
    x = rows_for(rows_under_labels(len(values), field, values), dtype).flatten(0, 1)
    weight, bias = (p.detach() for p in layer(dtype))
    y, sumsq = ff.linear_forward(x, weight, bias, norm="none", compute_dtype=dtype, copies=len(values), backend=backend)
    assert_activities(y, sumsq, x, weight, bias, dtype)


@pytest.mark.parametrize(("dtype", "ratio"), [*RATIOS, *ON_EAGER_ALONE], ids=str)
def test_a_given_product(dtype, ratio):
    field = FIELDS[0]
    x_pos, x_neg = rows_for(rows_under_labels(2, field, [ratio, 1.0]), dtype)
    weight, bias = layer(dtype)
    product = ff.shared_product(x_pos, weight, K, compute_dtype=dtype)
    options = {"norm": "none", "compute_dtype": dtype, "label_field": K, "product": product, "backend": "eager"}
    assert_activities(*ff.linear_forward(x_neg, weight, bias, **options), x_neg, weight.detach(), bias.detach(), dtype)
    result = ff.linear_step_(x_pos, x_neg, weight, bias, None, outputs="pre", **options)
    assert_activities(result.y, result.sumsq, torch.cat([x_pos, x_neg]), weight.detach(), bias.detach(), dtype)


def network(dtype: torch.dtype, **options: object) -> ff.FFNetwork:
    torch.manual_seed(5)
    return ff.FFNetwork([ff.FFLinear(a, b, dtype=dtype, **options) for a, b in pairwise([WIDTH, OUT, 11])])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_a_prediction_whose_first_label_is_far_away(backend, compute_dtype):
    """Under label 0 a number beside which the row is nothing silences every unit; the others decide on the row."""
    net, wide = (network(t, compute_dtype=c) for t, c in ((torch.float32, compute_dtype), (torch.float64, None)))
    with torch.no_grad():
        first = wide.layers[0].weight
        first[:, 0] = -1e4
        first[:, 1:K] *= 1e-4
        for mine, theirs in zip(net.parameters(), wide.parameters(), strict=True):
            theirs.copy_(theirs.to(compute_dtype or torch.float32))
            mine.copy_(theirs)
    for part in net:
        part.backend = backend
    net.layers[0].norm = wide.layers[0].norm = "none"
    x = torch.randn(100, WIDTH).bfloat16().float()
    expected = wide.predict(x.double(), K, label_value=1e4)
    assert len(expected.unique()) == K - 1
    wrong = (net.predict(x, K, label_value=1e4) != expected).sum()
    assert wrong <= (0 if compute_dtype is None else 3)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_features_beside_large_labels(backend):
    x_pos, x_neg = rows_under_labels(2, FIELDS[0], [1e8, -1e8])
    net, wide = network(torch.float32, outputs="pre", backend=backend), network(torch.float64, outputs="pre")
    for mine, theirs in zip(net.parameters(), wide.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    expected = wide.features(x_pos.double(), num_classes=K)
    _, features = net.step_and_features(x_pos, x_neg, SGD(net.parameters(), lr=0.1), K)
    assert ((features - expected).abs() <= 2e-6 * expected.abs().amax()).all()


def spoilt(value: float, at: int, field: slice) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        x[at, ::2, field.start + 1] = value
        return x

    return spoil


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_what_is_not_finite_stays_in_its_row(backend, dtype, value, side, field):
    x = spoilt(value, side, field)(rows_under_labels(2, field, [1.0, 2.0]))
    weight, bias = (p.detach() for p in layer(dtype))
    result = ff.linear_step_(
        *x, torch.nn.Parameter(weight.clone()), bias.clone().requires_grad_(), None, norm="none", outputs="pre",
        compute_dtype=dtype, backend=backend,
    )  # fmt: skip
    for i in range(2):
        sound = torch.arange(ROWS) % 2 == 1 if i == side else torch.ones(ROWS, dtype=torch.bool)
        y, sumsq, goodness = (result.sides(v)[i] for v in (result.y, result.sumsq, result.goodness))
        assert_activities(y[sound], sumsq[sound], x[i][sound], weight, bias, dtype)
        assert torch.equal(goodness[sound], sumsq[sound] / OUT)
        assert not sumsq[~sound].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_what_is_not_finite_stays_in_its_copy(backend, at):
    x = spoilt(float("nan"), at, FIELDS[1])(rows_under_labels(4, FIELDS[1], [1.0, 2.0, 3.0, 4.0]))
    weight, bias = (p.detach() for p in layer(torch.float32))
    y, sumsq = ff.linear_forward(x.flatten(0, 1), weight, bias, norm="none", copies=4, backend=backend)
    others = torch.tensor([i for i in range(4) if i != at])
    y, sumsq = y.view(4, ROWS, OUT), sumsq.view(4, ROWS)
    assert y[at, ::2].isnan().all() and sumsq[at, 1::2].isfinite().all()
    assert_activities(
        y[others].flatten(0, 1), sumsq[others].flatten(), x[others].flatten(0, 1), weight, bias, torch.float32
    )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_a_saturated_row_moves_nothing_whatever_its_label_holds(backend, dtype, field):
    """Positive rows of infinite goodness are saturated: the update is that of their negative copies alone."""
    x_pos, x_neg = rows_under_labels(2, field, [float("inf"), 1.0]).bfloat16().float()
    weight, bias = layer(dtype)
    weight.data.copy_(weight.data.bfloat16())
    alone = torch.nn.Parameter(weight.detach().clone()), torch.nn.Parameter(bias.detach().clone())
    options = {"objective": ff.Objective(goodness="sum", threshold=30.0), "norm": "none", "outputs": "none"}
    options |= {"compute_dtype": dtype, "backend": backend}
    result = ff.linear_step_(x_pos, x_neg, weight, bias, None, **options)
    assert result.goodness_pos.isinf().all() and result.goodness_neg.isfinite().all()
    options["sample_weight"] = torch.full((ROWS,), 0.5)  # a mean over as many rows as before
    ff.linear_step_(x_neg[:0], x_neg, *alone, None, **options)
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip((weight.grad, bias.grad), (p.grad for p in alone), strict=True):
        assert theirs.abs().sum() > 0
        assert ((mine - theirs).abs() <= 16 * eps * theirs.abs().amax()).all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_outside_the_label_field_is_the_same_on_both_sides(backend):
    x = rows_under_labels(2, FIELDS[0], [1e8, 1.0])
    x[:, ::3, K + 2] = float("nan")
    x[:, 1, K + 3] = float("inf")
    x[0, :, K + 4], x[1, :, K + 4] = 0.0, -0.0
    weight = layer(torch.float32)[0].detach()
    result = ff.linear_step_(
        *x, torch.nn.Parameter(weight.clone()), None, None, norm="none", outputs="pre", label_field=K, backend=backend
    )
    sound = x.flatten(0, 1).isfinite().all(1)
    assert 0 < sound.sum() < 2 * ROWS and not result.sumsq[~sound].isfinite().any()
    assert_activities(
        result.y[sound], result.sumsq[sound], x.flatten(0, 1)[sound], weight, torch.zeros(OUT), torch.float32
    )
    x[1, 0, K + 5] += 1
    with pytest.raises(ValueError, match="x_neg differs from x_pos outside the first 4 columns"):
        ff.linear_step_(*x, torch.nn.Parameter(weight.clone()), None, None, label_field=K, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("given", [None, K, WIDTH])
def test_sides_without_a_difference_and_a_field_of_all_columns(backend, given):
    x = torch.randn(ROWS, WIDTH)
    x_neg = torch.randn(ROWS, WIDTH) if given == WIDTH else x.clone()
    weight, bias = layer(torch.float32)
    result = ff.linear_step_(
        x, x_neg, weight, bias, None, norm="none", outputs="pre", label_field=given, backend=backend
    )
    assert_activities(result.y, result.sumsq, torch.cat([x, x_neg]), weight.detach(), bias.detach(), torch.float32)
