"""The kernels as compiled for devices that need not be there: they fit, use the matrix units, and spill nothing.

Every shipped configuration is in the table of `triton_aot.py`. Compiling them all takes minutes, which `make nightly`
spends (`FFKERNELS_AOT=all`); otherwise the configurations of sm_90 are compiled in bfloat16 and TF32, and of every
other device the ones for large shapes.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ffkernels.backends.triton import configs, launch, tune  # noqa: E402
from ffkernels.spec import Geometry, Layer, MapRows, MapSlopes  # noqa: E402

from . import triton_aot as aot  # noqa: E402

TABLE = json.loads(aot.TABLE.read_text())
SAME_COMPILER = TABLE["triton"].split(".")[:2] == triton.__version__.split(".")[:2]


def chosen(case: aot.Case) -> bool:
    if os.environ.get("FFKERNELS_AOT") == "all":
        return True
    no_tf32 = case.target == "gfx942" and case.kind == "float32"
    usual = case.compute == "bfloat16" or case.precision == "tf32" or no_tf32
    if case.kernel in configs.CONV_KERNELS:
        return usual and case.size == "large" and (case.target == "sm_90" or case.form == "curved average")
    form = case.form in ("", "on the fly" if case.size == "small" else "given") or (
        case.form == "listed" and case.size == "large" and case.target == "sm_90"
    )
    return usual and form and (case.target == "sm_90" or case.size == "large")


def assert_fits(found: aot.Report, target: str) -> None:
    assert found.shared <= aot.SHARED_LIMIT[target]
    # Another compiler hands out registers in another way: its spills are for a tuning of its own to find.
    if SAME_COMPILER:
        assert found.local_in_loop == 0, "local memory in the product's loop"
        assert found.local_elsewhere <= 8, "local memory in the epilogue"


@pytest.mark.parametrize("case", list(filter(chosen, aot.cases())), ids=str)
def test_shipped_configuration(case):
    kernel = case.compile()
    found = aot.report(kernel, case.target)
    print(f"{case}: {found}")
    assert_fits(found, case.target)
    if case.compute != "float32" or case.precision == "tf32":
        assert found.products > 0
    # Thirty-two channels out are fewer rows than a product of a warp group has.
    is_narrow = case.kernel == "conv_update" and case.size == "small"
    if case.target == "sm_90" and case.compute == "bfloat16" and not is_narrow:
        assert "wgmma" in kernel.asm["ptx"] and "HGMMA" in aot.machine_code(kernel)
    if SAME_COMPILER:
        recorded = aot.Report(*TABLE["rows"][str(case)])
        assert found.shared <= recorded.shared
        assert found.registers <= recorded.registers + 8
        assert found.instructions <= 1.1 * recorded.instructions
        assert found.products >= recorded.products > 0 or case.precision == "ieee"


def test_the_table_lists_every_shipped_configuration():
    assert list(TABLE["rows"]) == [str(case) for case in aot.cases()]
    assert tuple(TABLE["columns"]) == aot.Report._fields


VARIANTS = {
    "sgd": {"RULE": "sgd", "weight.state1": None, "bias.state1": None},
    "gradient only": {"RULE": "grad", "weight.state1": None, "bias.state1": None},
    "split": {"parts": True},
    "no bias, no norm": {"bias": None, "activities.row_scale": None},
    "many column blocks": {"PARTIALS": 64},
    "peer normalisation": {"peers": True},
    "gated peer normalisation": {"peers": True, "peers.input_sums": None},
    "a rounded weight": {"weight.rounded": True},
    "gelu, pairs": {"ACTIVATION": "gelu", "LOSS": "symba", "GOODNESS": "norm"},
    "everything on the device": {
        **dict.fromkeys(aot.ON_THE_HOST, True), "rows.is_positive": True, "terms.n_positive": True,
        "terms.sample_weight": True, "terms.threshold": True,
    },
}  # fmt: skip

SYMBA = {"GOODNESS": "norm", "LOSS": "symba", "THRESHOLD_PER_ROW": True}
SMALL = {
    "listed": (launch.coefficient_kernel, {"num_warps": 8, "BLOCK": 256, "PARTIALS": 64, **SYMBA}),
    "given": (launch.coefficient_kernel, {
        "num_warps": 4, "BLOCK": 128, "PARTIALS": 64, "made.listed": None, "made.n_listed": None, **SYMBA,
    }),
    "peers": (launch.peers_kernel, {"num_warps": 4, **launch.PEERS_BLOCK[False]}),
    "finish": (launch.finish_kernel, {
        "num_warps": 4, **launch.FINISH_BLOCK[False], "RULE": "adam", **aot.ON_THE_HOST,
    }),
    "list": (launch.list_kernel, {"num_warps": 8, "BLOCK": 1024}),
    "scale": (launch.scale_kernel, {"num_warps": 4, **launch.ROWS_BLOCK[False], "NORM": "rms", "EPS_MODE": "clamp"}),
    "classes": (launch.class_sums_kernel, {"num_warps": 4, **launch.CLASSES_BLOCK[False], "SLOTS": 3, "BLOCK_N": 64}),
    "units": (launch.units_kernel, {"num_warps": 4, **launch.UNITS_BLOCK[False], "ACTIVATION": "gelu"}),
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_update(name, target):
    case = aot.Case(target, "update", "half", "small", "bfloat16", "ieee", "on the fly")
    kernel = aot.update(target, case.config, "bfloat16", "half", form=case.form, **VARIANTS[name])
    assert_fits(aot.report(kernel, target), target)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_slopes_of_low_rank_beside_others(target, activation):
    """What takes the most registers: the basis, slopes of second order by group, and float32 products."""
    case = aot.Case(target, "update", "float32", "large", "float32", "ieee", "by basis")
    changes = {"second": True, "ACTIVATION": activation}
    kernel = aot.update(target, case.config, "float32", "float32", form=case.form, **changes)
    assert_fits(aot.report(kernel, target), target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_variants_of_the_forward(target):
    config = aot.Case(target, "forward", "mixed", "small", "float16", "ieee", "").config
    changes = {"ACTIVATION": "silu", "written.kept": True, "SCALE_FIRST": True, "input_sumsq": True, "layer.bias": None}
    assert_fits(aot.report(aot.forward(target, config, "float16", "mixed", **changes), target), target)
    changes = {"shared": True, "input_sumsq": True, "written.unit_sums": True, "rows.is_positive": True}
    assert_fits(aot.report(aot.forward(target, config, "float16", "mixed", **changes), target), target)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_sums_over_class_groups(target, size):
    config = aot.Case(target, "forward", "half", size, "bfloat16", "ieee", "").config
    config = configs.beside_class_sums(config)
    kernel = aot.forward(target, config, "bfloat16", "half", classes=True, SLOTS=2)
    assert_fits(aot.report(kernel, target), target)


@pytest.mark.parametrize("kernel", configs.LINEAR_KERNELS)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_candidates_with_bulk_copies(kernel, target):
    """What only the tuner may choose must run as well, and read its tiles by the copy engine."""
    candidates = [config for config in tune.CANDIDATES[kernel] if config["TMA"]]
    assert len(candidates) == 3
    for config in candidates:
        options = {} if kernel == "forward" else {"form": "given"}
        compiled = getattr(aot, kernel)(target, config, "bfloat16", "half", **options)
        assert_fits(aot.report(compiled, target), target)
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", configs.CONV_KERNELS)
def test_candidates_for_convolutions(kernel):
    made = getattr(aot, kernel)
    shipped = [entry["config"] for entry in configs.find("sm_90")[kernel]["half"]]
    for config in (config for config in tune.CANDIDATES[kernel] if config not in shipped):
        compiled = made("sm_90", config, "bfloat16", aot.CONV_SHAPES["large"], **aot.CONV_FORMS["maximum"])
        assert_fits(aot.report(compiled, "sm_90"), "sm_90")


# Few inputs, whose columns lie one behind the other; groups; places of several images in a block; steps and no padding.
CONVOLUTIONS = {
    "few inputs": aot.conv_shape(3, 32, 28),
    "groups": aot.conv_shape(8, 8, 16, groups=10),
    "small maps": aot.conv_shape(64, 64, 4),
    "steps": aot.conv_shape(48, 96, 15, stride=2, pad=0),
    "1 x 1": aot.conv_shape(64, 128, 14, kernel=1, pad=0),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_other_shapes(name):
    target = "gfx942" if name in ("groups", "small maps") else "sm_90"
    changes = {"pool": "max", "ACTIVATION": "silu", "images.scale": True}
    for kernel in configs.CONV_KERNELS:
        case = aot.Case(target, kernel, "half", "small", "bfloat16", "ieee", "maximum")
        made = getattr(aot, kernel)(target, case.config, "bfloat16", CONVOLUTIONS[name], **changes)
        assert_fits(aot.report(made, target), target)


def test_a_gradient_that_lies_in_memory():
    target = "sm_90"
    case = aot.Case(target, "conv_update", "half", "large", "bfloat16", "ieee", "maximum")
    absent = dict.fromkeys(("maps.p", "maps.pivot", "first", "second", "bias"))
    made = aot.conv_update(
        target, case.config, "bfloat16", aot.CONV_SHAPES["large"], **{**absent, "maps.dz": True, "parts.bias": None}
    )  # fmt: skip
    assert_fits(aot.report(made, target), target)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_small_kernels_of_convolutions(target):
    for kernel, pool in ((aot.conv.pool_kernel, "max"), (aot.conv.gradient_kernel, "average")):
        shape = aot.pooled(aot.CONV_SHAPES["small"], pool, 3, 2)
        assert_fits(aot.report(aot.of_maps(kernel, target, "bfloat16", shape), target), target)


class Launched:
    """Stands for a kernel: compiles what it is launched with, as Triton's own launch would, for a device not there."""

    def __init__(self, kernel) -> None:
        self.kernel, self.found = kernel, []

    def __getitem__(self, grid):
        return lambda **given: self.found.append(self.kernel.warmup(grid=grid, **given))


