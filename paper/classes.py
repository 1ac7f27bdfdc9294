"""Class goodness against backpropagation: the same hidden layers, batches, schedule and dtype of products."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

from bench import machine
from ffkernels.recipes.catalogue import RECIPES
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page, results

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
            row = backprop(Trainer(RECIPES[name], data, compute_dtype=torch.bfloat16), rate)
            rows.append({"recipe": name, "compute_dtype": "bfloat16", "lr": rate, **row})
            say(f"{name}, backprop at {rate:g}: {row['errors'][-1]:.2%} in {row['seconds'][-1]:.0f} s")
    return rows


def backprop(of: Trainer, rate: float) -> Row:
    """Plain PyTorch on what a recipe trains on: its hidden layers, a linear head, Adam, its smoothing and cool-down."""
    recipe, classes = of.recipe, of.data.num_classes
    sizes = (of.train_images.shape[1], *recipe.hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(of.seed)
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
        net = nn.Sequential(*hidden, nn.Linear(sizes[-1], classes))
    optimizer = Adam(net.parameters(), lr=rate)
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    precision = torch.autocast("cpu", of.compute_dtype, enabled=of.compute_dtype is not None)
    errors, seconds, spent = [], [], 0.0
    for epoch in range(1, of.epochs + 1):
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = rate * of.lr_factor(epoch)
        for batch in of.minibatches(epoch):
            with precision:
                loss = loss_of(net(batch.x_pos), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spent += time.monotonic() - start
        seconds.append(round(spent, 1))
        with torch.no_grad(), precision:
            guesses = net(of.test_images.float() / 255).argmax(1)
        errors.append((guesses != of.test_labels).float().mean().item())
    return {"errors": errors, "seconds": seconds}


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
