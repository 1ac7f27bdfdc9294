"""Builds the compiled CPU library from `csrc/cpu`; everything else is described in pyproject.toml.

The library has no Python and no torch symbol in it, so one build serves every version of both, and an isolated build
can make it. FFKERNELS_BUILD says whether it is: `auto` (if unset) builds it where a C++ compiler is found and makes
a pure-Python package otherwise, `off` builds nothing, `cpu` fails where the library cannot be built. CXX names the
compiler. FFKERNELS_SANITIZE (`address,undefined` or `thread`) builds it for a sanitizer, with AMX's unit emulated.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cpu"
PACKAGE = Path("ffkernels", "backends", "native")
LIBRARY, RECORD = "libffkernels_cpu.so", "build.json"
# Each instruction set has its own copy of the kernels; which one runs is chosen where the library is loaded.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
FLAGS = [
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-pthread",
    "-Wall", "-Wextra",
]  # fmt: skip


def switch() -> str:
    """FFKERNELS_BUILD, checked."""
    value = os.environ.get("FFKERNELS_BUILD") or "auto"
    if value not in ("auto", "off", "cpu"):
        raise SystemExit(f"FFKERNELS_BUILD={value!r} is not one of 'auto', 'off', 'cpu'")
    return value


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first known one on the path."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (found := shutil.which(name))),
        None,
    )


def compile_library(into: Path) -> dict[str, str]:
    """Compiles the library to `into`; returns what to remember about it. Raises RuntimeError with the reason."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found (g++, clang++ or the one that CXX names)")
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    sanitizer = os.environ.get("FFKERNELS_SANITIZE")
    checked = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DFFK_EMULATES_MATRIX_UNIT"]
    flags = [*FLAGS, *(checked if sanitizer else [])]
    with tempfile.TemporaryDirectory() as folder:
        units = [(SOURCES / f"{name}.cpp", Path(folder, f"{name}.o"), []) for name in ("dispatch", "threads")]
        units += [
            (SOURCES / "kernels.cpp", Path(folder, f"{name}.o"), [*options, f"-DFFK_SET={name}"])
            for name, options in sets.items()
        ]
        for source, built, options in units:
            call([cxx, *flags, *options, "-c", str(source), "-o", str(built)])
        call([cxx, *flags, "-shared", *(str(built) for _, built, _ in units), "-o", str(into)])
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"compiler": version, "flags": " ".join(flags), "instruction_sets": ", ".join(sets)}


def call(command: list[str]) -> None:
    """Runs a compiler; its words are the reason if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:2000]}")


class BuildLibrary(build_ext):
    """Builds the library beside the module that loads it, or leaves a note there that says why not."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LIBRARY).unlink(missing_ok=True)
        try:
            if switch() == "off":
                raise RuntimeError("FFKERNELS_BUILD=off")
            record = compile_library(folder / LIBRARY)
        except RuntimeError as error:
            if switch() == "cpu":
                raise SystemExit(f"FFKERNELS_BUILD=cpu, but the library cannot be built: {error}") from error
            record = {"reason": str(error)}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        return [str(path) for name in (LIBRARY, RECORD) if (path := Path(self.build_lib, PACKAGE, name)).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """For any Python on this platform; for any platform where no library was built."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = switch() == "off" or compiler() is None

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build_ext").build_lib, PACKAGE, LIBRARY).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[
        Extension("ffkernels.backends.native.library", sorted(map(str, SOURCES.relative_to(ROOT).glob("*.cpp"))))
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
