"""Finds and loads the compiled library, or says why there is none."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from . import records

NAME = "libffkernels_cpu.so"
RECORD = "build.json"
# Another build of the library than that of this installation: one with a sanitizer, say.
VARIABLE = "FFKERNELS_LIBRARY"
SOURCES = Path(__file__).absolute().parents[3] / "csrc" / "cpu"
# What multiplies bfloat16 numbers, by instruction set; the others multiply rounded float32 ones.
BFLOAT16_UNITS = {"amx": "AMX's tiles", "avx512_bf16": "AVX512-BF16's pairs", "neon_bf16": "BFMMLA"}


# What stands for a float32 product under `torch.set_float32_matmul_precision("high")`; the others change nothing.
HIGH = {"amx": "three bfloat16 products on AMX's tiles"}
Products = Literal["float32", "bfloat16", "high"]


class Loaded(NamedTuple):
    """The library and what its build wrote down, or None and the reason."""

    library: ctypes.CDLL | None
    reason: str
    record: dict[str, Any]


class Unusable(Exception):
    """Why there is no library to call, in words that follow "the compiled library"."""


@cache
def load() -> Loaded:
    """The compiled library of this installation; looked for once."""
    named = os.environ.get(VARIABLE)
    path = Path(named or Path(__file__).parent / NAME).absolute()
    try:
        # Beside a library under another name lies the record of something else, if any.
        record = build_record(path.parent) if path.name == NAME else {}
        if not named and "reason" in record:
            raise Unusable(f"was not built: {record['reason']}")
        if not named and not record and not os.path.lexists(path):
            raise Unusable("was not built: no build was tried")
        _check(path, record)
        return Loaded(_open(path), "", record)
    except Unusable as error:
        return Loaded(None, f"the compiled library {error}", {})


def build_record(folder: Path) -> dict[str, Any]:
    """What the build wrote down beside the library: its size and hash, compiler and flags, or the reason why there is
    none; empty where nothing was written. Raises Unusable where it cannot be read."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"is not used: {path} cannot be read ({error}): install again") from error
    built = {"size": int, "sha256": str, "left_out": dict}
    kinds = {"reason": str} if isinstance(record, dict) and "reason" in record else built
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise Unusable(f"is not used: {path} lacks what a build writes ({', '.join(kinds)}): install again")
    return record


def _check(path: Path, record: dict[str, Any]) -> None:
    """Touching a page that a mapped file lacks kills the process: nothing but a whole library is mapped."""
    try:
        if not path.is_file():
            raise Unusable(f"cannot be loaded: {path} is not a file")
        size = path.stat().st_size
        if size != record.get("size", size):
            raise Unusable(f"is damaged: {path} has {size} bytes, not the {record['size']} built: install again")
        if "sha256" in record and hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
            raise Unusable(f"is damaged: {path} is not the file that {RECORD} describes: install again")
        if size < (needed := _extent(path)):
            raise Unusable(f"is damaged: {path} ends after {size} of {needed} bytes")
    except (OSError, MemoryError) as error:
        raise Unusable(f"cannot be loaded: {error}") from error


def _extent(path: Path) -> int:
    """How many bytes a 64-bit ELF file says it has: up to the table of sections, which a linker writes last."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\2":
        return 64
    order = "<" if header[5] == 1 else ">"
    (start,) = struct.unpack_from(f"{order}Q", header, 0x28)
    size, count = struct.unpack_from(f"{order}HH", header, 0x3A)
    return start + size * count


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        found = library.ffk_interface()
        if found != (needed := records.interface()):
            raise Unusable(f"was built from other sources (interface {found}, needed {needed}): install again")
        library.ffk_instruction_set.restype = ctypes.c_char_p
        library.ffk_use_threads.argtypes = [ctypes.c_void_p]
        named = ("linear_forward", "linear_step", "linear_update", "convolution_forward", "convolution_gradient")
        for name in (f"ffk_{of}" for of in named):
            getattr(library, name).argtypes = [ctypes.c_char_p]
        library.ffk_linear_steps.argtypes = [ctypes.c_char_p, ctypes.c_int]
        for name in ("ffk_maps_forward", "ffk_maps_backward", "ffk_maps_products"):
            getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_char_p], None
        library.ffk_use_threads(_torchs_threads())
    except (OSError, AttributeError) as error:
        raise Unusable(f"cannot be loaded: {error}") from error
    return library


def instruction_set(products: Products = "float32") -> str:
    """The instruction set that the loaded library uses on this CPU for such products; "high" are those of float32 under
    `torch.set_float32_matmul_precision("high")`."""
    library = load().library
    return "" if library is None else library.ffk_instruction_set(get_args(Products).index(products)).decode()


def describe() -> list[str]:
    """What was built and what was loaded, as `python -m ffkernels info` prints it."""
    loaded = load()
    if loaded.library is None:
        return [loaded.reason]
    threads = "torch's own threads" if _torchs_threads() else "threads of its own"
    record = loaded.record
    pairs, high = instruction_set("bfloat16"), instruction_set("high")
    unit = BFLOAT16_UNITS.get(pairs, "no unit: rounded, then multiplied as float32")
    lines = [
        f"compiled library: {instruction_set()} for float32, {pairs} for bfloat16 ({unit}), on {threads}",
        f"float32 at precision 'high': {HIGH.get(high, 'as at highest')}",
        f"built with: {record.get('compiler', 'unknown')} {record.get('flags', '')}".rstrip(),
        *(f"left out: {name} ({why})" for name, why in record.get("left_out", {}).items()),
    ]
    if torch.cpu._is_amx_tile_supported() and pairs != "amx":
        lines.append(
            "this CPU's AMX is not used: the system does not grant its tiles, or the library has no code for it"
        )
    if "sources" in record and record["sources"] != (_digest_of_sources() or record["sources"]):
        lines.append(f"built from other sources than those in {SOURCES}: install again")
    return lines


def _digest_of_sources() -> str | None:
    """As setup.py forms it; None outside a checkout."""
    paths = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest() if paths else None


def _torchs_threads() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch has loaded; two would fight for cores."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None
