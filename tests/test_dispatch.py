"""The instruction set that the compiled library chooses, on machines that are made up, and what `info` says of it."""

from __future__ import annotations

import platform

import pytest
import torch

from ffkernels.backends.native import library

from . import programs

PRODUCTS = ("float32", "bfloat16", "high")
AVX2 = "avx2 fma"
AVX512 = f"{AVX2} avx512f avx512dq avx512vl avx512bw"
BF16 = f"{AVX512} avx512bf16"
AMX = f"{BF16} amx_bf16 amx_tile intel"


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    """The sets for float32, for bfloat16 and for float32 at "high" on a machine with these features."""
    if (platform.machine(), platform.system()) != ("x86_64", "Linux"):
        pytest.skip("needs x86-64 Linux")
    built = programs.compiled("dispatch", tmp_path_factory.mktemp("dispatch"))
    return lambda cpu: programs.run([built], CPU=cpu)


@pytest.mark.parametrize(
    ("cpu", "chosen"),
    [
        ("", "baseline baseline baseline"),
        ("avx2", "baseline baseline baseline"),
        (AVX2, "avx2 avx2 avx2"),
        (AVX512, "avx512 avx512 avx512"),
        (BF16, "avx512_bf16 avx512_bf16 avx512_bf16"),
        (f"{BF16} intel", "avx512 avx512 avx512"),
        (f"{AMX} granted", "avx512 amx amx"),
        (AMX, "avx512 avx512 avx512"),
        (f"{AMX} granted".replace("amx_tile", ""), "avx512 avx512 avx512"),
        (f"{AMX} granted".replace("amx_bf16", ""), "avx512 avx512 avx512"),
        # A system may hide AVX-512 and show AMX: its kernels use both.
        (f"{AVX2} amx_bf16 amx_tile intel granted", "avx2 avx2 avx2"),
    ],
)
def test_amx_is_chosen_where_cpu_and_system_grant_it(choose, cpu, chosen):
    assert choose(cpu).strip() == chosen


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        ("avx512 amx amx", "avx512 for float32, amx for bfloat16 (AMX's tiles)"),
        (
            "avx512_bf16 avx512_bf16 avx512_bf16",
            "avx512_bf16 for float32, avx512_bf16 for bfloat16 (AVX512-BF16's pairs)",
        ),
        (
            "avx2 avx2 avx2",
            "avx2 for float32, avx2 for bfloat16 (no unit: rounded, then multiplied as float32)",
        ),
    ],
)
@pytest.mark.parametrize("shown", [False, True])
def test_info_names_the_unit_for_bfloat16(monkeypatch, sets, line, shown):
    if library.load().library is None:
        pytest.skip(library.load().reason)
    monkeypatch.setattr(library, "instruction_set", lambda products="float32": sets.split()[PRODUCTS.index(products)])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: shown)
    first, high, _, *rest = library.describe()
    assert first.startswith(f"compiled library: {line}, on t")
    of_high = "three bfloat16 products on AMX's tiles" if "amx" in sets else "as at highest"
    assert high == f"float32 at precision 'high': {of_high}"
    unused = "this CPU's AMX is not used: the system does not grant its tiles, or the library has no code for it"
    assert rest == ([unused] if shown and "amx" not in sets else [])
