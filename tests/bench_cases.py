"""Cases and results that are small enough for tests of the benchmark."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench import report
from bench.cases import NUM_CLASSES, Batch, Case


def small(case: Case) -> tuple[Case, list[Batch]]:
    """A case with little data and few units, and its batches."""
    # The plain writing of class groups wants a width that ten divides.
    width = 12 if case.sides == 2 else 20
    columns, maps = 30, None
    if case.maps is not None:
        maps = (case.maps[0], 8, 8)
        columns = 64 * maps[0]
    case = replace(case, sizes=(columns, *(width for _ in case.sizes[1:])), rows=10, maps=maps)
    generator = torch.Generator().manual_seed(8)

    def rows() -> Tensor:
        x = torch.rand(10, columns, generator=generator).to(case.master_dtype)
        return x * (torch.rand(10, columns, generator=generator) < 0.7) * (0.5 + torch.rand(10, 1, generator=generator))

    def batch() -> Batch:
        sides = [rows().to(case.master_dtype) for _ in range(1 if case.task == "predict" else case.sides)]
        labels = [torch.arange(10) % NUM_CLASSES] if case.task == "train" and case.sides == 1 else []
        return (*sides, *labels)

    return case, [batch() for _ in range(case.proof_steps)]


def result_of(*rows: tuple[str, str, float, float], **machine: str) -> report.Result:
    """A result whose rows are (case, contender, milliseconds, over ours)."""
    about = {"device": "cpu", "cpu": "x", "threads": 2, "commit": "c"} | machine
    made = [
        {"case": case, "contender": name, "median_ms": ms, "over_ours": {"median": ratio}}
        for case, name, ms, ratio in rows
    ]
    return {"machine": about, "quick": False, "rows": made}
