"""The parts of the compiled library against plain loops: the programs of `csrc/tests`, for each set of this CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ffkernels.backends.native import library

from . import programs
from .test_native import SETS

# Vectors differ from set to set; the others are the same code for all.
OF_VECTORS = {
    "tile": (),
    "packing": (),
    "bfloat16": (),
    "float16": (),
    "activation": (),
    "rules": (),
    "maps": ("threads.cpp",),
    "convolution": ("threads.cpp",),
    "products": ("threads.cpp", "kernels.cpp"),
}
OF_SCALARS = ("row_scale", "objective", "classes")
# Under a sanitizer AMX's unit is emulated.
EMULATED = ["amx"] if programs.SANITIZER and "avx2" in SETS and "amx" not in SETS else []
HERE = EMULATED + SETS or ["baseline"]
# Their code is the best two's, in other vectors.
NARROWER = [pytest.param(name, marks=pytest.mark.narrower) for name in HERE[2:]]
# Programs for aarch64 are run by an emulator, where a compiler for it is there too.
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
OF_AARCH64 = ("neon_bf16", "baseline")
FOR_FLOAT32 = library.instruction_set() or "baseline"


@pytest.mark.parametrize("instruction_set", [*HERE[:2], *NARROWER])
@pytest.mark.parametrize("name", OF_VECTORS)
def test_vectors(name, instruction_set, tmp_path):
    programs.run([programs.compiled(name, tmp_path, instruction_set, OF_VECTORS[name])])


@pytest.mark.parametrize("name", OF_SCALARS)
def test_scalars(name, tmp_path):
    programs.run([programs.compiled(name, tmp_path, FOR_FLOAT32)])


def test_threads(tmp_path):
    programs.run([programs.compiled("threads", tmp_path, units=("threads.cpp",))])


def test_steps_on_threads(tmp_path):
    programs.run([programs.compiled("steps", tmp_path, FOR_FLOAT32, units=("threads.cpp", "kernels.cpp"))])


def on_aarch64(cpu: str, name: str, folder: Path, instruction_set: str, units: tuple[str, ...] = ()) -> str:
    """What a program prints on an emulated CPU; skips the test where it cannot be made or run."""
    if programs.SANITIZER or not (shutil.which(CROSS) and shutil.which(EMULATOR)):
        pytest.skip(f"needs {CROSS} and {EMULATOR}, and no sanitizer")
    built = programs.compiled(name, folder, instruction_set, units, [CROSS, "-static"], "aarch64")
    return programs.run([EMULATOR, "-cpu", cpu, built])


@pytest.mark.parametrize("instruction_set", OF_AARCH64)
@pytest.mark.parametrize("name", OF_VECTORS)
def test_vectors_on_aarch64(name, instruction_set, tmp_path):
    # Of a program that asks for no more than it needs, the oldest CPU is the hardest test.
    cpu = "max" if instruction_set == "neon_bf16" else "cortex-a53"
    on_aarch64(cpu, name, tmp_path, instruction_set, OF_VECTORS[name])


@pytest.mark.parametrize(
    ("cpu", "chosen"),
    [("max", "baseline neon_bf16 baseline"), ("cortex-a72", "baseline baseline baseline")],
)
def test_aarch64_has_its_bfloat16_unit_chosen(cpu, chosen, tmp_path):
    assert on_aarch64(cpu, "dispatch", tmp_path, "baseline").strip() == chosen
