"""Builds the compiled CPU library from `csrc/cpu`; everything else is described in pyproject.toml.

The library has no Python and no torch symbol in it, so one build serves every version of both, and an isolated build
can make it. FFKERNELS_BUILD says whether it is: `auto` (if unset) builds it where a C++ compiler is found and makes
a pure-Python package otherwise, `off` builds nothing, `cpu` fails where the library cannot be built. CXX names the
compiler and may have options; CPPFLAGS, CXXFLAGS and LDFLAGS come after this file's own. FFKERNELS_SANITIZE
(`address,undefined` or `thread`) builds it for a sanitizer, with AMX's unit emulated on any CPU that has AVX2.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cpu"
PACKAGE = Path("ffkernels", "backends", "native")
LIBRARY, RECORD = "libffkernels_cpu.so", "build.json"
# Each instruction set has its own copy of the kernels; which one runs is chosen where the library is loaded. One that
# the compiler or its assembler does not know is left out alone.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
OF_AARCH64 = {"neon_bf16": ["-march=armv8.2-a+bf16"], "baseline": []}
# Vectors of AVX-512's length are passed around inside one file alone, where their ABI is nobody's concern.
EMULATED_AMX = ["-mavx2", "-mfma", "-Wno-psabi", "-DFFK_EMULATES_MATRIX_UNIT"]
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


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, or the first known one on the path. Raises RuntimeError where it is not."""
    asked = os.environ.get("CXX", "").strip()
    if not asked:
        known = [found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))]
        if not known:
            raise RuntimeError("no C++ compiler was found (g++, clang++ or the one that CXX names)")
        return known[:1]
    # A path may have spaces; what names no program as it stands is a program and its options, as a shell reads them.
    command = [asked] if shutil.which(asked) else words("CXX")
    program = shutil.which(command[0])
    if program is None:
        raise RuntimeError(f"CXX={asked!r}: there is no program {command[0]!r}")
    return [program, *command[1:]]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """The copies of the kernels for an architecture, and the options of each."""
    if machine not in ("x86_64", "AMD64"):
        return OF_AARCH64 if machine == "aarch64" else {"baseline": []}
    return INSTRUCTION_SETS | ({"amx": EMULATED_AMX} if os.environ.get("FFKERNELS_SANITIZE") else {})


def has_compiler() -> bool:
    """Whether a build can be tried."""
    try:
        return bool(compiler())
    except RuntimeError:
        return False


