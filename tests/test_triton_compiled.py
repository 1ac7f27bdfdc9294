"""The kernels as compiled for devices that need not be there: they fit, use the matrix units, and spill nothing.

Every shipped configuration is in the table of `triton_aot.py`. Compiling them all takes minutes, so that is left to
`FFKERNELS_AOT=all`; otherwise the configurations of sm_90 are compiled in bfloat16 and TF32, and of every other device
the ones for large shapes.
"""

from __future__ import annotations

import json
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ffkernels.backends.triton import launch  # noqa: E402

from . import triton_aot as aot  # noqa: E402

TABLE = json.loads(aot.TABLE.read_text())
SAME_COMPILER = TABLE["triton"].split(".")[:2] == triton.__version__.split(".")[:2]


def chosen(case: aot.Case) -> bool:
    if os.environ.get("FFKERNELS_AOT") == "all":
        return True
    no_tf32 = case.target == "gfx942" and case.kind == "float32"
    usual = case.compute == "bfloat16" or case.precision == "tf32" or no_tf32
    form = case.kernel == "forward" or case.listed == (case.size == "large")
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
    "sgd": {"RULE": "sgd", "weight_state1": None, "bias_state1": None},
    "gradient only": {"RULE": "grad", "weight_state1": None, "bias_state1": None},
    "split": {"partial_weight": True, "partial_bias": True},
    "no bias, no norm": {"HAS_BIAS": False, "bias": None, "row_scale": None},
    "many column blocks": {"PARTIALS": 64},
    "gelu, pairs": {"ACTIVATION": "gelu", "LOSS": "symba", "GOODNESS": "norm"},
    "everything on the device": {
        "weight_lr_pointer": True, "weight_step_pointer": True, "bias_lr_pointer": True, "bias_step_pointer": True,
        "is_positive": True, "n_positive": True, "sample_weight": True, "threshold": True,
    },
}  # fmt: skip

LISTING = {"num_warps": 8, "BLOCK": launch.LIST_BLOCK[False]}
SYMBA = {"GOODNESS": "norm", "LOSS": "symba", "THRESHOLD_PER_ROW": True}
FINISH = {"num_warps": 4, **launch.FINISH_BLOCK[False]}
ADAM = {
    "RULE": "adam", "HAS_BIAS": True, "weight_lr_pointer": None, "weight_step_pointer": None, "bias_lr_pointer": None,
    "bias_step_pointer": None,
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_update(name, target):
    case = aot.Case(target, "update", "half", "small", "bfloat16", "ieee", False)
    kernel = aot.update(target, case.config, "bfloat16", "half", listed=False, **VARIANTS[name])
    assert_fits(aot.report(kernel, target), target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_variants_of_the_forward(target):
    config = aot.Case(target, "forward", "mixed", "small", "float16", "ieee", False).config
    changes = {"ACTIVATION": "silu", "kept": True, "SCALE_FIRST": True, "input_sumsq": True, "bias": None}
    assert_fits(aot.report(aot.forward(target, config, "float16", "mixed", **changes), target), target)


@pytest.mark.parametrize("integers", [1, "i64"])
@pytest.mark.parametrize("listed", [False, True])
def test_sizes_and_strides_of_other_types(integers, listed):
    """One row, one column, one of everything; and strides beyond 2^31."""
    case = aot.Case("sm_90", "update", "mixed", "small", "float16", "ieee", listed)
    aot.update("sm_90", case.config, "float16", "mixed", listed=listed, integers=integers, SCALE_X=True)
    if listed:
        aot.compiled(launch.coefficient_kernel, "sm_90", LISTING, "float32", "float32", "float32", integers, **SYMBA)
        aot.compiled(launch.finish_kernel, "sm_90", FINISH, "float32", "float32", "float32", integers, **ADAM)
    else:
        config = aot.Case("sm_90", "forward", "half", "small", "bfloat16", "ieee", False).config
        aot.forward("sm_90", config, "bfloat16", "half", integers=integers)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_small_kernels(target):
    listing = aot.compiled(launch.coefficient_kernel, target, LISTING, "float32", "float32", "float32", **SYMBA)
    finish = aot.compiled(launch.finish_kernel, target, FINISH, "float32", "float32", "float32", **ADAM)
    for kernel in (listing, finish):
        assert_fits(aot.report(kernel, target), target)
