"""What a time depends on: processor or GPU, threads, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ffkernels.backends import select

ROOT = Path(__file__).resolve().parents[1]
# Units that multiply bfloat16 in hardware, and how torch is asked for them.
UNITS = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}

# What has OpenMP's threads wait for each other in another way than by default.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def describe(device: str) -> dict[str, Any]:
    """Device, processor, threads, backend if forced, versions, commit, load; and the date."""
    return {
        "device": "cpu" if device == "cpu" else name_of(device),
        "cpu": name_of("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_units": bfloat16_units(),
        "backend_forced": os.environ.get(select.VARIABLE),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
        "openmp": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_"))},
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "packages": {name: _version(name) for name in ("triton", "fflib", "bioff")},
        "python": platform.python_version(),
        "date": now(),
        "commit": commit(),
    }


def in_words(about: dict[str, Any]) -> str:
    """What `describe` found, in a line: device, units for bfloat16, threads and how they wait, torch."""
    if about.get("device", "cpu") != "cpu":
        return f"{about['device']}, torch {about['torch']}"
    units = about.get("bfloat16_units", ())
    unit = (" and ".join(units) or "no bfloat16 unit") + ("" if "AMX" in units else ", no AMX")
    return f"{about['cpu']} with {unit}, {about['threads']} threads{waiting(about)}, torch {about['torch']}"


def waiting(about: dict[str, Any]) -> str:
    """How threads wait for each other, if not by default: `, OMP_WAIT_POLICY=PASSIVE` say."""
    return "".join(f", {name}={value}" for name, value in about.get("openmp", {}).items() if name in WAITING)


def name_of(device: str) -> str:
    """The GPU's name, or the processor's with its family and model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if device == "cpu" and os.access(info, os.R_OK):
        parts = (line.partition(":") for line in info.read_text("utf-8", "replace").splitlines())
        fields = {key.strip(): value.strip() for key, _, value in parts}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def bfloat16_units() -> list[str]:
    """The units of this CPU that multiply bfloat16."""
    return [name for name, check in UNITS.items() if getattr(torch.cpu, check, lambda: False)()]


def now() -> str:
    """Date and time, with the time zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit checked out here, with "+" where files differ from it; None where there is no git or it fails."""
    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def git(*arguments: str) -> str:
    """What git says of this checkout; what keeps it from that is raised."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
