"""`python -m ffkernels paper epoch`: fflib's example network trained for one epoch, by fflib itself and accelerated.

The networks start from the same weights, see the same minibatches and take turns every 20 of them, so that the
machine's drift hits all alike. Minibatches are made beforehand; the clock runs in `run_train_combined` alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, report
from bench.cases import CASES, NUM_CLASSES, Case
from bench.contenders import fflib_network
from bench.data import Data
from bench.run import Row
from bench.timing import HostClock, Ratio, paired_ratio, rotated
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.progress import Progress

CASE = CASES["fflib-float32"]
BLOCK = 20
ORIGINAL = "fflib"
FOLDER = Path("results", "epoch")


def networks(case: Case, bfloat16: bool) -> dict[str, Any]:
    """fflib's network, and copies of it that are accelerated."""
    accelerate = import_module("ffkernels.integrations.fflib").accelerate
    original = fflib_network(case)
    found = {ORIGINAL: original, "accelerated": accelerate(copy.deepcopy(original))}
    if bfloat16:
        found["accelerated, bfloat16 products"] = accelerate(copy.deepcopy(original), compute_dtype=torch.bfloat16)
    return found


def train(case: Case, nets: dict[str, Any], data: Data, steps: int, block: int = BLOCK) -> list[Row]:
    """Trains every network on `steps` minibatches; one row of data for each, the original's first."""
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    counts = []
    clock = HostClock()
    with Progress(-(-steps // block)) as progress:
        for turn, start in enumerate(range(0, steps, block)):
            batches = [data.batch(case, index) for index in range(start, min(start + block, steps))]
            counts.append(len(batches))
            for name in rotated(nets, turn):
                seconds[name].append(clock.block(nets[name].run_train_combined, batches)[0])
            progress.step(lambda: "minibatches")
    return [
        {
            "contender": name,
            "steps": steps,
            "rows": 2 * case.rows,
            "seconds": sum(s * count for s, count in zip(of, counts, strict=True)),
            "times_as_fast_as_fflib": asdict(paired_ratio(seconds[ORIGINAL], of)),
        }
        for name, of in seconds.items()
    ]


@torch.no_grad()
def error(net: Any, images: Tensor, labels: Tensor) -> float:
    """The share of images under whose label the network is not the best, as fflib's own probe finds it."""
    probe = import_module("fflib.probes.one_hot").TryAllClasses(lambda x, y: net(torch.cat([x, y], 1)), NUM_CLASSES)
    right = sum(int((probe.predict(x) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    return 1 - right / len(labels)


def measure(mnist: Dataset, say: Callable[[str], object], folder: Path = FOLDER) -> Path:
    """Trains and tests all networks, and writes what came of it."""
    about = machine.describe("cpu")
    torch.manual_seed(0)
    nets = networks(CASE, bfloat16=bool(machine.bfloat16_units()))
    rows = train(CASE, nets, Data(mnist), len(mnist.train_labels) // CASE.rows)
    for row in rows:
        row["test_error"] = error(nets[row["contender"]], mnist.test_images.float() / 255, mnist.test_labels)
        fast = Ratio(**row["times_as_fast_as_fflib"])
        say(f"{row['contender']}: {row['seconds']:.1f} s, {fast} times as fast, {row['test_error']:.2%} test error")
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    report.save({"machine": about, "data": mnist.name, "case": str(CASE), "rows": rows}, path)
    return path