def words(variable: str) -> list[str]:
    """An environment variable, split as a shell splits it."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise RuntimeError(f"{variable}={os.environ[variable]!r} cannot be split into words: {error}") from error


class Command(NamedTuple):
    """How this build compiles and links.

    Attributes:
        cxx: the compiler, and options that came with its name.
        flags, of_user, of_linker: this file's own, and those of the environment.
    """

    cxx: list[str]
    flags: list[str]
    of_user: list[str]
    of_linker: list[str]

    def record(self) -> dict[str, Any]:
        """What a library is made by; with the same it would be the same."""
        return {
            "compiler": (call([*self.cxx, "--version"]).splitlines() or ["unknown"])[0],
            "flags": " ".join([*self.cxx[1:], *self.flags, *self.of_user, *self.of_linker]),
            "sources": digest_of_sources(),
            "setup": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        }


def build_command() -> Command:
    """That of this environment. Raises RuntimeError with the reason why there is none."""
    sanitizer = os.environ.get("FFKERNELS_SANITIZE")
    checked = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags = [*FLAGS, *(checked if sanitizer else [])]
    return Command(compiler(), flags, [*words("CPPFLAGS"), *words("CXXFLAGS")], words("LDFLAGS"))


def compile_library(of: Command, folder: Path) -> dict[str, Any]:
    """Compiles the library in `folder`; returns what to remember about it. Raises RuntimeError with the reason."""
    sets = instruction_sets(platform.machine())

    def unit(source: str, name: str, options: list[str]) -> str:
        made = str(folder / f"{name}.o")
        call([*of.cxx, *of.flags, *options, *of.of_user, "-c", str(SOURCES / source), "-o", made])
        return made

    built, left_out = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        units = {
            name: pool.submit(unit, "kernels.cpp", name, [*options, f"-DFFK_SET={name}"])
            for name, options in sets.items()
        }
        for name, made in units.items():
            try:
                built[name] = made.result()
            except RuntimeError as error:
                if not sets[name]:
                    raise
                lines = str(error).splitlines()
                left_out[name] = next((line for line in lines if "error" in line), lines[0])
    has = [f"-DFFK_HAS_{name.upper()}" for name in built]
    has += [option for option in sets.get("amx", []) if "EMULATES" in option]
    objects = [unit("dispatch.cpp", "dispatch", has), unit("threads.cpp", "threads", []), *built.values()]
    call([*of.cxx, *of.flags, *of.of_user, "-shared", *of.of_linker, *objects, "-o", str(folder / LIBRARY)])
    library = (folder / LIBRARY).read_bytes()
    return {
        **of.record(),
        "instruction_sets": ", ".join(built),
        "left_out": left_out,
        "size": len(library),
        "sha256": hashlib.sha256(library).hexdigest(),
    }


def is_made(of: Command, folder: Path) -> bool:
    """Whether the library in `folder` is what this build would make."""
    try:
        record, library = json.loads((folder / RECORD).read_bytes()), (folder / LIBRARY).read_bytes()
    except (OSError, ValueError):
        return False
    of_library = {"size": len(library), "sha256": hashlib.sha256(library).hexdigest()}
    return isinstance(record, dict) and record.items() >= (of.record() | of_library).items()


def digest_of_sources() -> str:
    """By which `python -m ffkernels info` knows that a checkout's sources have changed since."""
    paths = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def call(command: list[str]) -> str:
    """Runs a compiler; returns what it prints, and its words are the reason if it fails."""
    # Its messages are in the encoding of a locale that need not be this process's.
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[:2000] or f"exit status {done.returncode}"
        raise RuntimeError(f"{Path(command[0]).name} failed: {said}")
    return done.stdout


def put(content: bytes, path: Path) -> None:
    """Under another name until it is whole: nobody loads half a library, and who has mapped the old one keeps it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the system can: the library and the record of one build lie side by side."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class BuildLibrary(build_ext):
    """Builds the library beside the module that loads it, or leaves a note there that says why not."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if switch() == "off":
                raise RuntimeError("FFKERNELS_BUILD=off")
            of = build_command()
            if in_place and is_made(of, folder):
                return
            with tempfile.TemporaryDirectory() as temporary:
                record = compile_library(of, Path(temporary))
                library = Path(temporary, LIBRARY).read_bytes()
        except (RuntimeError, OSError) as error:
            if switch() == "cpu":
                raise SystemExit(f"FFKERNELS_BUILD=cpu, but the library cannot be built: {error}") from error
            record = {"reason": str(error)}
        with alone(folder):
            if "reason" in record:
                (folder / LIBRARY).unlink(missing_ok=True)
            else:
                put(library, folder / LIBRARY)
            put(json.dumps(record, indent=1).encode() + b"\n", folder / RECORD)
        if "reason" in record:
            self.warn(f"the compiled library was not built: {record['reason']}")
        for name, reason in record.get("left_out", {}).items():
            self.warn(f"the compiled library has no kernels for {name}: {reason}")

    def get_outputs(self) -> list[str]:
        return [str(path) for name in (LIBRARY, RECORD) if (path := Path(self.build_lib, PACKAGE, name)).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """For any Python on this platform; for any platform where no library was built."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = switch() == "off" or not has_compiler()

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build_ext").build_lib, PACKAGE, LIBRARY).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[
        Extension("ffkernels.backends.native.library", sorted(map(str, SOURCES.relative_to(ROOT).glob("*.cpp"))))
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
