"""The parts of the compiled library against plain loops: the programs of `csrc/tests`, for each set of this CPU."""

from __future__ import annotations

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
}
OF_SCALARS = ("row_scale", "objective", "classes")
# Under a sanitizer AMX's unit is emulated.
EMULATED = ["amx"] if programs.SANITIZER and "avx2" in SETS and "amx" not in SETS else []
HERE = EMULATED + SETS or ["baseline"]
FOR_FLOAT32 = library.instruction_set() or "baseline"


@pytest.mark.parametrize("instruction_set", HERE)
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