class Driver:
    """What compiling asks of a driver."""

    def get_current_target(self):
        return aot.TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


LAUNCHES = {
    "plain": ({}, {}, torch.float32),
    "no bias": ({"pool": "max", "pool_size": (2, 2), "pool_stride": (2, 2)}, {"bias": None}, torch.bfloat16),
    "overlapping": ({"pool": "max", "pool_size": (3, 3), "pool_stride": (2, 2)}, {}, torch.bfloat16),
    "nine places": (
        {"pool": "max", "pool_size": (3, 3), "pool_stride": (3, 3)},
        {"activation": "gelu"},
        torch.bfloat16,
    ),
    "by place": ({"groups": 2}, {}, torch.float32),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_convolution_compile(name, monkeypatch):
    """With the very arguments that the operators pass: what an interpreter skips, a compiler reads."""
    of_geometry, of_layer, dtype = LAUNCHES[name]
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(configs, "for_device", lambda index: configs.find("sm_90"))
    monkeypatch.setattr(aot.conv, "processors", lambda device: 132)
    kernels = {}
    for kernel in ("conv_forward", "pool", "gradient", "conv_update", "finish"):
        kernels[kernel] = Launched(getattr(aot.conv, f"{kernel}_kernel"))
        monkeypatch.setattr(aot.conv, f"{kernel}_kernel", kernels[kernel])
    geometry = Geometry(padding=(1, 1), **of_geometry)
    x = torch.zeros(70, 6, 9, 10, dtype=dtype).contiguous(memory_format=torch.channels_last)
    layer = Layer(torch.zeros(20, 6 // geometry.groups, 3, 3), torch.zeros(20), "none", 0.0, "add", "relu", dtype)
    layer = layer._replace(**of_layer)
    rows = MapRows(x, torch.zeros(70) if dtype == torch.float32 else None)
    maps = aot.conv.conv2d_forward(rows, layer, geometry, True, None)
    slopes = MapSlopes(torch.zeros(70, 20), torch.zeros(70, 1), by_place=name == "by place")
    aot.conv.conv2d_gradients_(rows, layer, geometry, maps, slopes)
    counts = {kernel: len(launched.found) for kernel, launched in kernels.items()}
    own = name in ("overlapping", "nine places")
    in_memory = name in ("overlapping", "by place")
    assert counts == {
        "conv_forward": 2, "pool": 2 * own, "gradient": int(in_memory), "conv_update": 1, "finish": 1
    }  # fmt: skip
    for launched in kernels.values():
        for kernel in launched.found:
            assert_fits(aot.report(kernel, "sm_90"), "sm_90")


def test_the_older_amd_device():
    """gfx90a runs on the configurations of gfx942."""
    for kernel in configs.CONV_KERNELS:
        case = aot.Case("gfx942", kernel, "half", "large", "bfloat16", "ieee", "")
        made = getattr(aot, kernel)("gfx90a", case.config, "bfloat16", aot.CONV_SHAPES["large"], pool="max")
        found = aot.report(made, "gfx90a")
        assert found.shared <= aot.SHARED_LIMIT["gfx942"] and found.products > 0
    for kernel in configs.LINEAR_KERNELS:
        for size in ("small", "large"):
            case = aot.Case("gfx942", kernel, "half", size, "bfloat16", "ieee", "")
            options = {} if kernel == "forward" else {"form": "on the fly"}
            found = aot.report(getattr(aot, kernel)("gfx90a", case.config, "bfloat16", "half", **options), "gfx90a")
            assert found.shared <= aot.SHARED_LIMIT["gfx942"] and found.products > 0


@pytest.mark.parametrize("integers", [1, "i64"])
@pytest.mark.parametrize("form", aot.FORMS)
def test_sizes_and_strides_of_other_types(integers, form):
    """One row, one column, one of everything; and strides beyond 2^31."""
    case = aot.Case("sm_90", "update", "mixed", "small", "float16", "ieee", form)
    aot.update("sm_90", case.config, "float16", "mixed", form=form, integers=integers, SCALE_X=True)
    if form == "listed":
        for kernel, given in SMALL.values():
            aot.compiled(kernel, "sm_90", given, "float32", "float32", "float32", integers)
    elif form == "on the fly":
        config = aot.Case("sm_90", "forward", "half", "small", "bfloat16", "ieee", "").config
        aot.forward("sm_90", config, "bfloat16", "half", integers=integers)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_small_kernels(target):
    for kernel, given in SMALL.values():
        compiled = aot.compiled(kernel, target, given, "float32", "float32", "float32")
        assert_fits(aot.report(compiled, target), target)
