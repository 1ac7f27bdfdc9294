"""Convolutions on the compiled backend: its passes against the definition and against plain PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings

import ffkernels as ff
from ffkernels import ops
from ffkernels.backends import select
from ffkernels.backends.eager import conv
from ffkernels.backends.native import library, maps
from ffkernels.functional.maps import ConvOptions
from ffkernels.spec import Geometry, Layer, MapRows, MapSlopes

from .conv_cases import cases, drawn_case, made, of_maps, sensitivity
from .steps import error

pytestmark = pytest.mark.skipif(library.load().library is None, reason="the compiled library is not there")


def runs(case, **options) -> bool:
    layer = case.layer
    dtype = options.get("compute_dtype") or case.x.dtype
    request = select.Request(case.x.device, case.x.dtype, dtype, layer.activation, "adam", geometry=layer.geometry())
    return select.load("native").unsupported(request) is None


@given(cases())
@settings(max_examples=300, deadline=None)
def test_a_step_is_as_near_to_float64_as_pytorchs(drawn):
    exact = drawn_case(drawn, optimizer=None)
    single = {name: exact.copy(torch.float32) for name in ("native", "eager")}
    assume(runs(single["native"]))
    floor = 1e-5 * sensitivity(exact)
    expected = exact.ours()
    found = {name: case.ours(backend=name) for name, case in single.items()}
    for key in ("y", "sumsq", "goodness", "loss"):
        value = getattr(expected, key)
        theirs = error(getattr(found["eager"], key), value, 1.0)
        assert error(getattr(found["native"], key), value, 1.0) <= 2 * theirs + floor / 5, key
    for name, value in exact.state().items():
        theirs = error(single["eager"].state()[name], value, 1.0)
        assert error(single["native"].state()[name], value, 1.0) <= 2 * theirs + floor, name


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", None])
@pytest.mark.parametrize("statistics", [None, "batch", "running"])
@pytest.mark.parametrize("pool", [None, 2, torch.nn.AvgPool2d(2), torch.nn.MaxPool2d((2, 3), (3, 4))])
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_whole_numbers_give_the_same_bits(pool, statistics, norm, optimizer):
    """Of sums without rounding nothing but their order could differ: winners and switched off units are the same."""
    options = {"channels": (4, 21), "maps": (9, 10), "padding": 1, "ties": True, "dtype": torch.float32}
    case = made(
        "cross_entropy mean", rows=5, pool=pool, norm=norm, statistics=statistics, optimizer=optimizer, **options
    )
    one, other = case.copy(), case.copy()
    one.ours(backend="native"), other.ours(backend="eager")
    for name, value in other.state().items():
        assert error(one.state()[name], value, 1.0) <= 2e-5, name


@pytest.mark.parametrize("pool", [None, 2, torch.nn.AvgPool2d(2)])
@pytest.mark.parametrize("statistics", [None, "batch"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("objective", ["mean", "cross_entropy mean", "cwc activity", "projection"])
def test_bfloat16_maps(objective, activation, statistics, pool):
    options = {"rows": 32, "channels": (8, 12), "maps": (12, 12), "padding": 1, "optimizer": None}
    options["activation"] = activation
    exact = made(objective, statistics=statistics, pool=pool, **options)
    exact.x = exact.x.bfloat16().double()
    native, eager = exact.copy(torch.float32), exact.copy(torch.float32)
    result = native.ours(compute_dtype=torch.bfloat16, backend="native")
    assert result.y.dtype == torch.bfloat16
    eager.ours(compute_dtype=torch.bfloat16, backend="eager"), exact.ours()
    for name, value in exact.state().items():
        theirs = error(eager.state()[name], value)
        assert error(native.state()[name], value) <= 2 * theirs + 1e-3, (name, theirs)


@pytest.mark.parametrize("activation", ["identity", "silu", "relu"])
@pytest.mark.parametrize("pool", [None, torch.nn.AvgPool2d(2)])
def test_sums_that_cancel_behind_batch_normalisation_cancel_in_bfloat16(activation, pool):
    """A bias in front of it has next to no gradient: what is left must not be the rounding of the maps."""
    exact = made("mean", rows=64, channels=(4, 8), maps=(10, 10), padding=1, norm="l2", statistics="batch",
                 activation=activation, pool=pool, optimizer=None)  # fmt: skip
    native, eager = exact.copy(torch.float32), exact.copy(torch.float32)
    for name, case in (("native", native), ("eager", eager)):
        case.ours(compute_dtype=torch.bfloat16, backend=name)
    exact.ours()
    known = exact.layer.bias.grad
    theirs = error(eager.layer.bias.grad, known, 1e-2)
    assert error(native.layer.bias.grad, known, 1e-2) <= 2 * theirs + 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pool", [None, 2, torch.nn.AvgPool2d(2)])
@pytest.mark.parametrize("statistics", [None, "running"])
@pytest.mark.parametrize("row", [0, 1])
def test_numbers_that_are_none_stay_where_they_are(value, pool, statistics, row):
    """One row's do not reach another's activities, and come out of the pool as PyTorch lets them."""
    case = made("mean", rows=4, padding=1, pool=pool, dtype=torch.float32, optimizer=None, statistics=statistics)
    others = [i for i in range(4) if i != row]
    clean = case.copy().ours(backend="native").y
    case.x[row, 0, 2, 2] = value
    results = {name: case.copy().ours(backend=name) for name in ("native", "eager")}
    y = {name: result.y for name, result in results.items()}
    assert torch.equal(y["native"].isnan(), y["eager"].isnan())
    torch.testing.assert_close(y["native"], y["eager"], equal_nan=True)
    for result in results.values():
        torch.testing.assert_close(result.y[others], clean[others])
        assert result.goodness[others].isfinite().all()
    with torch.no_grad():
        layer = case.copy().layer
        torch.testing.assert_close(layer(case.x)[others], clean[others])
        assert torch.equal(layer.goodness(case.x)[others].isfinite(), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_row_is_evaluated_alone(backend):
    """By running statistics no other row has a part in its numbers, however far from it."""
    case = made("cross_entropy mean", rows=6, padding=1, pool=2, dtype=torch.float32, statistics="running")
    layer = case.layer
    layer.backend = backend
    with torch.no_grad():
        y, goodness = layer(case.x), layer.goodness(case.x)
        case.x[0] *= 1e6
        assert error(layer(case.x)[1:], y[1:]) <= 1e-6
        assert error(layer.goodness(case.x)[1:], goodness[1:]) <= 1e-6


def test_sums_of_squares_are_never_below_zero():
    layer = ff.FFConv2d(1, 2, 1, batch_norm="behind", activation="identity", objective=ff.Objective(goodness="norm"))
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.zero_()
    x = torch.tensor([1000.0, 3.3, -993.4, 3.3]).view(4, 1, 1, 1)
    for backend in ("native", "eager"):
        result = layer.step(x[:2], x[2:], None, backend=backend)
        assert (result.sumsq >= 0).all() and result.goodness.isfinite().all()


def test_derivatives_forward_are_pytorchs():
    case = made("mean", padding=1, dtype=torch.float32)
    weight, tangent = case.layer.weight.detach(), torch.randn(case.layer.weight.shape)
    y, along = torch.func.jvp(lambda w: ff.conv2d_forward(case.x, w)[0], (weight,), (tangent,))
    plain, expected = torch.func.jvp(lambda w: torch.relu(torch.conv2d(case.x, w)), (weight,), (tangent,))
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(along, expected)


def test_the_environment_forces_what_can_run(monkeypatch):
    layer = ff.FFConv2d(1, 4, 3, activation="leaky_relu", pool=2)
    x = torch.rand(4, 1, 8, 8)
    monkeypatch.setenv("FFKERNELS_BACKEND", "native")
    assert layer.step(x, x.flip(3), torch.optim.SGD(layer.parameters(), lr=0.1)).loss.isfinite()
    monkeypatch.setenv("FFKERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        layer(x)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    case = made("cross_entropy mean", rows=7, channels=(4, 20), maps=(16, 16), padding=1, pool=2, statistics="batch",
                dtype=torch.float32)  # fmt: skip
    before = torch.get_num_threads()
    maps = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            layer = case.layer
            record = Layer(layer.weight.detach(), layer.bias.detach(), "none", 0.0, "add", "relu", torch.float32)
            rows, geometry = MapRows(case.x.contiguous(memory_format=torch.channels_last), None), layer.geometry()
            made_maps = select.load("native").conv2d_forward(rows, record, geometry, True, None)
            maps.append([t.clone() for t in made_maps[:5]])
        finally:
            torch.set_num_threads(before)
    # The product is PyTorch's, whose bits may hang on its threads; here it has whole channels to itself.
    for one, other in zip(*maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_single_number_has_no_statistics(backend):
    layer = ff.FFConv2d(1, 4, 3, batch_norm="behind", backend=backend)
    x = torch.rand(1, 1, 3, 3)
    with pytest.raises(ValueError, match="batch_norm"), torch.no_grad():
        layer(x)
    layer.eval()
    assert layer(x).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("objective", ["mean", "cross_entropy mean", "cross_entropy activity", "projection"])
def test_a_forward_pass_without_a_graph_is_that_with_one(objective, backend, training):
    case = made(objective, padding=1, pool=2, norm="l2", statistics="running", dtype=torch.float32)
    layer, x = case.layer, case.x
    layer.backend = backend
    layer.train(training)
    y, sumsq = layer.activity(x)
    goodness = layer.goodness(x)
    assert y.requires_grad and goodness.requires_grad
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for one, other in zip((*layer.activity(x), layer.goodness(x)), (y, sumsq, goodness), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def operator_arguments(backend: str, pool: str, activation: str, gain: bool) -> tuple[tuple, tuple]:
    torch.manual_seed(2)
    weight, bias = torch.randn(6, 2, 3, 3), torch.randn(6)
    layer = Layer(weight, bias, "none", 1e-4, "add", activation, torch.float32)
    size = (2, 2) if pool != "none" else (1, 1)
    geometry = Geometry(padding=(1, 1), groups=2, pool=pool, pool_size=size, pool_stride=size)
    rows = MapRows(torch.randn(3, 4, 6, 6).contiguous(memory_format=torch.channels_last), None)
    maps = ops.conv2d_forward(rows, layer, geometry, True, None, backend)
    line = (torch.rand(6), torch.rand(6)) if gain else (None, None)
    slopes = MapSlopes(torch.randn(3, 6), torch.randn(3, 6), *line)
    convolution = ops.flatten(rows, layer, geometry)
    return (*convolution, not gain, torch.rand(6) if gain else None, backend), (*convolution, *maps, *slopes, backend)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_opcheck(backend, pool, activation, gain):
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.ffkernels
    forward, gradients = operator_arguments(backend, pool, activation, gain)
    torch.library.opcheck(operators.conv2d_forward.default, forward, test_utils=checks)
    torch.library.opcheck(operators.conv2d_gradients_.default, gradients, test_utils=checks)


def test_what_it_does_not_run_falls_to_pytorch_and_says_so():
    x = torch.rand(4, 1, 8, 8)
    for options, reason in (
        ({"pool": torch.nn.MaxPool2d(3, 2)}, "windows of a pool that overlap"),
        ({"pool": 2, "activation": "leaky_relu"}, "maximum pooling of leaky_relu"),
    ):
        layer = ff.FFConv2d(1, 4, 3, **options)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        assert layer.step(x, x.flip(3), optimizer).loss.isfinite()
        with pytest.raises(ValueError, match=f"backend='native' cannot run this call: .*{reason}"):
            layer.step(x, x.flip(3), optimizer, backend="native")
    with pytest.raises(ValueError, match=r"convolutions have no Triton kernel|Triton needs a GPU|not installed"):
        layer.step(x, x, optimizer, backend="triton")


def test_a_profiler_sees_the_operators():
    case = made("cross_entropy mean", padding=1, pool=2, statistics="batch", dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.ours()
    names = {event.key for event in profile.key_averages()}
    assert {"ffkernels::conv2d_forward", "ffkernels::conv2d_gradients_"} <= names


OWN = [
    {"channels": (20, 80), "groups": 10, "pool": 2},
    {"channels": (3, 20), "pool": torch.nn.AvgPool2d(2), "activation": "gelu"},
    {"channels": (1, 50), "kernel": (1, 3), "padding": (0, 1)},
    # Of which several are multiplied at once.
    {"channels": (6, 30), "maps": (4, 5), "pool": 2, "activation": "gelu"},
    {"channels": (4, 12), "in_front": "batch"},
]


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("options", OWN)
def test_own_products_are_as_near_to_float64_as_pytorchs(options, norm, compute, monkeypatch):
    """The same passes around the library's products and around PyTorch's, in either direction; in the mean square over
    draws."""
    options = {"maps": (11, 10), "padding": 1, "rows": 19, "optimizer": None, "statistics": "batch", **options}
    if "in_front" in options and norm != "none":
        pytest.skip("a normalisation in front of another")
    found: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(4):
        exact = made("cross_entropy mean", norm=norm, **options)
        exact.x = exact.x.bfloat16().double()
        states = []
        for is_own in ((True, True), (True, False), (False, True), (False, False)):
            case = exact.copy(torch.float32)
            with monkeypatch.context() as patch:
                for name, chosen in zip(("multiplies", "multiplies_back"), is_own, strict=True):
                    patch.setattr(maps, name, lambda *records, chosen=chosen: chosen)
                states.append((case, case.ours(backend="native", compute_dtype=compute)))
        expected = exact.ours()
        states = [
            case.state() | {"y": result.y, "goodness": result.goodness, "loss": result.loss}
            for case, result in [(exact, expected), *states]
        ]
        for name, value in states[0].items():
            # A bias in front of a batch normalisation's pool has next to no gradient.
            found.setdefault(name, []).append(tuple(error(state[name], value, 1e-2) for state in states[1:]))
    for name, errors in found.items():
        *ours, theirs = torch.tensor(errors).square().mean(0).sqrt().tolist()
        assert max(ours) <= 2 * theirs + (1e-6 if compute is None else 1e-3), (name, errors)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize(("activation", "pool"), [("relu", torch.nn.AvgPool2d(2)), ("gelu", None), ("silu", 2)])
def test_what_a_product_and_its_bias_leave_of_each_other_is_kept(activation, pool, compute):
    """Products of the size of 5 whose bias takes their mean away: rounded before, they would lose what is left."""
    ours, theirs = [], []
    for _ in range(4):
        exact = made("mean", rows=12, channels=(8, 16), maps=(12, 12), activation=activation, pool=pool, optimizer=None)
        exact.x = exact.x.abs().bfloat16().double()
        with torch.no_grad():
            weight = (exact.layer.weight + 0.1).bfloat16().double()
            exact.layer.weight.copy_(weight)
            exact.layer.bias.copy_(-torch.conv2d(exact.x, weight).mean((0, 2, 3)).bfloat16())
        found = []
        for backend in ("native", "eager"):
            case = exact.copy(torch.float32)
            case.ours(backend=backend, compute_dtype=compute)
            found.append(case.state())
        exact.theirs()
        for errors, state in zip((ours, theirs), found, strict=True):
            errors.append([error(state[name], value) for name, value in exact.state().items()])
    ours, theirs = (torch.tensor(errors).square().mean(0).sqrt() for errors in (ours, theirs))
    assert (ours <= 2 * theirs + 1e-6).all(), (ours, theirs)


def checked(case, compute) -> tuple[MapRows, Layer, Geometry]:
    layer, geometry = ConvOptions(**{**case.layer._options(), "compute_dtype": compute}).checked(
        case.layer.weight, case.layer.bias
    )
    return MapRows(case.x.to(layer.compute_dtype), None), layer, geometry


@pytest.mark.parametrize(
    ("options", "compute", "forward", "back"),
    [
        ({}, None, True, True),
        ({"channels": (2, 8)}, None, False, "avx2"),
        ({"stride": 2, "maps": (17, 17)}, None, False, False),
        ({"maps": (7, 8)}, None, False, "avx2"),
        ({"maps": (3, 5)}, None, False, False),
        ({"maps": (64, 65)}, None, False, "avx2"),
        ({"channels": (33, 16)}, None, "not avx2", True),
        ({"channels": (16, 16), "groups": 8}, None, False, False),
        ({"channels": (16, 32), "groups": 8}, None, True, True),
        ({"maps": (3, 5)}, torch.bfloat16, "no unit", "no unit"),
    ],
)
def test_the_library_multiplies_where_it_is_the_faster_one(options, compute, forward, back):
    case = made("mean", dtype=torch.float32, **{"channels": (2, 12), "maps": (8, 8), "padding": 1, **options})
    is_avx2 = library.instruction_set() == "avx2"
    has_unit = library.instruction_set("bfloat16") in library.BFLOAT16_UNITS
    told = {"avx2": is_avx2, "not avx2": not is_avx2, "no unit": not has_unit}
    for chosen, expected in ((maps.multiplies, forward), (maps.multiplies_back, back)):
        assert chosen(*checked(case, compute)) == told.get(expected, expected)


@pytest.mark.parametrize(("rows", "size"), [(21, (9, 9)), (1, (8, 8))])
def test_own_products_on_any_number_of_threads_have_the_same_bits(rows, size):
    case = made("cross_entropy mean", rows=rows, channels=(12, 40), maps=size, padding=1, pool=2, dtype=torch.float32)
    assert maps.multiplies_back(*checked(case, None))
    threads, states = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            copy = case.copy()
            copy.ours(backend="native")
            states.append(copy.state())
    finally:
        torch.set_num_threads(threads)
    for state in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(state[name], value), name


def test_rows_that_are_summed_by_place_have_own_products_too():
    """A batch normalisation in front needs `dz` itself, which comes of maps that only the library's forward leaves."""
    exact = made("cross_entropy mean", rows=8, channels=(4, 12), maps=(9, 9), padding=1, pool=2, in_front="batch")
    single = exact.copy(torch.float32)
    exact.ours(), single.ours(backend="native")
    for name, value in exact.state().items():
        assert error(single.state()[name], value, 1e-2) <= 1e-4, name


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity", "gelu"])
@pytest.mark.parametrize("pool", [None, 2, torch.nn.MaxPool2d((2, 3), (3, 4)), torch.nn.AvgPool2d(3)])
def test_a_gradient_of_each_place_goes_in_front_of_activation_and_pool(pool, activation, compute_dtype):
    """As PyTorch's passes put it there, from the same activities; by the moments' slopes too."""
    options = ConvOptions(1, 1, "zeros", 1, pool, "none", 0.0, "add", activation, None, None, compute_dtype, None)
    # Of whole numbers both have the same winners.
    weight, x = (torch.randint(-2, 3, shape).float() for shape in ((21, 4, 3, 3), (5, 4, 9, 10)))
    layer, geometry = options.checked(weight, None)
    rows = MapRows(x.to(compute_dtype).contiguous(memory_format=torch.channels_last), None)
    if geometry.pool == "max" and activation in ("leaky_relu", "gelu"):
        pytest.skip("not compiled, or of curved activities equal ones that PyTorch rounds apart")
    ours, theirs = (of.conv2d_forward(rows, layer, geometry, False, None) for of in (maps, conv))
    shape, mean = ours.p.shape, torch.randn(21)
    ours, theirs = (of._replace(pivot=mean) for of in (ours, theirs))
    by_moments = MapSlopes(*torch.randn(2, *shape[:2]))
    of_place, scale = torch.randn(shape), torch.randn(21)
    through = by_moments._replace(of_place=of_place, scale=scale)
    for slopes in (through, MapSlopes(None, None, of_place=of_place), by_moments):
        dz, sums, dw = maps.in_front(rows, layer, geometry, ours, slopes)
        expected = conv.in_front(theirs, slopes, activation, geometry, (9, 10))
        assert dz.dtype == compute_dtype and dz.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-5 if compute_dtype == torch.float32 else 2e-2
        assert error(dz.float(), expected.float(), 1.0) <= tolerance
        assert error(sums, expected.float().sum((0, 2, 3)), 1.0) <= tolerance
        assert error(dw, conv.by_weight(expected.to(compute_dtype), rows.x, layer, geometry).float(), 1.0) <= tolerance


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"pool": 2, "norm": "l2"},
        {"pool": torch.nn.AvgPool2d((2, 3), (3, 4)), "activation": "silu"},
        {"in_front": "batch", "activation": "gelu"},
        {"groups": 2, "stride": 2},
        {"activation": "leaky_relu"},
    ],
)
def test_a_loss_of_the_maps_themselves(options, compute_dtype):
    exact = made("given sides", rows=8, channels=(4, 12), maps=(9, 10), padding=1, optimizer=None, **options)
    exact.layer.objective = ff.GivenLoss(of_maps, reads="activities")
    if compute_dtype is not None:
        exact.x = exact.x.bfloat16().double()
    single = {name: exact.copy(torch.float32) for name in ("native", "eager")}
    expected = exact.ours()
    for name, case in single.items():
        result = case.ours(backend=name, compute_dtype=compute_dtype)
        assert error(result.loss, expected.loss, 1e-2) <= (1e-5 if compute_dtype is None else 2e-2)
    for name, value in exact.state().items():
        floor = 1e-6 if compute_dtype is None else 1e-3
        theirs = error(single["eager"].state()[name], value)
        assert error(single["native"].state()[name], value) <= 2 * theirs + floor, (name, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 7, 40])
def test_sums_that_a_normalisation_asks_for(channels, dtype):
    """Against float64, of maps far from zero about their mean; in a pass over strided ones too."""
    p, of_place = torch.randn(5, channels, 9, 7).add_(100).to(dtype), torch.randn(5, 9, channels, 7).transpose(1, 2)
    mean = p.float().mean((0, 2, 3))
    apart = p.double() - mean.double()[:, None, None]
    sums, products = maps.products(of_place, p, mean)
    assert error(sums, of_place.double().sum((0, 2, 3)), 1.0) <= 1e-5
    assert error(products, (of_place.double() * apart).sum((0, 2, 3)), 1.0) <= 1e-5
