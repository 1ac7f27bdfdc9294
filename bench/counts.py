"""What a case cannot do without: floating-point operations, bytes through memory, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .cases import NUM_CLASSES, Case
from .data import cache_bytes


def flops(case: Case) -> int:
    """Floating-point operations of the products, an addition and a multiplication as two; nothing else is counted.

    A training step multiplies three times per layer: forward, update, and forward again where the next layer sees the
    updated weights. All rows count: leaving out saturated ones, or sharing what copies have in common, falls below it.
    A prediction multiplies all rows once in the first layer, which changes little from label to label, and once for
    each label in the others; where labels stand apart, once in each.
    """
    if case.network == "trifecta":
        # Two steps: forward and weight gradient of all rows, but of the last block's weight one, and in one each, but
        # for the labels' maps, the input's gradient.
        products = [products for products, _, _ in _convolutions(case)]
        return 2 * 2 * case.rows * (4 * sum(products) - products[-1] + sum(products[1:]))
    if case.maps is not None:
        return sum(2 * 2 * case.rows * products for products, _, _ in _convolutions(case))
    per_row = [2 * inputs * outputs for inputs, outputs in case.shapes]
    if case.task == "predict":
        return case.rows * (per_row[0] + (1 if case.sides == 1 else NUM_CLASSES) * sum(per_row[1:]))
    again = sum(per_row[:-1]) if case.original.outputs == "post" else 0
    # A head's scores, its gradient, and what it passes back.
    heads = 3 * sum(2 * outputs * NUM_CLASSES for _, outputs in case.shapes) if case.original.has_head else 0
    return case.sides * case.rows * (2 * sum(per_row) + again + heads)


def least_bytes(case: Case) -> int:
    """Bytes to and from memory if everything that can be kept in a cache is.

    A step reads its rows once, writes and reads what is handed on, and reads and writes weights, biases and optimizer
    state. A prediction reads its rows and the parameters, and writes the labels.
    """
    master, operand = case.master_dtype.itemsize, case.product_dtype.itemsize
    if case.maps is not None:
        kept = 2 * master * (1 + case.states_per_parameter())
        maps = sum(2 * units * operand for _, units, _ in _convolutions(case)[:-1])
        maps *= 4 if case.network == "trifecta" else 1
        return case.rows * (case.sizes[0] * master + maps) + kept * sum(p for _, _, p in _convolutions(case))
    parameters = sum((inputs + 1) * outputs for inputs, outputs in case.shapes)
    if case.task == "predict":
        return case.rows * (case.sizes[0] * master + torch.int64.itemsize) + parameters * master
    handed_on = 2 * sum(case.sizes[1:-1]) * operand
    return case.sides * case.rows * (case.sizes[0] * master + handed_on) + 2 * parameters * master * (
        1 + case.states_per_parameter()
    )


def _convolutions(case: Case) -> list[tuple[int, int, int]]:
    """Of each layer: multiplications for a row, units handed on by a row, and parameters."""
    assert case.maps is not None
    channels, height, width = case.maps
    channels += case.network == "trifecta"
    found = []
    for out, second, third in case.convolutions:
        groups, pool, side = (second, third, 3) if case.network == "cwc" else (1, second, third)
        kernel = out * channels // groups * side**2
        products = kernel * height * width
        channels, height, width = out, height // pool, width // pool
        found.append((products, out * height * width, kernel + 3 * out))
    return found


@dataclass(frozen=True)
class Limit:
    """The rates of this machine, measured, and the time below which a case that keeps all rows cannot come."""

    flops_per_s: float
    bytes_per_s: float
    flops: int
    bytes: int

    @property
    def seconds(self) -> float:
        """The longer of computing and of moving (they can overlap): the roofline."""
        return max(self.flops / self.flops_per_s, self.bytes / self.bytes_per_s)


def limit_of(case: Case) -> Limit:
    """Measures the product rate now and, with the first case, the copy bandwidth, and holds the case against them."""
    rates = (product_rate(case.product_dtype, case.device), copy_bandwidth(case.device))
    return Limit(*rates, flops(case), least_bytes(case))


def product_rate(dtype: torch.dtype, device: str, size: int | None = None) -> float:
    """Floating-point operations per second of the best of a few large square products through `torch.mm`."""
    size = size or (8192 if device == "cuda" else 2048)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second in the best of a few copies of far more than the cache holds; measured once,
    since the first touch of so much memory takes seconds.
    """
    size = max(1 << (30 if device == "cuda" else 28), 4 * cache_bytes(device))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def fastest(device: str, *candidates: Callable[[], object]) -> Callable[[], object]:
    """The one that took the least time when each was tried a few times."""
    for candidate in candidates:
        candidate()
    return min(candidates, key=lambda candidate: _best(candidate, device))


def _best(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
