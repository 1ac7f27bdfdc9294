"""How memory is given out, and the most that a step has at once beyond what was there before it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler's own messages, two for each measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


# What mallopt calls them: how many pieces may come straight from the system, and what goes back to it (-1: nothing).
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}


def keep_freed_memory() -> bool:
    """Has the C library (glibc) keep what is freed for the next step; whether it does.

    Else it depends on what happens to lie at the end of the heap whether a step gets its gradients back from the system
    page by page each time, and that luck lasts as long as the process; pieces of 32 MB and more always come that way.
    """
    try:
        return all(ctypes.CDLL(None).mallopt(parameter, value) for parameter, value in KEPT.items())
    except (OSError, AttributeError):
        return False


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Bytes at the peak of `work`, less those at its start.

    On a CPU these are tensors: every allocation and release that torch's allocator reports, in order. Scratch that a
    library takes from the system by itself is not seen, nor what the system holds back.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results = profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def resident_rise(work: Callable[[], object]) -> int | None:
    """How far `work` raises the memory that the process has from the system, at its peak; None if that cannot be told.

    Whoever allocates is seen, in whole pages, but not what a library keeps from one step to the next: that was there
    before.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what there is now
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(field: str) -> int:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int({key: value for key, _, value in lines}[field].split()[0]) * 1024
