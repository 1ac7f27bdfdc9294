"""The same cases for pytest-benchmark: `pytest bench --benchmark-only`, `--benchmark-compare`."""

from __future__ import annotations

import time
from itertools import cycle
from typing import Any

import pytest
import torch

from .cases import Batch, Case, select_cases
from .contenders import Maker
from .data import Data
from .memory import keep_freed_memory
from .proof import Exact, ExactLabels, exact_of
from .report import bfloat16_units
from .run import contenders_of

SECONDS = 2.0  # for each contender of a case
PARAMETERS = [
    pytest.param(
        case,
        make,
        id=f"{case.name}: {name}",
        marks=pytest.mark.skipif(case.low_precision is not None and not bfloat16_units(), reason="no bfloat16 unit"),
    )
    for case in select_cases(None, "default")
    for name, make in contenders_of(case, case.compiled).items()
]


class Prepared:
    """The data of the case that is being measured, and what its contenders are held against."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.data = Data()
        self.case: Case | None = None

    def of(self, case: Case) -> tuple[Exact | ExactLabels, list[Batch]]:
        if case != self.case:
            self.case = case
            torch.compiler.reset()  # see run.py
            batches = [self.data.batch(case, index) for index in range(case.proof_steps)]
            self.exact, self.pool = exact_of(case, case.initial(), batches), self.data.pool(case, case.proof_steps)
        return self.exact, self.pool


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    return Prepared()


@pytest.mark.parametrize(("case", "make"), PARAMETERS)
def test_step(benchmark: Any, case: Case, make: Maker, prepared: Prepared) -> None:
    exact, pool = prepared.of(case)
    contender = make(case, case.initial())
    if contender.another:
        benchmark.extra_info["another"] = contender.another
    else:
        proof = exact.check(contender)
        assert proof.holds, f"computes something else: {proof}"
    batches = cycle(pool)
    contender.step(*next(batches))
    start = time.perf_counter()
    contender.step(*next(batches))
    rounds = max(5, min(1000, int(SECONDS / (time.perf_counter() - start))))
    benchmark.group = case.name
    benchmark.pedantic(contender.step, setup=lambda: (next(batches), {}), rounds=rounds, warmup_rounds=case.warm_steps)
