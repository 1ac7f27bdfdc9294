"""In which order cases run, with whose contenders, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import Case

SHARES = {"quick": 0.4, "full": 1.0, "thorough": 4.0}  # of the time that a case is given
# What slows a shared machine for a minute meets a part of every case, and not the whole of one.
VISITS = 4
CUDA_SECONDS = 2.0  # at most: nobody else slows a GPU down, and it is lent by the minute
# (tier, with the contenders of torch.compile, which tunes for minutes on CUDA): what comes last is missed the least.
IMPORTANCE = (("quick", False), ("default", False), ("quick", True), ("all", False), ("default", True), ("all", True))


@dataclass(frozen=True)
class Job:
    """One case to measure."""

    case: Case
    compiled: bool  # with the contenders of torch.compile
    seconds: float  # of timing, in all visits


def plan(cases: Sequence[Case], effort: str, compile_all: bool) -> list[Job]:
    """The jobs for some cases, all on one device.

    On CUDA, where the time may end before the list does, the most important come first, and a case that
    `torch.compile` takes part in is measured without it before that; the second result replaces the first.
    """
    share = SHARES[effort]
    compiled = {case.name: effort != "quick" and (case.compiled or compile_all) for case in cases}
    if not any(case.device == "cuda" for case in cases):
        return [Job(case, compiled[case.name], case.seconds * share) for case in cases]
    jobs = [
        Job(case, with_compile, min(CUDA_SECONDS, case.seconds * share))
        for case in cases
        for with_compile in ((False, True) if compiled[case.name] else (False,))
    ]
    return sorted(jobs, key=lambda job: IMPORTANCE.index((job.case.tier, job.compiled)))


def rounds_of(jobs: Sequence[Job], effort: str) -> tuple[list[list[Job]], int]:
    """The jobs in groups that are ready together, and how often each job of a group is visited.

    A quick run has no time for it; nobody else slows a GPU down, and its memory is for one case at a time.
    """
    if effort == "quick" or any(job.case.device == "cuda" for job in jobs):
        return [[job] for job in jobs], 1
    return [list(jobs)], VISITS
