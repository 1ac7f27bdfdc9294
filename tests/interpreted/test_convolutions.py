"""Convolutions through their Triton kernels, against float64 and beside plain PyTorch in the same dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends import select
from ffkernels.spec import Geometry, Layer, MapRows, MapSlopes

from ..conv_cases import cases, drawn_case, made, sensitivity
from ..steps import error
from ..test_native_conv import operator_arguments

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
conv = pytest.importorskip("ffkernels.backends.triton.conv")

# What one rounding more or less may make, beside twice PyTorch's error.
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
EAGER = select.load("eager")


@pytest.fixture(autouse=True)
def rounds_to_nearest(monkeypatch):
    """Devices round to bfloat16; the interpreter cuts bits off, which no bound of PyTorch's would hold."""
    plain = interpreter._convert_float

    def rounded(values, given_dtype, wanted, mode):
        if given_dtype == tl.float32 and wanted == tl.bfloat16:
            nearest = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
            return nearest.view(torch.int16).numpy().view(np.uint16)
        return plain(values, given_dtype, wanted, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@given(cases())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_step_is_as_near_to_float64_as_pytorchs(drawn):
    exact = drawn_case(drawn, optimizer=None)
    single = {name: exact.copy(torch.float32) for name in ("triton", "eager")}
    floor = 1e-5 * sensitivity(exact)
    expected = exact.ours(backend="eager")
    found = {name: case.ours(backend=name) for name, case in single.items()}
    for key in ("y", "sumsq", "goodness", "loss"):
        value = getattr(expected, key)
        theirs = error(getattr(found["eager"], key), value, 1.0)
        assert error(getattr(found["triton"], key), value, 1.0) <= 2 * theirs + floor / 5, key
    for name, value in exact.state().items():
        theirs = error(single["eager"].state()[name], value, 1.0)
        assert error(single["triton"].state()[name], value, 1.0) <= 2 * theirs + floor, name


@pytest.mark.parametrize(("optimizer", "statistics"), [("sgd-momentum", "batch"), ("adam", None)])
def test_two_steps_of_a_network_are_those_of_autograd(optimizer, statistics):
    """The backend comes from the environment, which the linear layer hears too."""
    options = {"padding": 1, "objective": ff.Objective(loss="cross_entropy", classes=3)}
    options["batch_norm"] = "behind" if statistics else None
    net = ff.FFNetwork([ff.FFConv2d(2, 6, 3, pool=2, **options), ff.FFConv2d(6, 9, 3, stride=2, groups=3, **options)])
    x, labels = torch.randn(5, 2, 9, 8), torch.tensor([0, 1, 2, 2, 0])
    learn = {"sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
             "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3)}[optimizer]  # fmt: skip
    theirs = [made("cross_entropy mean", padding=1) for _ in net]
    for case, layer in zip(theirs, net, strict=True):
        case.layer = ff.FFConv2d(
            layer.in_channels, layer.out_channels, 3, stride=layer.stride, groups=layer.groups, pool=layer.pool,
            dtype=torch.float64, **options,
        )  # fmt: skip
        case.layer.load_state_dict(layer.state_dict())
        case.optimizer, case.side = learn(case.layer.parameters()), labels
    ours = learn(net.parameters())
    for _ in range(2):
        net.step(x, None, ours, labels=labels)
        below = x.double()
        for case in theirs:
            case.x = below
            below = case.theirs()[0].detach()
    for case, layer in zip(theirs, net, strict=True):
        for name, value in case.layer.state_dict().items():
            # A bias in front of batch normalisation has no gradient but noise.
            if not (statistics and name == "bias"):
                assert error(layer.state_dict()[name], value, 1.0) <= 2e-5, name


# Channels beyond one tile, and fewer than one; columns that fill blocks tap by tap, and those that do not; several
# images in a tile, and an image in several; windows with gaps between, cut by an edge, overlapping, of no power of two.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "wide": {"channels": (16, 20), "maps": (4, 5), "padding": (1, 1)},
    "wide, pooled": {"channels": (32, 6), "maps": (5, 5), "rows": 2, "padding": (1, 0), "pool": "max", "size": (2, 2)},
    "1 x 1": {"channels": (20, 24), "maps": (5, 7), "kernel": (1, 1), "pool": "average", "size": (2, 2)},
    "one place": {"channels": (3, 5), "maps": (3, 3), "rows": 9},
    "few places": {"channels": (3, 5), "maps": (2, 4), "rows": 9, "padding": (1, 1), "pool": "max", "size": (2, 2)},
    "steps": {"channels": (4, 6), "maps": (9, 8), "stride": (2, 1), "padding": (2, 0), "kernel": (3, 2)},
    "groups": {"channels": (6, 12), "maps": (5, 5), "groups": 3, "padding": (1, 1), "pool": "max", "size": (2, 1)},
    "many groups": {"channels": (4, 4), "maps": (6, 6), "groups": 4, "stride": (2, 2), "padding": (1, 1)},
    "gaps": {"channels": (2, 6), "maps": (8, 9), "pool": "max", "size": (2, 2), "step": (3, 4)},
    "gaps and means": {"channels": (2, 6), "maps": (8, 9), "pool": "average", "size": (2, 2), "step": (3, 4)},
    "large windows": {"channels": (2, 6), "maps": (10, 7), "pool": "max", "size": (4, 4)},
    "nine places": {"channels": (2, 18), "maps": (7, 6), "padding": (1, 1), "pool": "max", "size": (3, 3)},
    "over all": {"channels": (1, 2), "maps": (17, 17), "rows": 1, "kernel": (1, 1), "pool": "max", "size": (17, 16)},
    "overlapping": {"channels": (2, 6), "maps": (7, 6), "pool": "max", "size": (3, 2), "step": (1, 2)},
    "overlapping means": {"channels": (2, 6), "maps": (7, 6), "pool": "average", "size": (3, 3), "step": (2, 1)},
}


def of_geometry(
    channels: tuple[int, int],
    maps: tuple[int, int],
    rows: int = 3,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    pool: str = "none",
    size: tuple[int, int] = (1, 1),
    step: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Geometry]:
    """Rows, a weight and the record."""
    weight = torch.randn(channels[1], channels[0] // groups, *kernel) / 4
    x = torch.randn(rows, channels[0], *maps).contiguous(memory_format=torch.channels_last)
    return x, weight, Geometry(stride, padding, "zeros", groups, pool, size, step or size)


def both_operators(
    backend: Any, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, dtype: torch.dtype, wide: torch.dtype,
    activation: str = "relu", scale: torch.Tensor | None = None, is_centred: bool = False, by_place: bool = False,
    slopes: tuple[torch.Tensor | None, torch.Tensor | None] | None = None, bias: bool = True, whole: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a backend makes of random slopes in products of `dtype` and sums of `wide`, whatever its pivot is."""

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(wide)

    torch.manual_seed(3)
    channels = len(weight)
    of_bias = torch.randn(channels) if bias else None
    of_bias = of_bias.round() if bias and whole else of_bias
    layer = Layer(weight.to(wide), cast(of_bias), "none", 0.0, "add", activation, dtype)
    rows = MapRows(x.to(dtype), cast(scale))
    first, second = (torch.randn(len(x), channels) for _ in range(2)) if slopes is None else slopes
    maps = backend.conv2d_forward(rows, layer, geometry, is_centred, None)
    made = {"p": maps.p.clone()}
    # Moments about zero, and slopes of the same gradient.
    about, places = maps.pivot.double() if is_centred else 0.0, maps.p[0, 0].numel()
    made["first"] = maps.first.double() + about * places
    made["second"] = maps.spread.double() + 2 * about * maps.first.double() + about**2 * places
    first, second = cast(first), cast(second)
    if is_centred:
        first = first + 2 * second * maps.pivot
    line = (torch.rand(channels), torch.rand(channels)) if is_centred else (None, None)
    given = MapSlopes(first, second, cast(line[0]), cast(line[1]), by_place)
    gradients = backend.conv2d_gradients_(rows, layer, geometry, maps, given)
    made |= {"weight": gradients.weight, "by_place": gradients.by_place}
    if bias:
        made["bias"] = gradients.bias
    if is_centred:
        made["handed on"] = maps.p + (line[0].to(wide) * maps.pivot)[:, None, None]
    return made


def assert_as_near(x: torch.Tensor, *given: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """The kernels' errors are at most twice those of plain PyTorch in the same dtype.

    Where bfloat16 decides who wins and who is shut off, numbers are whole: one that falls out otherwise counts more
    than all roundings.
    """
    weight, geometry = given
    x = x.to(dtype).float()
    if dtype == torch.bfloat16 and (geometry.pool == "max" or options.get("activation", "relu").endswith("relu")):
        x, weight, options["whole"] = x.round(), (2 * weight).round(), True
    exact = both_operators(EAGER, x, weight, geometry, torch.float64, torch.float64, **options)
    torchs = both_operators(EAGER, x, weight, geometry, dtype, torch.float32, **options)
    ours = both_operators(conv, x, weight, geometry, dtype, torch.float32, **options)
    for name, value in exact.items():
        assert ours[name].dtype == torchs[name].dtype, name
        theirs = error(torchs[name], value, 1e-2)
        assert error(ours[name], value, 1e-2) <= 2 * theirs + FLOORS[dtype], (name, theirs)


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(name, dtype):
    curved = list(GEOMETRIES).index(name) % 2 == 1
    activation = "silu" if curved else "relu"
    x, *given = of_geometry(**GEOMETRIES[name])
    scale = torch.rand(len(x)) + 0.5 if dtype == torch.float32 else None
    assert_as_near(x, *given, dtype=dtype, activation=activation, scale=scale, is_centred=curved)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize(("name", "dtype"), [("groups", torch.float32), ("overlapping means", torch.bfloat16)])
def test_every_activation(name, activation, dtype):
    assert_as_near(*of_geometry(**GEOMETRIES[name]), dtype=dtype, activation=activation)


@pytest.mark.parametrize(("name", "splits"), [("groups", 2), ("few places", 5)])
def test_parts_of_the_places_are_added(name, splits, monkeypatch):
    """More parts than there are blocks of places too."""
    monkeypatch.setattr(conv, "count_splits", lambda *_: splits)
    assert_as_near(*of_geometry(**GEOMETRIES[name]), scale=torch.rand(GEOMETRIES[name].get("rows", 3)))
    assert_as_near(*of_geometry(**GEOMETRIES[name]), bias=False)


@pytest.mark.parametrize("name", ["few places", "gaps", "overlapping means"])
def test_gradients_in_front_of_the_activation_by_place(name):
    x, *given = of_geometry(**GEOMETRIES[name])
    assert_as_near(x, *given, by_place=True, is_centred=True, activation="silu")
    assert_as_near(x, *given, by_place=True, scale=torch.rand(len(x)))


@pytest.mark.parametrize("orders", ["first", "second"])
@pytest.mark.parametrize("of", ["row", "channel"])
@pytest.mark.parametrize("name", ["few places", "overlapping"])
def test_slopes_of_one_order_and_of_whole_rows(name, of, orders):
    x, weight, geometry = of_geometry(**GEOMETRIES[name])
    slope = torch.randn(len(x), 1 if of == "row" else len(weight))
    assert_as_near(x, weight, geometry, slopes=(slope, None) if orders == "first" else (None, slope))


@pytest.mark.parametrize("name", [name for name, of in GEOMETRIES.items() if of.get("pool") == "max"])
def test_ties_in_a_pool_are_pytorchs(name):
    """Small whole numbers, among which equal ones are many: the same winners, and so the same gradients, exactly."""
    x, weight, geometry = of_geometry(**GEOMETRIES[name])
    x, weight = x.round(), torch.randint_like(weight, -1, 2)
    slopes = tuple(torch.randint(-2, 3, (len(x), len(weight))).float() for _ in range(2))
    options = {"activation": "identity", "slopes": slopes, "whole": True}
    theirs, ours = (
        both_operators(backend, x, weight, geometry, torch.float32, torch.float32, **options)
        for backend in (EAGER, conv)
    )
    for of, value in theirs.items():
        assert torch.equal(ours[of], value), of


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["gaps", "1 x 1", "nine places"])
def test_numbers_that_are_none_come_out_where_pytorchs_do(name, value):
    x, weight, geometry = of_geometry(**GEOMETRIES[name])
    x[1, 0, 2, 2] = value
    layer = Layer(weight, None, "none", 0.0, "add", "relu", torch.float32)
    maps = [b.conv2d_forward(MapRows(x, None), layer, geometry, False, None) for b in (EAGER, conv)]
    assert bool((~maps[1].p[1].isfinite()).any()) == bool((~maps[0].p[1].isfinite()).any())
    for field in ("p", "first", "spread"):
        torch.testing.assert_close(getattr(maps[1], field), getattr(maps[0], field), equal_nan=True)
    assert maps[1].first[[0, 2]].isfinite().all()


def test_what_a_relu_shuts_off_has_no_gradient_whatever_its_slope():
    x, weight, geometry = of_geometry(**GEOMETRIES["steps"])
    slope = torch.full((len(x), len(weight)), float("inf"))
    layer = Layer(weight, torch.full((len(weight),), -1e6), "none", 0.0, "add", "relu", torch.float32)
    rows = MapRows(x, None)
    maps = conv.conv2d_forward(rows, layer, geometry, False, None)
    made = conv.conv2d_gradients_(rows, layer, geometry, maps, MapSlopes(slope, None))
    assert not made.weight.any() and not made.bias.any()


@pytest.mark.parametrize("pool", [None, 2, torch.nn.MaxPool2d(3, 2)])
@pytest.mark.parametrize("statistics", [None, "batch", "running"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows, statistics, pool):
    options = {"padding": 1, "pool": pool, "statistics": statistics, "norm": "l2", "optimizer": "sgd"}
    case = made("cross_entropy mean", rows=rows, **options)
    ours = case.copy(torch.float32)
    before = {name: value.clone() for name, value in ours.state().items()}
    result = ours.ours(backend="triton")
    if rows:
        case.theirs()
        floor = 1e-5 * sensitivity(case)
        for name, value in case.state().items():
            assert error(ours.state()[name], value, 1.0) <= floor, name
    else:
        assert result.y.shape[0] == 0 and float(result.loss) == 0
        for name, value in before.items():
            assert torch.equal(ours.state()[name], value) or "tracked" in name, name


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_channels_without_variance(activation):
    """One that never fires, one that is constant, and one far from zero."""
    exact = made("cross_entropy mean", activation=activation, statistics="batch", padding=1, optimizer=None)
    with torch.no_grad():
        exact.layer.weight[:2] = 0
        exact.layer.bias[:3] = torch.tensor([-1.0, 3.0, 100.0])
        exact.layer.batch_norm.weight[1] = -2.0
    single = {name: exact.copy(torch.float32) for name in ("triton", "eager")}
    expected = exact.ours(backend="eager")
    for name, case in single.items():
        assert error(case.ours(backend=name).y, expected.y, 1.0) <= 1e-4
    for name, value in exact.state().items():
        theirs = error(single["eager"].state()[name], value, 1.0)
        assert error(single["triton"].state()[name], value, 1.0) <= 2 * theirs + 1e-4, name


def test_a_mean_far_from_zero_keeps_its_digits():
    """In float32, where sums of squares alone would have lost the variance."""
    exact = made("cross_entropy mean", statistics="batch", optimizer=None, rows=16, activation="identity")
    with torch.no_grad():
        exact.layer.bias.fill_(1000.0)
        exact.layer.batch_norm.weight.fill_(1.0)
    ours, torchs = exact.copy(torch.float32), exact.copy(torch.float32)
    ours.ours(backend="triton"), torchs.theirs(), exact.theirs()
    for name, value in exact.state().items():
        if name != "bias":  # it has no gradient behind a batch normalisation, but noise
            assert error(ours.state()[name], value) <= 2 * error(torchs.state()[name], value) + 1e-6, name


@pytest.mark.parametrize("statistics", [None, "batch"])
@pytest.mark.parametrize(("activation", "pool"), [("silu", torch.nn.AvgPool2d(2)), ("gelu", None), ("relu", 2)])
def test_bfloat16_steps(activation, pool, statistics):
    options = {"rows": 6, "channels": (4, 8), "maps": (6, 6), "padding": 1, "optimizer": None, "pool": pool}
    exact = made("cross_entropy mean", statistics=statistics, activation=activation, ties=pool == 2, **options)
    exact.x = exact.x.bfloat16().double()
    single = {name: exact.copy(torch.float32) for name in ("triton", "eager")}
    for name, case in single.items():
        assert case.ours(compute_dtype=torch.bfloat16, backend=name).y.dtype == torch.bfloat16
    exact.ours(backend="eager")
    for name, value in exact.state().items():
        theirs = error(single["eager"].state()[name], value)
        assert error(single["triton"].state()[name], value) <= 2 * theirs + 1e-3, (name, theirs)


@pytest.mark.parametrize(
    ("activation", "pool", "gain"), [("relu", "none", True), ("silu", "max", True), ("relu", "average", False)]
)
def test_opcheck(activation, pool, gain):
    checks = ("test_schema", "test_faketensor")
    forward, gradients = operator_arguments("triton", pool, activation, gain)
    torch.library.opcheck(torch.ops.ffkernels.conv2d_forward.default, forward, test_utils=checks)
    torch.library.opcheck(torch.ops.ffkernels.conv2d_gradients_.default, gradients, test_utils=checks)


def test_more_places_than_can_be_counted_are_refused():
    x = torch.empty(1, 1, 1, 1).expand(2**16, 1, 2**8, 2**8)
    layer = Layer(torch.zeros(1, 1, 1, 1), None, "none", 0.0, "add", "relu", torch.float32)
    with pytest.raises(ValueError, match="accepted: up to 2147418112 numbers in a row, and places in all"):
        conv.conv2d_forward(MapRows(x, None), layer, Geometry(), False, None)
