"""Time of contenders that take turns, and what can be said about the ratio of two of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from .cases import Batch
from .data import cache_bytes

CONFIDENCE = 0.95
# A block of steps is at least this long where the steps are short, so that each contender runs warm.
BLOCK_S = 0.05
MAX_BLOCK = 200
MIN_ROUNDS, MAX_ROUNDS = 6, 61
Step = Callable[..., object]


class HostClock:
    """Times steps of a CPU, which are over when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def block(self, step: Step, batches: Sequence[Batch]) -> tuple[float, float]:
        """Seconds per step, and the part of them that the host was busy: all."""
        start = self.now()
        for batch in batches:
            step(*batch)
        seconds = (self.now() - start) / len(batches)
        return seconds, seconds


class CudaClock:
    """Times steps of a GPU by events, its L2 cache cold, and apart from them the time of the host.

    Before each step a write of twice the L2 evicts what the last one left there, and a spin keeps the GPU waiting
    until the host has issued the step: between the two events lies the GPU's own time.
    """

    MAX_SPIN_CYCLES = 200_000_000
    CYCLES_PER_S = 2e9  # at most, on current GPUs

    def __init__(self) -> None:
        self.scratch = torch.empty(2 * cache_bytes("cuda"), dtype=torch.uint8, device="cuda")
        self.now = time.perf_counter

    def block(self, step: Step, batches: Sequence[Batch]) -> tuple[float, float]:
        """Seconds per step on the GPU, and seconds that the host needs to issue one."""
        torch.cuda.synchronize()
        start = self.now()
        step(*batches[0])
        torch.cuda.synchronize()
        spin = min(self.MAX_SPIN_CYCLES, int(2 * (self.now() - start) * self.CYCLES_PER_S))
        events, host = [], 0.0
        for batch in batches:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch.zero_()
            torch.cuda._sleep(spin)
            before.record()
            start = self.now()
            step(*batch)
            host += self.now() - start
            after.record()
            events.append((before, after))
            torch.cuda.synchronize()
        device = sum(before.elapsed_time(after) for before, after in events) / 1e3
        return device / len(batches), host / len(batches)


Clock = HostClock | CudaClock


@dataclass(frozen=True)
class Times:
    """Seconds per step of one contender, one entry for each round; and those of the host."""

    seconds: list[float]
    host: list[float]


def interleave(steps: dict[str, Step], pool: Sequence[Batch], seconds: float, clock: Clock) -> dict[str, Times]:
    """Times contenders that take turns until `seconds` are over, for 6 to 61 rounds.

    In a round every contender takes the same batches in one block, so that it runs with its own caches warm, as in
    training; a tenth of a block's steps go before it untimed, and at least one where steps are short. Who comes first
    rotates, and so do the batches, through a pool larger than the cache.
    """
    endless = cycle(pool)
    with _no_garbage_collection():
        end = clock.now() + seconds
        batches = list(islice(endless, 1))
        first = {name: clock.block(step, batches) for name, step in steps.items()}
        block, lead = block_of(min(s for s, _ in first.values()), max(s for s, _ in first.values()))
        # Where single steps make a round, the trial was the first one.
        begun = block == 1 and lead == 0
        times = {
            name: Times([step_s], [host_s]) if begun else Times([], []) for name, (step_s, host_s) in first.items()
        }
        for turn in range(begun, MAX_ROUNDS):
            if turn >= MIN_ROUNDS and clock.now() > end:
                break
            batches = list(islice(endless, lead + block))
            for name in rotated(steps, turn):
                for batch in batches[:lead]:
                    steps[name](*batch)
                step_s, host_s = clock.block(steps[name], batches[lead:])
                times[name].seconds.append(step_s)
                times[name].host.append(host_s)
    return times


def block_of(fastest_s: float, slowest_s: float) -> tuple[int, int]:
    """How many steps make a block, and how many go before it untimed, for steps of that length."""
    block = max(1, min(MAX_BLOCK, math.ceil(BLOCK_S / max(fastest_s, 1e-9))))
    return block, 0 if slowest_s > 10 * BLOCK_S else max(1, block // 10)


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The order of a round: someone else comes first each time."""
    names = list(names)
    first = turn % len(names)
    return names[first:] + names[:first]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and an interval that covers the true median with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float

    @property
    def verdict(self) -> str:
        """What the interval says of the numerator's time."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "no difference seen"

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


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


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log(values) over log(sizes), by least squares through the larger half of the sizes.

    The smaller half is left out because what every step costs hides the growth there. None for fewer than two points,
    and where a value is zero.
    """
    points = sorted(zip(sizes, values, strict=True))[len(sizes) // 2 :] if len(sizes) > 2 else []
    if len(points) < 2 or min(value for _, value in points) <= 0:
        return None
    return statistics.linear_regression(*([math.log(v) for v in values] for values in zip(*points, strict=True))).slope
