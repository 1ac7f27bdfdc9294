"""The build's one switch: what is built, what is not, and what is said about it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from .forks import describe, loading
from .toy_data import toy_data, write_idx

ROOT = Path(__file__).parents[1]
NATIVE = Path("ffkernels", "backends", "native")
LIBRARY = "libffkernels_cpu.so"
SETS = {"amx": "-mamx-bf16", "avx512_bf16": "-mavx512bf16", "avx512": "-mavx512f", "avx2": "-mavx2", "baseline": "-O0"}
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set alone")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


@pytest.fixture
def build(tmp_path):
    """Runs a build command with some environment, in a copy of what a build needs."""
    for name in ("ffkernels", "csrc"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "build.json", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    run.folder = tmp_path
    return run


def record(build) -> dict:
    return json.loads((build.folder / "out" / NATIVE / "build.json").read_text())


def quick(build) -> dict[str, str]:
    """For a build in a second, of the baseline alone by a compiler that is told last not to optimise."""
    return {"CXX": old_compiler(build.folder / "quick", "-m*"), "CXXFLAGS": "-O0", "FFKERNELS_BUILD": "cpu"}


def compile_(build, **environment: str) -> subprocess.CompletedProcess[str]:
    return build("build_ext", "--build-lib", "out", **{**quick(build), **environment})


def program(path: Path, script: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def old_compiler(path: Path, *unknown: str) -> str:
    """g++ as it was before it knew some options."""
    return program(
        path,
        f"""for word; do case "$word" in {"|".join(unknown)})
        echo "g++: error: unrecognized command line option '$word'" >&2; exit 1;; esac; done
        exec g++ "$@\"""",
    )


def info(build, ask: Callable[[ModuleType], list[str]] = describe) -> list[str]:
    """What a process of its own says of the library that was built."""
    return loading(build.folder, NATIVE, ask, FFKERNELS_LIBRARY=str(Path("out", NATIVE, LIBRARY)))


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


def test_the_wheel_trains_and_says_what_needs_the_checkout(build):
    assert build("bdist_wheel", "--dist-dir", "out", FFKERNELS_BUILD="off").returncode == 0
    (wheel,) = (build.folder / "out").glob("*.whl")
    shutil.unpack_archive(wheel, build.folder / "unpacked", "zip")
    (installed,) = (path.parent.parent for path in (build.folder / "unpacked").rglob("ffkernels/__init__.py"))
    assert [path.name for path in installed.iterdir()] == ["ffkernels"]
    write_idx(build.folder / "toy", toy_data(100, 50))

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=build.folder, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True,
        )  # fmt: skip

    shutil.rmtree(build.folder / "ffkernels")
    listed = command("-m", "ffkernels", "--help").stdout
    assert "train" in listed and not any(name in listed for name in ("bench", "paper", "reproduce"))
    absent = (["bench", "--list"], ["paper", "tables"], ["reproduce", "quick"])
    wrong = (*absent, ["train", "--data", "mnist", "--epochs", "0"])
    done = command("-c", f"from ffkernels import cli; print(*(cli.main(words) for words in {wrong}))")
    assert done.stdout.split() == ["2"] * len(wrong), done.stderr
    *refused, found = done.stderr.splitlines()
    assert refused == [
        f"python -m ffkernels: {name} is not part of the installed package: run this in a checkout of the repository"
        for name, *_ in absent
    ]
    done = command("-m", "ffkernels", "train", "--data", "toy", "--epochs", "1", "--no-picture", "--device", "cpu")
    assert done.returncode == 0 and "quick (784-500-500) on toy" in done.stdout, done.stderr
    # What the extra `mnist` installs is read: only the epochs are wrong.
    missing = not all(map(importlib.util.find_spec, ("pureml", "numcodecs")))
    assert ("mnist: not found" if missing else "epochs=0 is not at least 1") in found


@needs_gcc
def test_one_wheel_for_every_python(build):
    done = build("bdist_wheel", "--dist-dir", "out", **quick(build))
    assert done.returncode == 0, done.stderr
    (name,) = [path.name.split("-", 2)[2] for path in (build.folder / "out").glob("*.whl")]
    assert name.startswith("py3-none-") and not name.endswith("any.whl")


