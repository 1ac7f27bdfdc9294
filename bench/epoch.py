"""`python -m bench.epoch`: fflib's example network trained on MNIST for one epoch, by fflib itself and accelerated.

The networks start from the same weights, see the same minibatches and take turns every 20 of them, so that the
machine's drift hits all alike. Minibatches are made beforehand; the clock runs in `run_train_combined` alone.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ffkernels.recipes.progress import Progress

from . import report
from .cases import CASES, NUM_CLASSES, Case
from .contenders import fflib_network, installed
from .data import Data
from .run import Row
from .timing import HostClock, paired_ratio, rotated

CASE = CASES["fflib-float32"]
BLOCK = 20
ORIGINAL = "fflib"
RESULTS = report.RESULTS / "epoch"


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
            "block_ms": [round(s * 1e3, 4) for s in of],
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


def main() -> int:
    """Runs the command; 2 where fflib or MNIST is missing."""
    if installed("fflib") is None:
        print("fflib is not installed: pip install --no-deps fflib==0.3.0", file=sys.stderr)
        return 2
    try:
        mnist = import_module("ffkernels.recipes.data").load("mnist")
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    about = report.machine("cpu")
    torch.manual_seed(0)
    nets = networks(CASE, bfloat16=bool(report.bfloat16_units()))
    rows = train(CASE, nets, Data(), len(mnist.train_labels) // CASE.rows)
    images, labels = mnist.test_images.flatten(1).float() / 255, mnist.test_labels
    for row in rows:
        row["test_error"] = error(nets[row["contender"]], images, labels)
        fast = row["times_as_fast_as_fflib"]
        print(
            f"{row['contender']}: {row['seconds']:.1f} s, {fast['median']:.2f} times as fast as fflib "
            f"[{fast['low']:.2f}, {fast['high']:.2f}], {row['test_error']:.2%} test error"
        )
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    report.save({"machine": about, "data": "MNIST", "case": str(CASE), "rows": rows}, path)
    print(f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}. Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
