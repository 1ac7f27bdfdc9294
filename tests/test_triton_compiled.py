"""The kernels as compiled for devices that need not be there: they fit, use the matrix units, and spill nothing.

Every shipped configuration is in the table of `triton_aot.py`. Compiling them all takes minutes, which `make nightly`
spends (`FFKERNELS_AOT=all`); otherwise the configurations of sm_90 are compiled in bfloat16 and TF32, and of every
other device the ones for large shapes.
"""

from __future__ import annotations

import json
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ffkernels.backends.triton import configs, launch, tune  # noqa: E402

from . import triton_aot as aot  # noqa: E402

TABLE = json.loads(aot.TABLE.read_text())
SAME_COMPILER = TABLE["triton"].split(".")[:2] == triton.__version__.split(".")[:2]


def chosen(case: aot.Case) -> bool:
    if os.environ.get("FFKERNELS_AOT") == "all":
        return True
    no_tf32 = case.target == "gfx942" and case.kind == "float32"
    usual = case.compute == "bfloat16" or case.precision == "tf32" or no_tf32
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
    if case.target == "sm_90" and case.compute == "bfloat16":
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


@pytest.mark.parametrize("kernel", configs.KERNELS)
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


def test_the_older_amd_device():
    """gfx90a runs on the configurations of gfx942."""
    for kernel in configs.KERNELS:
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