@needs_gcc
def test_the_record_describes_the_library(build):
    assert compile_(build, CXX="g++").returncode == 0
    content = (build.folder / "out" / NATIVE / LIBRARY).read_bytes()
    written = record(build)
    assert (written["size"], written["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    known = [name for name, option in SETS.items() if knows(option)]
    assert written["instruction_sets"].split(", ") == (known if platform.machine() == "x86_64" else ["baseline"])
    assert sorted(path.name for path in (build.folder / "out" / NATIVE).iterdir()) == ["build.json", LIBRARY]
    assert not any("other sources" in line for line in info(build))
    (build.folder / "csrc" / "cpu" / "rules.h").open("a").write("// changed\n")
    assert info(build)[-1].startswith("built from other sources than those in ")


def knows(option: str) -> bool:
    """Whether g++ accepts an option for an empty file."""
    command = ["g++", option, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@needs_gcc
@on_x86
@pytest.mark.parametrize(
    ("unknown", "left"),
    [
        (["-mamx-tile", "-mamx-bf16"], "avx512_bf16, avx512, avx2, baseline"),  # g++ 10
        (["-mamx-tile", "-mamx-bf16", "-mavx512bf16"], "avx512, avx2, baseline"),  # g++ 9
        (["-mavx512f"], "avx2, baseline"),
        (["-m*"], "baseline"),
    ],
)
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out_alone(build, unknown, left):
    done = compile_(build, CXX=old_compiler(build.folder / "old", *unknown))
    assert done.returncode == 0, done.stderr
    written = record(build)
    assert written["instruction_sets"] == left
    missing = [name for name in SETS if name not in left.split(", ")]
    assert list(written["left_out"]) == missing
    for name in missing:
        assert "unrecognized command line option '-m" in written["left_out"][name]
        assert f"has no kernels for {name}: old failed: g++: error: unrecognized" in done.stderr
    lines = info(build)
    assert lines[0].split()[2] in left.split(", ")
    assert [line for line in lines if line.startswith("left out: ")] == [
        f"left out: {name} ({why})" for name, why in written["left_out"].items()
    ]
    assert info(build, lambda library: [str(library.load().library.ffk_limit(name.encode())) for name in missing]) == (
        ["1"] * len(missing)
    )


@needs_gcc
@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("{g++} -DFIRST", "-DFIRST"),
        ("{cache} {g++}", "{g++}"),
        ("'{cache}' '{g++}' \"-DTWO WORDS\"", "{g++}"),
        ("{spaced}", "-std"),
    ],
)
def test_the_compiler_may_be_a_command_of_several_words(build, command, first):
    names = {
        "g++": old_compiler(build.folder / "old", "-m*"),
        "cache": program(build.folder / "cache", 'exec "$@"'),
        "spaced": program(build.folder / "with spaces" / "g++", 'exec g++ "$@"'),
    }
    done = compile_(build, CXX=command.format(**names))
    assert done.returncode == 0, done.stderr
    assert record(build)["flags"].startswith(first.format(**names))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/nowhere/g++", "CXX='/nowhere/g++': there is no program '/nowhere/g++'"),
        ("g+++ -m64", "CXX='g+++ -m64': there is no program 'g+++'"),
        ("g++ 'open", 'CXX="g++ \'open" cannot be split into words: No closing quotation'),
    ],
)
def test_a_compiler_that_is_not_there_is_told_and_not_replaced(build, command, said):
    assert compile_(build, FFKERNELS_BUILD="auto", CXX=command).returncode == 0
    assert record(build) == {"reason": said}
    forced = compile_(build, CXX=command)
    assert forced.returncode != 0
    assert f"FFKERNELS_BUILD=cpu, but the library cannot be built: {said}" in forced.stderr
    wheel = build("bdist_wheel", "--dist-dir", "out", CXX=command)
    assert wheel.returncode == 0, wheel.stderr
    assert [path.name.split("-", 2)[2] for path in (build.folder / "out").glob("*.whl")] == ["py3-none-any.whl"]


@needs_gcc
def test_the_users_options_reach_every_unit_and_the_linker(build):
    log = build.folder / "log"
    old = old_compiler(build.folder / "old", "-m*")
    logging = program(build.folder / "logging", f'echo "$@" >> {log}; exec {old} "$@"')
    done = compile_(build, CXX=logging, CPPFLAGS="-DONE=1", CXXFLAGS="-O0 '-DTWO=\"b c\"'", LDFLAGS="-Wl,-z,now")
    assert done.returncode == 0, done.stderr
    *units, link, version = log.read_text().splitlines()
    assert version == "--version"
    for unit in units:
        words = unit.split()
        assert words.index("-O3") < words.index("-DONE=1") < words.index("-O0") < words.index("-c")
        assert '-DTWO="b c"' in unit
    assert "-Wl,-z,now" in link and not any("-z,now" in unit for unit in units)
    assert "-O0" in record(build)["flags"] and "-Wl,-z,now" in record(build)["flags"]


