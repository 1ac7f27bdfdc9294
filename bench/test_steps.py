"""The same cases for pytest-benchmark: `pytest bench --benchmark-only`, `--benchmark-compare`."""

from __future__ import annotations

import time
from functools import lru_cache
from itertools import cycle
from typing import Any

import pytest
import torch

from .cases import Batch, Case, select_cases
from .contenders import Maker
from .data import Data
from .machine import bfloat16_units
from .memory import keep_freed_memory
from .proof import Exact, ExactLabels, exact_of
from .run import contenders_of

SECONDS = 2.0  # for each contender of a case
DATA = Data()
PARAMETERS = [
    pytest.param(case, make, id=f"{case.name}: {name}")
    for case in select_cases(None, "default")
    for name, make in contenders_of(case, case.compiled).items()
]


@lru_cache(maxsize=1)
def prepared(case: Case) -> tuple[Exact | ExactLabels, list[Batch]]:
    """What the contenders of a case are held against, and their batches."""
    keep_freed_memory()
    torch.compiler.reset()  # what other cases have compiled counts towards the limits
    return exact_of(case, case.initial(), DATA.proof(case)), DATA.pool(case, case.proof_steps)


@pytest.mark.parametrize(("case", "make"), PARAMETERS)
def test_step(benchmark: Any, case: Case, make: Maker) -> None:
    if case.low_precision is not None and not bfloat16_units():
        pytest.skip("no bfloat16 unit")
    exact, pool = prepared(case)
    contender, batches = make(case, case.initial()), cycle(pool)
    if contender.another:
        benchmark.extra_info["another"] = contender.another
    else:
        proof = exact.check(contender)
        assert proof.holds, f"computes something else: {proof}"
    contender.step(*next(batches))
    start = time.perf_counter()
    contender.step(*next(batches))
    rounds = max(5, min(1000, int(SECONDS / (time.perf_counter() - start))))
    benchmark.group = case.name
    benchmark.pedantic(contender.step, setup=lambda: (next(batches), {}), rounds=rounds, warmup_rounds=case.warm_steps)
