"""`python -m bench.products`: the library's own convolutions against PyTorch's with compiled passes around them.

Both directions of a layer's step apart, in turns: forward with activation, pool and moments, and the weight's gradient
with what stands in front of it. `multiplies` and `multiplies_back` in `ffkernels/backends/native/maps.py` choose by
what this says of a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ffkernels.backends.native import library, maps
from ffkernels.cli import described, say
from ffkernels.functional.maps import ConvOptions
from ffkernels.spec import Geometry, Layer, MapRows, MapSlopes

from .machine import describe, in_words
from .memory import keep_freed_memory
from .timing import paired_ratio, rotated

PROGRAM = "python -m bench.products"
ROWS, ROUNDS = 128, 9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the two ways of one dtype: sums in another order, and of bfloat16 a gradient that PyTorch may round.
FAR = {"float32": 1e-4, "bfloat16": 2e-2}

Row = dict[str, Any]
Step = Callable[[], Tensor]


class Shape(NamedTuple):
    """A layer of 3 x 3 places, and the maps that come to it."""

    channels: int
    out: int
    size: int
    groups: int = 1
    pool: int | None = None

    def __str__(self) -> str:
        words = [f"{self.channels} to {self.out}", f"{self.groups} groups" if self.groups > 1 else ""]
        words += [f"{self.size} x {self.size}", "pool" if self.pool else ""]
        return ", ".join(filter(None, words))


SHAPES = (
    Shape(1, 32, 28, pool=2),
    Shape(3, 64, 32, pool=2),
    Shape(20, 80, 32, 10, 2),
    Shape(80, 240, 16),
    Shape(240, 480, 16, 10, 2),
    Shape(32, 64, 14, pool=2),
    Shape(128, 128, 14),
    Shape(128, 256, 14, pool=2),
    Shape(256, 256, 7),
    Shape(256, 512, 7, pool=2),
    Shape(512, 512, 4),
    Shape(64, 64, 80),
)


@contextmanager
def chosen(is_own: bool) -> Iterator[None]:
    """Both directions by the library's products, or by PyTorch's."""
    with patch.multiple(maps, multiplies=lambda *of: is_own, multiplies_back=lambda *of: is_own):
        yield


def measure(shape: Shape, dtype: str, rows: int = ROWS, rounds: int = ROUNDS) -> list[Row]:
    """A row for each direction, in milliseconds; raises RuntimeError where the two ways do not compute the same."""
    narrow = None if dtype == "float32" else DTYPES[dtype]
    pool, groups = shape.pool, shape.groups
    options = ConvOptions(1, 1, "zeros", groups, pool, "none", 0.0, "add", "relu", None, None, narrow, None)
    layer, geometry = options.checked(torch.randn(shape.out, shape.channels // groups, 3, 3), None)
    x = torch.randn(rows, shape.channels, shape.size, shape.size).to(DTYPES[dtype])
    taken = MapRows(x.contiguous(memory_format=torch.channels_last), None), layer, geometry
    found = []
    for index, direction in enumerate(("forward", "gradient")):
        steps = {is_own: _steps(is_own, *taken)[index] for is_own in (True, False)}
        results = {is_own: _timed(is_own, step)[1].double() for is_own, step in steps.items()}
        far = float((results[True] - results[False]).norm() / results[False].norm())
        if not far <= FAR[dtype]:
            raise RuntimeError(f"{shape} in {dtype}, {direction}: the two ways are {far:.1e} apart")
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(rounds):
            for name in rotated(("own", "PyTorch"), turn):
                is_own = name == "own"
                times[is_own].append(_timed(is_own, steps[is_own])[0])
        ratio = paired_ratio(times[False], times[True])
        choice = (maps.multiplies, maps.multiplies_back)[index](*taken)
        found.append(
            {"layer": str(shape), "dtype": dtype, "direction": direction, "rows": rows, "chosen": choice, "far": far}
            | {"own_ms": 1e3 * statistics.median(times[True]), "pytorch_ms": 1e3 * statistics.median(times[False])}
            | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        )
    return found


def _steps(is_own: bool, rows: MapRows, layer: Layer, geometry: Geometry) -> tuple[Step, Step]:
    with chosen(is_own):
        left = maps.conv2d_forward(rows, layer, geometry, False, None)
    slopes = MapSlopes(torch.ones_like(left.first), None)

    def forward() -> Tensor:
        return maps.conv2d_forward(rows, layer, geometry, False, None).first

    def gradient() -> Tensor:
        return maps.conv2d_gradients_(rows, layer, geometry, left, slopes).weight

    return forward, gradient


def _timed(is_own: bool, step: Step) -> tuple[float, Tensor]:
    with chosen(is_own):
        begin = time.perf_counter()
        result = step()
        return time.perf_counter() - begin, result


def lines_of(rows: Sequence[Row]) -> list[str]:
    """The rows as a table."""
    lines = [
        "| layer | products | direction | PyTorch's | own | PyTorch's over own | chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row['pytorch_ms']:.1f} ms | {row['own_ms']:.1f} ms"
        ratio = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        way = "own" if row["chosen"] else "PyTorch's"
        lines.append(f"| {row['layer']} | {row['dtype']} | {row['direction']} | {times} | {ratio} | {way} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 where there is nothing to measure."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m bench.products                      # two minutes
            python -m bench.products --dtype float32 --output products.json
            """,
            """
            The compiled library's own convolutions against PyTorch's with compiled passes around
            them, forward and gradient apart, and which of the two a step takes on this CPU.
            """,
        ),
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of products (both)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="times of each (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the rows as JSON")
    options = parser.parse_args(arguments)
    if library.load().library is None:
        say(f"{PROGRAM}: {library.load().reason}")
        return 2
    about = describe("cpu") | {"freed_memory_kept": keep_freed_memory()}
    rows = []
    for dtype in options.dtype:
        for shape in SHAPES:
            say(f"{shape}, {dtype} ...")
            rows += measure(shape, dtype, rounds=options.rounds)
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines_of(rows)))
    print(f"{ROWS} images. {in_words(about)}, load before {about['load_before']:.1f}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
