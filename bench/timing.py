"""Time of contenders that take turns, and what can be said about the ratio of two of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from .cases import Batch
from .contenders import Contender

CONFIDENCE = 0.95


def interleave(
    contenders: dict[str, Contender], batches: Callable[[], list[Batch]], rounds: int, lead: int = 1
) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round.

    In a round every contender takes the same batches in one block, so that it runs with its own caches warm,
    as in training; the first `lead` steps of a block are not timed. Who comes first rotates. `batches` is
    called once a round, outside the timed region.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            block = batches()
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                step = contenders[name].step
                for x_pos, x_neg in block[:lead]:
                    step(x_pos, x_neg)
                start = time.perf_counter()
                for x_pos, x_neg in block[lead:]:
                    step(x_pos, x_neg)
                seconds[name].append((time.perf_counter() - start) / (len(block) - lead))
    finally:
        if was_enabled:
            gc.enable()
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and an interval that covers the true median with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


def paired_ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """The median over rounds of `numerator / denominator`, and the interval between two of the sorted ratios.

    For n independent ratios the interval from the k-th smallest to the k-th largest covers the median with
    probability `1 - 2 P(Binomial(n, 1/2) < k)`, whatever their distribution; k is the largest that gives 95%,
    or 1 where n < 6.
    """
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    n = len(ratios)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= CONFIDENCE), default=1)
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[n - k], coverage(k))
