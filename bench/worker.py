"""One side of `--compare`: reads questions from stdin, one JSON object a line, and answers each on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from .cases import CASES, Batch, Case
from .contenders import OURS, Contender, backends_of
from .data import Data
from .memory import keep_freed_memory
from .proof import exact_of
from .run import contenders_of
from .timing import Clock, CudaClock, HostClock


class Worker:
    """Holds this package's contender for one case."""

    contender: Contender
    batches: Iterator[Batch]

    def __init__(self) -> None:
        self.data = Data()
        self.clock: Clock = HostClock()

    def prepare(self, case: Case) -> str:
        """Makes and proves the contender; the backend that it runs on."""
        self.clock = CudaClock() if case.device == "cuda" else HostClock()
        initial = case.initial()
        self.contender = contenders_of(case, compiled=False)[OURS](case, initial)
        proof = exact_of(case, initial, self.data.proof(case)).check(self.contender)
        if not proof.holds:
            raise ValueError(f"{case.name} is not exact in one of the trees: {proof}")
        self.batches = cycle(self.data.pool(case, case.proof_steps))
        self.block(case.warm_steps, 1)
        return backends_of(case)[0]

    def block(self, lead: int, steps: int) -> float:
        """See `compare.Side`."""
        for batch in islice(self.batches, lead):
            self.contender.step(*batch)
        return self.clock.block(self.contender.step, list(islice(self.batches, steps)))[0]

    def answer(self, question: dict[str, Any]) -> object:
        """What a question asks for."""
        if "block" in question:
            return self.block(*question["block"])
        case = CASES[question["prepare"]]
        return self.prepare(replace(case, device=question["device"], warm_steps=question["warm_steps"]))


def main() -> None:
    """Answers until stdin ends."""
    keep_freed_memory()
    worker = Worker()
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may come between the answers
    for line in sys.stdin:
        try:
            answer = {"answer": worker.answer(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
