"""Finds and loads the compiled library, or says why there is none."""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

NAME = "libffkernels_cpu.so"
RECORD = "build.json"
# Another build of the library than that of this installation: one with a sanitizer, say.
VARIABLE = "FFKERNELS_LIBRARY"
INTERFACE = 4
# What multiplies bfloat16 numbers, by instruction set; the others multiply rounded float32 ones.
BFLOAT16_UNITS = {"amx": "AMX's tiles", "avx512_bf16": "AVX512-BF16's pairs"}


class Update(ctypes.Structure):
    """csrc/cpu/interface.h, Update."""

    _fields_ = [
        ("state", ctypes.c_void_p * 3),
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_int32) for name in ("nesterov", "maximize", "first_step", "decoupled")),
    ]


class Call(ctypes.Structure):
    """csrc/cpu/interface.h, Call."""

    _fields_ = [
        ("x", ctypes.c_void_p * 2),
        ("rows", ctypes.c_int64 * 2),
        ("x_stride", ctypes.c_int64 * 2),
        ("in_", ctypes.c_int64),
        ("out", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "input_sumsq", "weight", "bias", "y", "sumsq", "is_positive", "sample_weight", "threshold", "loss",
                "peer_mean",
            )
        ),
        *(
            (name, ctypes.c_double)
            for name in (
                "eps", "threshold_pos", "threshold_neg", "temperature", "alpha", "skip_below", "peer_strength",
                "peer_momentum",
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "x_bfloat16", "bfloat16", "norm", "eps_mode", "activation", "goodness", "loss_kind", "maximize",
                "reduction", "threshold_is_one", "rule", "threads",
            )
        ),
        ("weight_update", Update),
        ("bias_update", Update),
    ]  # fmt: skip


class Loaded(NamedTuple):
    """The library, or None and the reason."""

    library: ctypes.CDLL | None
    reason: str


@cache
def load() -> Loaded:
    """The compiled library of this installation; looked for once."""
    path = Path(os.environ.get(VARIABLE) or Path(__file__).parent / NAME).absolute()
    if not path.exists():
        return Loaded(None, f"the compiled library was not built: {build_record().get('reason', 'no build was tried')}")
    try:
        library = ctypes.CDLL(str(path))
        found = library.ffk_interface()
    except (OSError, AttributeError) as error:
        return Loaded(None, f"the compiled library cannot be loaded: {error}")
    if found != INTERFACE:
        return Loaded(
            None,
            f"the compiled library was built from other sources (interface {found}, needed {INTERFACE}): install again",
        )
    library.ffk_instruction_set.restype = ctypes.c_char_p
    library.ffk_use_threads.argtypes = [ctypes.c_void_p]
    library.ffk_use_threads(_torchs_threads())
    for name in ("ffk_linear_forward", "ffk_linear_step"):
        getattr(library, name).argtypes = [ctypes.POINTER(Call)]
    return Loaded(library, "")


def build_record() -> dict[str, str]:
    """What the build wrote down about itself: compiler and flags, or the reason why nothing was built."""
    path = Path(__file__).parent / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def instruction_set(bfloat16: bool = False) -> str:
    """The instruction set that the loaded library uses on this CPU for float32 or for bfloat16 products."""
    library = load().library
    return "" if library is None else library.ffk_instruction_set(int(bfloat16)).decode()


def describe() -> list[str]:
    """What was built and what was loaded, as `python -m ffkernels info` prints it."""
    loaded, record = load(), build_record()
    if loaded.library is None:
        return [loaded.reason]
    threads = "torch's own threads" if _torchs_threads() else "threads of its own"
    pairs = instruction_set(bfloat16=True)
    unit = BFLOAT16_UNITS.get(pairs, "no unit: rounded, then multiplied as float32")
    lines = [
        f"compiled library: {instruction_set()} for float32, {pairs} for bfloat16 ({unit}), on {threads}",
        f"built with: {record.get('compiler', 'unknown')} {record.get('flags', '')}".rstrip(),
    ]
    if torch.cpu._is_amx_tile_supported() and pairs != "amx":
        lines.append(
            "this CPU's AMX is not used: the system does not grant its tiles, or the library has no code for it"
        )
    return lines


def _torchs_threads() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch has loaded; two would fight for cores."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None
