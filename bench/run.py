"""Runs one case: proof, warm-up, time, memory, and the machine's limit, as rows of data."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import ffkernels as ff

from .blocks import blocks_of
from .cases import NETWORKS, Batch, Case, Layers
from .contenders import OURS, Contender, FFKernels, Maker, backends_of, trainers_of
from .convolutions import convolutions_of
from .counts import limit_of
from .data import Data
from .memory import peak_bytes, resident_rise
from .predictors import predictors_of
from .proof import Exact, ExactLabels, exact_of, first_step
from .timing import Clock, CudaClock, HostClock, Times, interleave, paired_ratio

Row = dict[str, Any]


class NotExact(RuntimeError):
    """This package does not compute what a case asks for; its times are not worth having."""


def contenders_of(case: Case, compiled: bool = True) -> dict[str, Maker]:
    """Name and maker of everyone who runs a case; ours first. `compiled`: those of torch.compile too."""
    if case.network in NETWORKS:
        return blocks_of(case)
    if case.maps is not None:
        return convolutions_of(case, compiled)
    return (predictors_of if case.task == "predict" else trainers_of)(case, compiled)


class Measurement:
    """A case whose contenders are proven and warm, and have been timed in as many visits as there were.

    Args:
        compiled: with torch.compile's contenders.
        progress: called with a few words after each contender's proof.

    Raises:
        NotExact: where this package, on whichever backend, does not compute what the case asks for.
    """

    def __init__(
        self, case: Case, data: Data, compiled: bool, progress: Callable[[str], object] = lambda text: None
    ) -> None:
        self.case, self.data = case, data
        initial = case.initial()
        proof_batches = data.proof(case)
        exact = exact_of(case, initial, proof_batches)
        self.contenders: dict[str, Contender] = {}
        self.proven: dict[str, Row] = {}
        for name, make in contenders_of(case, compiled).items():
            contender, self.proven[name] = _proven(name, make, case, initial, exact, proof_batches[0])
            if contender is not None:
                self.contenders[name] = contender
            progress(f"{case.name}: {name}")
        warm_steps = case.warm_steps if case.task == "train" else 1
        for index in range(warm_steps):
            batch = data.batch(case, case.proof_steps + index)
            for contender in self.contenders.values():
                contender.step(*batch)
        self.next_batch = case.proof_steps + warm_steps
        self.warm = [
            (now, now.detach().clone())
            for contender in self.contenders.values()
            if isinstance(contender, FFKernels)
            for now in contender.state()
        ]
        self.clock: Clock = CudaClock() if case.device == "cuda" else HostClock()
        self.times: dict[str, Times] = {}

    def visit(self, seconds: float, visits: int = 1) -> list[Row]:
        """Times all contenders together for so long, one of `visits` times; a row of data for each, ours first.

        Ours starts from the same weights each time: the more it has learnt, the more rows are saturated, and the
        shorter are its steps. Nobody else's time depends on that.
        """
        with torch.no_grad():
            for now, value in self.warm:
                now.copy_(value)
        pool = self.data.pool(self.case, self.next_batch, visits)
        self.next_batch += len(pool)
        steps = {name: contender.step for name, contender in self.contenders.items()}
        if not self.times:
            self.limit = limit_of(self.case)
        times = interleave(steps, pool, seconds, self.clock, visits)
        if not self.times:
            # Of a CUDA graph the memory is a pool of its own, reserved for good.
            measured = {name: of for name, of in self.contenders.items() if not name.endswith(", graph")}
            self.memory = {name: _memory(of, pool[0], self.case.device) for name, of in measured.items()}
            self.saturated = saturated_rows(self.case, self.contenders[OURS], pool[0])
        self.times = {name: self.times[name] + taken if name in self.times else taken for name, taken in times.items()}
        return self._rows()

    def _rows(self) -> list[Row]:
        case = self.case
        rows = {name: {"case": case.name, "contender": name, **proven} for name, proven in self.proven.items()}
        for name, taken in self.times.items():
            median = statistics.median(taken.seconds)
            if not name.startswith("backprop"):  # whose products are others
                rows[name]["of_limit"] = _rounded(self.limit.seconds / median)
            ratio = paired_ratio(taken.seconds, taken.beside)
            rows[name] |= {
                "median_ms": _rounded(median * 1e3),
                "host_ms": _rounded(statistics.median(taken.host) * 1e3),
                "over_ours": {key: _rounded(value, 6) for key, value in asdict(ratio).items()},
                **self.memory.get(name, {}),
            }
        rows[OURS] |= {key: _rounded(value, 6) for key, value in asdict(self.limit).items()}
        rows[OURS] |= {"backend": backends_of(case)[0], "steps_before_timing": case.proof_steps + case.warm_steps}
        rows[OURS] |= self.saturated
        return list(rows.values())


def _proven(
    name: str, make: Maker, case: Case, initial: Layers, exact: Exact | ExactLabels, batch: Batch
) -> tuple[Contender | None, Row]:
    """A contender and what it proved, as data; no contender where it cannot run here, which is a result too."""
    try:
        contender = make(case, initial)
        if contender.another:
            return contender, {"another": contender.another, "first_step_s": _rounded(first_step(contender, batch))}
        proof = exact.check(contender)
    except Exception as error:
        if name.startswith(OURS):
            raise
        return None, {"failed": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
    if name.startswith(OURS) and not proof.holds:
        raise NotExact(
            f"{case.name}: {name} is not exact (off by {proof.error:.1e}, allowed {proof.budget:.1e}), "
            "so this case is not timed"
        )
    return contender, {"same_step": proof.holds, **{key: _rounded(value) for key, value in asdict(proof).items()}}


def _memory(contender: Contender, batch: Batch, device: str) -> Row:
    def without_gradients() -> None:  # they are part of what a step needs
        for p in contender.parameters():
            p.grad = None

    work = partial(contender.step, *batch)
    without_gradients()
    found: Row = {"peak_bytes": peak_bytes(work, device)}
    without_gradients()
    return found | ({"resident_bytes": resident_rise(work)} if device == "cpu" else {})


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def saturated_rows(case: Case, contender: Contender, batch: Batch) -> Row:
    """Per layer, the share of rows whose loss has no slope left in float32: the update leaves them out."""
    if case.task == "predict" or case.sides == 1 or not isinstance(contender, FFKernels):
        return {}
    objectives = [case.original.objective_for(width) for width in case.sizes[1:]]
    if objectives[0].paired:
        return {}
    sign = torch.tensor([-1.0, 1.0], device=case.device).repeat_interleave(case.rows).unsqueeze(1)
    thresholds = [of.thresholds()[0] for of in objectives if isinstance(of, ff.Objective)]
    goodness = contender.net.goodness(torch.cat(batch)) - torch.tensor(thresholds, device=case.device)
    if not objectives[0].maximize:
        goodness = -goodness
    return {"saturated_rows": (torch.sigmoid(sign * goodness) == 0).float().mean(0).tolist()}
