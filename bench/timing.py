"""Time of contenders that take turns, and what can be said about the ratio of two of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch

from .cases import Batch
from .data import cache_bytes

CONFIDENCE = 0.95
MAX_BLOCK = 200
MIN_ROUNDS, MAX_ROUNDS = 6, 201
Step = Callable[..., object]


class HostClock:
    """Times steps of a CPU, which are over when the call returns."""

    block_s = 0.03  # of a block, at least, where the steps are short: long enough to run warm

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def block(self, step: Step, batches: Sequence[Batch]) -> tuple[float, float]:
        """Seconds of the median step, and the part of them that the host was busy: all."""
        times = []
        for batch in batches:
            start = self.now()
            step(*batch)
            times.append(self.now() - start)
        return statistics.median(times), statistics.median(times)


class CudaClock:
    """Times steps of a GPU by events, its L2 cache cold, and apart from them the time of the host.

    Before each step a write of twice the L2 evicts what the last one left there, and a spin keeps the GPU waiting
    until the host has issued the step: between the two events lies the GPU's own time.
    """

    block_s = 0.01
    MAX_SPIN_CYCLES = 200_000_000
    CYCLES_PER_S = 2e9  # at most, on current GPUs

    def __init__(self) -> None:
        self.scratch = torch.empty(2 * cache_bytes("cuda"), dtype=torch.uint8, device="cuda")
        self.now = time.perf_counter

    def block(self, step: Step, batches: Sequence[Batch]) -> tuple[float, float]:
        """Seconds of the median step on the GPU, and seconds that the host needs to issue it."""
        torch.cuda.synchronize()
        start = self.now()
        step(*batches[0])
        torch.cuda.synchronize()
        spin = min(self.MAX_SPIN_CYCLES, int(2 * (self.now() - start) * self.CYCLES_PER_S))
        device, host = [], []
        for batch in batches:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch.zero_()
            torch.cuda._sleep(spin)
            before.record()
            start = self.now()
            step(*batch)
            host.append(self.now() - start)
            after.record()
            torch.cuda.synchronize()
            device.append(before.elapsed_time(after) / 1e3)
        return statistics.median(device), statistics.median(host)


Clock = HostClock | CudaClock


@dataclass(frozen=True)
class Times:
    """Seconds per step of one contender, one entry for each round; those of the host; the reference's beside them."""

    seconds: list[float]
    host: list[float]
    beside: list[float]

    def __add__(self, more: Times) -> Times:
        return Times(self.seconds + more.seconds, self.host + more.host, self.beside + more.beside)


def interleave(
    steps: dict[str, Step], pool: Sequence[Batch], seconds: float, clock: Clock, visits: int = 1
) -> dict[str, Times]:
    """Times contenders against the first of them, the reference, until `seconds` are over, for 6 to 201 rounds.

    This is one of `visits`, which share these rounds among them.

    In a round every contender takes one block of steps, and the reference one before and one after each of them. What
    slows a shared machine lasts some tenths of a second: the mean of both sees most of what the contender between them
    saw. Every block runs with its own caches warm, as in training, and lasts about as long for everyone (`block_of`).
    The order rotates, and so do the batches, through a pool larger than the cache.
    """
    (reference, *others), endless = steps, cycle(pool)
    with _no_garbage_collection():
        for step in steps.values():  # finds its memory again after what came before
            _trial(step, pool[0], clock)
        end = clock.now() + seconds
        blocks = {name: block_of(_trial(step, pool[0], clock), clock.block_s) for name, step in steps.items()}
        times = {name: Times([], [], []) for name in steps}

        def block(name: str) -> float:
            lead, count = blocks[name]
            for batch in islice(endless, lead):
                steps[name](*batch)
            step_s, host_s = clock.block(steps[name], list(islice(endless, count)))
            times[name].seconds.append(step_s)
            times[name].host.append(host_s)
            return step_s

        last = block(reference)
        for turn in range(math.ceil(MAX_ROUNDS / visits)):
            if turn >= MIN_ROUNDS / visits and clock.now() > end:
                break
            for name in rotated(others, turn):
                block(name)
                before, last = last, block(reference)
                times[name].beside.append((before + last) / 2)
    return {**times, reference: replace(times[reference], beside=times[reference].seconds)}


def _trial(step: Step, batch: Batch, clock: Clock) -> float:
    """Seconds that a step takes with all that the clock does around it."""
    start = clock.now()
    clock.block(step, [batch])
    return clock.now() - start


def block_of(step_s: float, block_s: float = HostClock.block_s) -> tuple[int, int]:
    """How many steps go before a block untimed, and how many make it, for steps of that length."""
    block = max(1, min(MAX_BLOCK, math.ceil(block_s / max(step_s, 1e-9))))
    return 0 if step_s > 10 * block_s else max(1, block // 10), block


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The order of a round: someone else comes first each time."""
    names = list(names)
    first = turn % max(1, len(names))
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
