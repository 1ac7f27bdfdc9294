"""Compiles a program of `csrc/tests`, for an instruction set of its own, with the compiler and options of setup.py."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
# `address,undefined` or `thread`, as setup.py has it.
SANITIZER = os.environ.get("FFKERNELS_SANITIZE")
# What programs have in common is compiled once.
OBJECTS = tempfile.TemporaryDirectory(prefix="ffkernels-objects-")


@cache
def build() -> dict:
    """What setup.py defines."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def compiled(
    name: str,
    folder: Path,
    instruction_set: str = "baseline",
    units: tuple[str, ...] = (),
    compiler: list[str] | None = None,
    machine: str = platform.machine(),
) -> Path:
    """The program `name`, linked with these files of `csrc/cpu`. Skips the test where it cannot be made.

    `compiler`: one for another machine, whose programs are not made for a sanitizer.
    """
    if not (ROOT / "csrc" / "tests").exists():
        pytest.skip("not a checkout")
    try:
        command = compiler or build()["compiler"]()
    except RuntimeError as error:
        pytest.skip(str(error))
    checked = f"-g -fsanitize={SANITIZER} -fno-sanitize-recover=all".split() if SANITIZER and not compiler else []
    of_set = build()["instruction_sets"](machine)[instruction_set]
    options = [*build()["FLAGS"], "-O1", *of_set, f"-DFFK_SET={instruction_set}"]
    sources = [ROOT / "csrc" / "tests" / f"{name}.cpp", *(ROOT / "csrc" / "cpu" / unit for unit in units)]
    program = folder / f"{name}-{instruction_set}"
    command = [*command, *options, *checked]
    run([*command, *(object_of(source, tuple(command)) for source in sources), "-o", program])
    return program


@cache
def object_of(source: Path, command: tuple[str, ...]) -> Path:
    """The object file of a source."""
    made = Path(tempfile.mkdtemp(dir=OBJECTS.name)) / f"{source.stem}.o"
    run([*command, "-c", source, "-o", made])
    return made


def run(command: list[str | Path], **environment: str) -> str:
    """What a command prints; fails the test with it where the command does."""
    # A sanitizer that Python was started under is not a compiler's, nor a program's that has its own.
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{Path(command[0]).name}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
