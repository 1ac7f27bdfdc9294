"""What lies where the compiled library should: whole or not, a program runs on, and says on what."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ffkernels.backends.native import library, records

from .forks import loading

OWN = Path(library.__file__).parent
NAMED = bool(os.environ.get(library.VARIABLE))
BUILT = (OWN / library.NAME).is_file() and not NAMED
pytestmark = pytest.mark.skipif(not BUILT, reason="the compiled library was not built")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the folder that the library is loaded from."""
    for name in (library.NAME, library.RECORD, "library.py"):
        shutil.copy(OWN / name, tmp_path)
    return tmp_path


def said(folder: Path, **environment: str) -> list[str]:
    """What a process of its own says of the library there."""
    return loading(folder, **environment)


def edit(folder: Path, **changes: object) -> None:
    path = folder / library.RECORD
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def compile_(folder: Path, source: str) -> None:
    """Another library in its place, recorded as if it were the right one."""
    into = folder / library.NAME
    into.unlink()
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", into]
    subprocess.run(command, input=source, text=True, check=True)
    edit(folder, size=into.stat().st_size, sha256=hashlib.sha256(into.read_bytes()).hexdigest())


def test_a_whole_library_is_loaded(folder):
    assert said(folder)[0].startswith("compiled library: ")
    assert (
        said(folder)[2] == f"built with: {library.build_record(OWN)['compiler']} {library.build_record(OWN)['flags']}"
    )


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_library_is_not_mapped(folder, share):
    path = folder / library.NAME
    built = path.stat().st_size
    kept = int(built * share)
    os.truncate(path, kept)
    assert said(folder) == [
        f"the compiled library is damaged: {path} has {kept} bytes, not the {built} built: install again"
    ]
    # Named by itself and without a record, the end that its own header gives is all there is to go by.
    path.rename(folder / "other.so")
    (line,) = said(folder, FFKERNELS_LIBRARY=str(folder / "other.so"))
    assert line.startswith(f"the compiled library is damaged: {folder / 'other.so'} ends after {kept} of ")


def test_a_flipped_bit_is_noticed(folder):
    path = folder / library.NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert said(folder) == [
        f"the compiled library is damaged: {path} is not the file that build.json describes: install again"
    ]


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link", "no file"])
def test_what_is_no_file_is_neither_opened_nor_loaded(folder, kind):
    path = folder / library.NAME
    path.unlink()
    make = {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "dangling link": lambda: path.symlink_to("none")}
    make.get(kind, lambda: None)()
    assert said(folder) == [f"the compiled library cannot be loaded: {path} is not a file"]
    assert said(folder, FFKERNELS_LIBRARY=str(path)) == [f"the compiled library cannot be loaded: {path} is not a file"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"3", b"{}", b'"reason"', b"\0\1\2\xff\xfe", b"\xff" * 64, b"[" * 100_000,
        b'{"reason": 3}', b'{"size": "1", "sha256": "", "left_out": {}}', b'{"size": 1, "sha256": ""}',
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_a_damaged_record(folder, content):
    (folder / library.RECORD).write_bytes(content)
    (line,) = said(folder)
    assert line.startswith(f"the compiled library is not used: {folder / library.RECORD} ")
    assert line.endswith(": install again")
    # Another build under another name has nothing to do with it.
    shutil.copy(folder / library.NAME, folder / "other.so")
    assert said(folder, FFKERNELS_LIBRARY=str(folder / "other.so"))[0].startswith("compiled library: ")


def test_a_record_that_is_a_folder(folder):
    (folder / library.RECORD).unlink()
    (folder / library.RECORD).mkdir()
    assert "cannot be read ([Errno 21] Is a directory" in said(folder)[0]


@pytest.mark.parametrize("key", ["size", "sha256", "left_out"])
def test_a_record_that_lacks_a_key(folder, key):
    edit(folder, **{key: None})
    path = folder / library.RECORD
    assert said(folder) == [
        f"the compiled library is not used: {path} lacks what a build writes (size, sha256, left_out): install again"
    ]


def test_without_a_record(folder):
    (folder / library.RECORD).unlink()
    assert said(folder)[2:] == ["built with: unknown"]
    (folder / library.NAME).unlink()
    assert said(folder) == ["the compiled library was not built: no build was tried"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    "missing", ["ffk_interface", "ffk_instruction_set", "ffk_use_threads", "ffk_linear_step", "ffk_linear_update"]
)
def test_a_missing_symbol(folder, missing):
    names = ("ffk_interface", "ffk_instruction_set", "ffk_use_threads")
    names += ("ffk_linear_forward", "ffk_linear_step", "ffk_linear_update", "ffk_maps_forward", "ffk_maps_backward")
    present = [f"int {name}() {{ return {records.interface()}; }}" for name in names if name != missing]
    compile_(folder, f'extern "C" {{ {" ".join(present)} }}')
    assert said(folder) == [
        f"the compiled library cannot be loaded: {folder / library.NAME}: undefined symbol: {missing}"
    ]


@pytest.mark.parametrize(("at", "byte"), [(4, 1), (18, 0xF3)], ids=["32 bits", "RISC-V"])
def test_a_library_of_another_architecture(folder, at, byte):
    path = folder / library.NAME
    content = bytearray(path.read_bytes())
    content[at] = byte
    path.write_bytes(content)
    edit(folder, sha256=hashlib.sha256(content).hexdigest())
    assert said(folder)[0].startswith(f"the compiled library cannot be loaded: {path}: ")


def test_a_program_goes_on_without_it(folder):
    """All of the package beside a truncated library: the same step, on the PyTorch backend."""
    package = folder / "ffkernels"
    shutil.copytree(OWN.parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    os.truncate(package / "backends" / "native" / library.NAME, 200_000)
    code = """if True:
        import torch, ffkernels as ff
        from ffkernels import cli
        w = torch.nn.Parameter(torch.full((1, 2), 0.5))
        optimizer = torch.optim.SGD([w], lr=0.0)
        result = ff.linear_step_(torch.ones(1, 2), torch.zeros(1, 2), w, None, optimizer, norm="none")
        print(result.pos.tolist(), result.neg.tolist())
        cli.main(["info"])
    """
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[[1.0]] [[0.0]]"
    path, built = package / "backends" / "native" / library.NAME, library.build_record(OWN)["size"]
    reason = f"the compiled library is damaged: {path} has 200000 bytes, not the {built} built: install again"
    assert f"native: {reason}" in done.stdout.splitlines()


def test_the_reason_is_looked_for_once(monkeypatch):
    assert isinstance(library.load().library, ctypes.CDLL)
    monkeypatch.setattr(library, "build_record", None)
    assert isinstance(library.load().library, ctypes.CDLL)
