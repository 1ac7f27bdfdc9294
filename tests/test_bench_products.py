"""The library's own convolutions against PyTorch's: the proof that both are the same, the choice, the words."""

from __future__ import annotations

import pytest

from bench import products
from bench.products import Shape
from ffkernels.backends.native import library, maps

pytestmark = pytest.mark.skipif(library.load().library is None, reason="the compiled library is not there")
SMALL = Shape(4, 24, 9, 2, 2)


@pytest.mark.parametrize("dtype", list(products.DTYPES))
def test_both_directions_are_proven_and_timed(dtype):
    forward, gradient = products.measure(SMALL, dtype, rows=5, rounds=3)
    for row, direction in ((forward, "forward"), (gradient, "gradient")):
        assert row["direction"] == direction
        assert 0 <= row["far"] <= products.FAR[dtype]
        assert row["own_ms"] > 0
        assert row["pytorch_ms"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]


def test_ways_that_differ_are_refused(monkeypatch):
    by_pytorch = maps.product
    monkeypatch.setattr(maps, "product", lambda *of: 1.01 * by_pytorch(*of))
    with pytest.raises(RuntimeError, match=r"4 to 24, 2 groups, 9 x 9, pool in float32, forward: .* apart"):
        products.measure(SMALL, "float32", rows=5, rounds=1)


def test_a_row_in_words():
    row = {"layer": str(SMALL), "dtype": "float32", "direction": "gradient", "chosen": True, "own_ms": 2.0}
    row |= {"pytorch_ms": 3.0, "ratio": 1.5, "low": 1.4, "high": 1.6}
    line = products.lines_of([row])[2]
    assert line == "| 4 to 24, 2 groups, 9 x 9, pool | float32 | gradient | 3.0 ms | 2.0 ms | 1.50 [1.40, 1.60] | own |"