@pytest.mark.parametrize("script", ["printf 'kaputt: \\374\\377' >&2; exit 1", "kill -9 $$"])
def test_whatever_a_compiler_says_when_it_fails_is_a_reason(build, script):
    assert compile_(build, FFKERNELS_BUILD="auto", CXX=program(build.folder / "cc", script), LC_ALL="C").returncode == 0
    assert record(build)["reason"] in ("cc failed: kaputt: \ufffd\ufffd", "cc failed: exit status -9")


@needs_gcc
def test_no_room_for_temporary_files_is_a_reason(build):
    broken = "import tempfile; tempfile.TemporaryDirectory = lambda: open('/nowhere/at/all')"
    (build.folder / "sitecustomize.py").write_text(broken)
    done = compile_(build, FFKERNELS_BUILD="auto", PYTHONPATH=str(build.folder))
    assert done.returncode == 0, done.stderr
    assert record(build) == {"reason": "[Errno 2] No such file or directory: '/nowhere/at/all'"}


@needs_gcc
def test_a_build_that_fails_by_force_leaves_the_library_that_was_there(build):
    assert compile_(build).returncode == 0
    before = record(build), info(build)
    assert compile_(build, CXX="/nowhere/g++").returncode != 0
    assert (record(build), info(build)) == before
    assert compile_(build, CXX="/nowhere/g++", FFKERNELS_BUILD="auto").returncode == 0
    assert not (build.folder / "out" / NATIVE / LIBRARY).exists()


@needs_gcc
def test_two_builds_at_once_leave_a_library_and_its_own_record(build):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    environment = {**os.environ, **quick(build)}
    others = [
        subprocess.Popen(command, cwd=build.folder, env={**environment, "CXXFLAGS": flags})
        for flags in ("-O0", "-O0 -g")
    ]
    assert [other.wait() for other in others] == [0, 0]
    assert info(build)[0].startswith("compiled library: ")
    assert sorted(path.name for path in (build.folder / "out" / NATIVE).iterdir()) == ["build.json", LIBRARY]


@needs_gcc
def test_in_place_only_what_has_changed_is_built(build):
    folder = build.folder / NATIVE

    def made(**environment: str) -> int:
        done = build("build_ext", "--inplace", **{**quick(build), **environment})
        assert done.returncode == 0, done.stderr
        content = (folder / LIBRARY).read_bytes()
        assert json.loads((folder / "build.json").read_text())["sha256"] == hashlib.sha256(content).hexdigest()
        return (folder / LIBRARY).stat().st_mtime_ns

    first = made()
    assert made() == first
    of_other_options = made(CXXFLAGS="-O0 -g")
    assert of_other_options != first
    (folder / LIBRARY).write_bytes(b"damaged")
    again = made(CXXFLAGS="-O0 -g")
    source = build.folder / "csrc" / "cpu" / "threads.cpp"
    source.write_text(source.read_text() + "// another\n")
    assert made(CXXFLAGS="-O0 -g") != again
    (folder / "build.json").write_text("{")
    made()


def test_a_build_that_is_killed_leaves_nothing_half_made(build):
    folder = build.folder / "out" / NATIVE
    folder.mkdir(parents=True)
    (folder / LIBRARY).write_text("the old one")
    slow = program(build.folder / "slow", f"touch {build.folder}/started; sleep 60")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    environment = {**os.environ, "CXX": slow, "TMPDIR": str(build.folder)}
    killed = subprocess.Popen(command, cwd=build.folder, env=environment, start_new_session=True)
    while not (build.folder / "started").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(LIBRARY, "the old one")]


@needs_gcc
def test_from_a_source_distribution_to_a_wheel(build):
    """What sdist packs is enough to build from."""
    assert build("sdist", "--dist-dir", "out").returncode == 0
    (archive,) = (build.folder / "out").glob("*.tar.gz")
    shutil.unpack_archive(archive, build.folder / "unpacked")
    (source,) = (build.folder / "unpacked").iterdir()
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", build.folder / "wheel"]
    environment = {**os.environ, **quick(build)}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (build.folder / "wheel").iterdir()
    shutil.unpack_archive(wheel, build.folder / "out", "zip")
    assert info(build)[0].startswith("compiled library: ")
