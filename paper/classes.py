"""Class goodness against backpropagation: the same hidden layers, batches, schedule and dtype of products."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from ffkernels.recipes.catalogue import RECIPES
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page, results
from .curves import backpropagation

FILE = Path("results", "backprop", "classes.json")
PAGE = Path("docs", "classes.md")
BEGIN, END = "<!-- classes: made by `python -m ffkernels paper tables` -->", "<!-- /classes -->"
NOT_YET = "Not measured yet: `python -m ffkernels paper classes` does."
NAMES = ("projected", "projected-shifted")
RATES = (3e-4, 1e-3, 3e-3)

Row = dict[str, Any]
Say = Callable[[str], object]


def measure(data: Dataset, say: Say, names: Sequence[str] = NAMES) -> list[Row]:
    """A row for each recipe and rate: backprop's test error after each epoch, and its seconds of training till then."""
    rows = []
    for name in names:
        for rate in RATES:
            row = backpropagation(Trainer(RECIPES[name], data, compute_dtype=torch.bfloat16), rate).row()
            rows.append({"recipe": name, "compute_dtype": "bfloat16", "lr": rate, **row})
            say(f"{name}, backprop at {rate:g}: {row['errors'][-1]:.2%} in {row['seconds'][-1]:.0f} s")
    return rows


def save(data: Dataset, say: Say, path: Path = FILE, names: Sequence[str] = NAMES) -> None:
    """Measures, and writes it as data."""
    about = machine.describe("cpu")
    found = {"machine": about, "data": data.name, "rows": measure(data, say, names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


def table(path: Path = FILE, folder: Path = Path(results.FOLDER)) -> str:
    """Recipes by goodness, from `folder`, and backprop at each rate: error at the end, and when it had theirs."""
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    runs = [row for row in results.load(folder) if row["data"] == found["data"]]
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in found["rows"]):
        ours = [row for row in runs if row["recipe"] == name and row["compute_dtype"] == "bfloat16"]
        target = sum(row["error_goodness"] for row in ours) / len(ours) if ours else 0.0
        lines.append((name, results.errors([row["error_goodness"] for row in ours]), results.seconds(ours), ""))
        for row in (row for row in found["rows"] if row["recipe"] == name):
            epochs = zip(row["errors"], row["seconds"], strict=True)
            when = next((f"{after:.0f} s" for error, after in epochs if error <= target), "never")
            end = f"{row['errors'][-1]:.2%}", f"{row['seconds'][-1]:.0f}"
            lines.append((f"backprop of its network, rate {row['lr']:g}", *end, when))
    about = found["machine"]
    where = f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {about['date'][:10]}"
    columns = ("bfloat16 products", "test error", "seconds of training", "first at the recipe's error after")
    return f"{page.table(columns, lines)}\n\nBackprop, one seed: {where}."
