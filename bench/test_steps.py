"""The same cases for pytest-benchmark: `pytest bench --benchmark-only`, `--benchmark-compare`."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from .cases import CASES, Batch, Case, Data
from .contenders import Exact, Maker, contenders_of
from .report import has_bfloat16_unit

PARAMETERS = [
    pytest.param(
        case,
        make,
        id=f"{case.name}: {name}",
        marks=pytest.mark.skipif(case.bfloat16 and not has_bfloat16_unit(), reason="no bfloat16 unit"),
    )
    for case in CASES.values()
    for name, make in contenders_of(case).items()
]


@pytest.fixture(scope="session")
def data() -> Data:
    return Data()


@pytest.fixture(scope="session")
def exact(data: Data) -> Any:
    proven: dict[str, Exact] = {}

    def of(case: Case) -> Exact:
        if case.name not in proven:
            batches = [data.batch(case, index) for index in range(case.proof_steps)]
            proven[case.name] = Exact(case, case.initial(), batches)
        return proven[case.name]

    return of


@pytest.mark.parametrize(("case", "make"), PARAMETERS)
def test_step(benchmark: Any, case: Case, make: Maker, data: Data, exact: Any) -> None:
    contender = make(case, case.initial())
    if contender.parameters():
        proof = exact(case).check(contender)
        assert proof.holds, f"computes something else: {proof}"
    index = count(case.proof_steps)

    def next_batch() -> tuple[Batch, dict[str, Any]]:
        return data.batch(case, next(index)), {}

    benchmark.group = case.name
    benchmark.pedantic(contender.step, setup=next_batch, rounds=case.block * case.rounds, warmup_rounds=case.warm_steps)
