"""Forward-Forward against backpropagation: a step of the same hidden layers."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from bench import machine
from bench.cases import CASES, Batch
from bench.contenders import Backprop
from bench.timing import HostClock, interleave, paired_ratio
from ffkernels.recipes import catalogue
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page

FILE = Path("results", "backprop", "steps.json")
BEGIN, END = "<!-- backprop: made by `python -m ffkernels paper tables` -->", "<!-- /backprop -->"
NOT_YET = "Not measured yet: `python -m ffkernels paper steps` does."
POOL = 40
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}

Row = dict[str, Any]
Say = Callable[[str], object]


@dataclass(frozen=True)
class Stage:
    """A recipe, and after how many steps its own are timed."""

    recipe: str
    steps: int
    note: str


STAGES = (
    Stage("loewex", 500, "second epoch"),
    Stage("hinton-matlab", 600, "second epoch"),
    Stage("loewex", 0, "first steps"),
    Stage("hard-negatives", 600, "second epoch; a pair loss of mean goodness, Adam"),
    Stage("fflib", 422, "second epoch; a soft loss, Adam, layers hand on what they compute anew"),
)


def measure(data: Dataset, say: Say, seconds: float = 6.0, stages: Sequence[Stage] = STAGES) -> list[Row]:
    """A row for each stage and dtype: milliseconds of our step, and backprop's, plain and compiled, over it."""
    rows = []
    for stage in stages:
        for name, dtype in DTYPES.items():
            trainer = Trainer(catalogue.RECIPES[stage.recipe], data, compute_dtype=dtype)
            batches = _batches(trainer, stage.steps)
            times = interleave(_steps(trainer, name, batches[0]), batches, seconds, HostClock())
            ours = times["ours"].seconds
            row: Row = {
                "recipe": stage.recipe, "stage": stage.note, "compute_dtype": name,
                "layers": [next(iter(trainer.net)).in_features, *trainer.recipe.hidden],
                "batch": trainer.recipe.batch_size, "ms": statistics.median(ours) * 1e3,
            }  # fmt: skip
            for other in ("plain", "compiled"):
                # Ours over theirs, as the targets are set: below 1 Forward-Forward is the faster one.
                ratio = paired_ratio(times[other].beside, times[other].seconds)
                row[f"over_{other}"] = [ratio.median, ratio.low, ratio.high]
                row[f"{other}_ms"] = statistics.median(times[other].seconds) * 1e3
            rows.append(row)
            say(f"{stage.recipe}, {stage.note}, {name}: {row['ms']:.2f} ms, plain backprop {row['plain_ms']:.2f} ms")
    return rows


def _batches(trainer: Trainer, steps: int) -> list[Batch]:
    """Both sides of some minibatches, as the recipe makes them, once so many steps are done."""
    taken: list[Batch] = []
    for done, batch in enumerate(batch for epoch in itertools.count(1) for batch in trainer.minibatches(epoch)):
        trainer.step(batch)
        if done >= steps:
            assert batch.x_neg is not None
            taken.append((batch.x_pos, batch.x_neg))
        if len(taken) == POOL:
            break
    # The network stays at this stage, and as many of its rows saturated, however many steps are timed.
    for group in trainer.net_optimizer.param_groups:
        group["lr"] = 0.0
    return taken


def _steps(trainer: Trainer, dtype: str, batch: Batch) -> dict[str, Callable[..., object]]:
    """Steps on `(x_pos, x_neg)`: ours of the hidden layers alone, backprop's with its head on the positive rows."""
    recipe, rows = trainer.recipe, len(batch[0])
    sizes = (batch[0].shape[1], *recipe.hidden)
    case = replace(CASES["loewex-float32"], sizes=sizes, rows=rows, dtype=dtype)
    plain, compiled = (Backprop(case, [], autocast=dtype != "float32", compiled=c) for c in (False, True))
    if recipe.layers.optimizer == "adam":
        for contender in (plain, compiled):
            contender.optimizers = [Adam(contender.parameters(), lr=1e-3)]
    for contender in (plain, compiled):
        for _ in range(3):
            contender.step(*batch)

    def ours(x_pos: Tensor, x_neg: Tensor) -> object:
        return trainer.net.step(x_pos, x_neg, trainer.net_optimizer)

    return {"ours": ours, "plain": plain.step, "compiled": compiled.step}


def save(data: Dataset, say: Say, path: Path = FILE) -> None:
    """Measures, and writes it as data."""
    found = {"machine": machine.describe("cpu"), "data": data.name, "rows": measure(data, say)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


def table(path: Path = FILE) -> str:
    """The rows in Markdown."""
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    about = found["machine"]
    where = f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {found['data']}"
    return f"{_steps_table(found['rows'])}\n\n{where}."


def _steps_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        ratios = ("{:.2f} [{:.2f}, {:.2f}]".format(*row[f"over_{other}"]) for other in ("plain", "compiled"))
        what = f"{row['recipe']}: {'-'.join(map(str, row['layers']))}, batch {row['batch']}"
        lines.append((what, row["stage"], row["compute_dtype"], f"{row['ms']:.2f} ms", *ratios))
    columns = ("recipe", "when", "products", "its step", "over plain backprop's", "over the compiled one's")
    return f"{page.table(columns, lines)}\n\nRatios are medians paired within one run, and their intervals."
