"""The build's one switch: what is built, what is not, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = Path("ffkernels", "backends", "native")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


@pytest.fixture
def build(tmp_path):
    """Runs a build command with some environment, in a copy of what a build needs."""
    for name in ("ffkernels", "csrc"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "build.json", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    run.folder = tmp_path
    return run


def record(build) -> dict[str, str]:
    return json.loads((build.folder / "out" / NATIVE / "build.json").read_text())


def test_off_builds_nothing_and_says_so(build):
    assert build("build_ext", "--build-lib", "out", FFKERNELS_BUILD="off").returncode == 0
    assert record(build) == {"reason": "FFKERNELS_BUILD=off"}
    assert not list((build.folder / "out").rglob("*.so"))


def test_auto_never_fails_and_forced_fails_loudly(build):
    broken = build.folder / "compiler"
    broken.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    broken.chmod(0o755)
    assert build("build_ext", "--build-lib", "out", CXX=str(broken)).returncode == 0
    assert record(build) == {"reason": "compiler failed: no such instruction"}
    forced = build("build_ext", "--build-lib", "out", CXX=str(broken), FFKERNELS_BUILD="cpu")
    assert forced.returncode != 0
    assert "FFKERNELS_BUILD=cpu, but the library cannot be built: compiler failed: no such instruction" in forced.stderr


def test_an_unknown_switch_is_refused(build):
    done = build("build_ext", "--build-lib", "out", FFKERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert "FFKERNELS_BUILD='gpu' is not one of 'auto', 'off', 'cpu'" in done.stderr


def test_the_wheel_is_pure_where_nothing_is_built(build):
    done = build("bdist_wheel", "--dist-dir", "out", FFKERNELS_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert [path.name.split("-", 2)[2] for path in (build.folder / "out").glob("*.whl")] == ["py3-none-any.whl"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_one_wheel_for_every_python(build):
    done = build("bdist_wheel", "--dist-dir", "out", FFKERNELS_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    (name,) = [path.name.split("-", 2)[2] for path in (build.folder / "out").glob("*.whl")]
    assert name.startswith("py3-none-") and not name.endswith("any.whl")
