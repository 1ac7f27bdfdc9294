"""Forward-Forward against backpropagation: a step of the same hidden layers, and the time to 2% test error."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from bench import machine
from bench.cases import CASES, Batch
from bench.contenders import Backprop
from bench.timing import HostClock, interleave, paired_ratio
from ffkernels.recipes import catalogue
from ffkernels.recipes.batches import as_input
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page

FILE = Path("results", "backprop", "mnist.json")
BEGIN, END = "<!-- backprop: made by `python -m ffkernels paper tables` -->", "<!-- /backprop -->"
NOT_YET = "Not measured yet: `python -m ffkernels paper {}` does."
TARGET = 0.02
MOST_EPOCHS = 40
RATES = (0.01, 0.03, 0.1)
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
    Stage("quick", 600, "second epoch; a pair loss of mean goodness, Adam"),
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


def time_to_target(data: Dataset, say: Say, recipes: Sequence[str] = ("loewex", "hinton-matlab")) -> list[Row]:
    """Seconds of training until the test error is at most 2%: recipes by both ways of reading out, and backprop."""
    rows = []
    for name, dtype in DTYPES.items():
        for recipe in recipes:
            trainer = Trainer(replace(catalogue.RECIPES[recipe], goodness_every=1), data, compute_dtype=dtype)
            reached: Row = {}
            while len(trainer.rows) < min(MOST_EPOCHS, trainer.epochs) and len(reached) < 2:
                row = trainer.run_epoch(lambda describe: False)
                assert row is not None
                for reader in ("classifier", "goodness"):
                    if row[f"test_error_{reader}"] <= TARGET:
                        seconds = sum(row["train_seconds"] for row in trainer.rows)
                        reached.setdefault(reader, [seconds, row["epoch"]])
            rows.append({"recipe": recipe, "compute_dtype": name, **reached})
            say(f"{recipe}, {name}: {reached}")
        found = [(rate, _backprop_to_target(data, name, rate)) for rate in RATES]
        rate, best = min(found, key=lambda pair: pair[1][0] if pair[1] else math.inf)
        rows.append({"recipe": "backprop", "compute_dtype": name, "lr": rate, **({"classifier": best} if best else {})})
        say(f"backprop, {name}, rate {rate}: {best}")
    return rows


def _backprop_to_target(data: Dataset, dtype: str, rate: float) -> list[float]:
    """[seconds, epochs] of plain PyTorch on the positive images of loewex; nothing where 2% is not reached."""
    case = replace(CASES["loewex-float32"], dtype=dtype)
    learner = Backprop(case, [], autocast=dtype != "float32")
    learner.optimizers = [SGD(learner.parameters(), lr=rate, momentum=0.9)]
    images, labels = data.train_images[:50_000], data.train_labels[:50_000]
    generator, seconds = torch.Generator().manual_seed(0), 0.0
    for epoch in range(1, MOST_EPOCHS + 1):
        start = time.monotonic()
        for rows in torch.randperm(len(labels), generator=generator).split(case.rows):
            if len(rows) == case.rows:
                learner.labels = labels[rows]
                learner.step(as_input(images[rows]))
        seconds += time.monotonic() - start
        with torch.no_grad():
            outputs = learner.outputs(as_input(data.test_images))
            if (outputs.argmax(1) != data.test_labels).float().mean() <= TARGET:
                return [seconds, epoch]
    return []


def save(part: str, data: Dataset, say: Say, path: Path = FILE) -> None:
    """Measures a part, "steps" or "target", and writes it as data beside the other one."""
    about = machine.describe("cpu")
    rows = (measure if part == "steps" else time_to_target)(data, say)
    found = {**_load(path), part: {"machine": about, "data": data.name, "rows": rows}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def tables(path: Path = FILE) -> str:
    """Both tables in Markdown."""
    found = _load(path)
    parts = (("steps", _steps_table), ("target", _target_table))
    return "\n\n".join(_section(part, found.get(part), table) for part, table in parts)


def _section(part: str, found: Row | None, table: Callable[[list[Row]], str]) -> str:
    if found is None:
        return NOT_YET.format(part)
    about = found["machine"]
    where = f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {found['data']}"
    return f"{table(found['rows'])}\n\n{where}."


def _steps_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        ratios = ("{:.2f} [{:.2f}, {:.2f}]".format(*row[f"over_{other}"]) for other in ("plain", "compiled"))
        what = f"{row['recipe']}: {'-'.join(map(str, row['layers']))}, batch {row['batch']}"
        lines.append((what, row["stage"], row["compute_dtype"], f"{row['ms']:.2f} ms", *ratios))
    columns = ("recipe", "when", "products", "its step", "over plain backprop's", "over the compiled one's")
    return f"{page.table(columns, lines)}\n\nRatios are medians paired within one run, and their intervals."


def _target_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        name = row["recipe"] + (f", rate {row['lr']:g}" if "lr" in row else "")
        reached = (_reached(row, reader) for reader in ("classifier", "goodness"))
        lines.append((name, row["compute_dtype"], *reached))
    return page.table(("to 2% test error", "products", "by classifier", "by goodness"), lines)


def _reached(row: Row, reader: str) -> str:
    if reader in row:
        return "{:.1f} s, {} epochs".format(*row[reader])
    return "" if row["recipe"] == "backprop" and reader == "goodness" else f"not in {MOST_EPOCHS} epochs"
