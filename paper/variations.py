"""What a recipe of class goodness is made of: each choice changed alone, on images held back from training, 3 seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import machine
from ffkernels.recipes.catalogue import PROJECTED, Recipe, Rule
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page, results

FILE = Path("results", "backprop", "variations.json")
BEGIN, END = "<!-- variations: made by `python -m ffkernels paper tables` -->", "<!-- /variations -->"
NOT_YET = "Not measured yet: `python -m ffkernels paper variations` does."
SEEDS = (0, 1, 2)
HELD_BACK = 10_000


def _adam(decay: float) -> Rule:
    return replace(PROJECTED.layers, weight_decay=decay, decoupled=True)


VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "projected": {},
    "250-250": {"hidden": (250, 250)},
    "1000-1000": {"hidden": (1000, 1000)},
    "500-500-500": {"hidden": (500, 500, 500)},
    "no norm": {"norm": "none"},
    "l2 norm": {"norm": "l2"},
    "class groups, temperature 0.1": {"head": None, "temperature": 0.1},
    "prototypes, temperature 0.1": {"head": "prototypes", "temperature": 0.1},
    "weight decay 1e-3": {"layers": _adam(1e-3)},
    "weight decay 1e-2": {"layers": _adam(1e-2)},
    "weight decay 1e-1": {"layers": _adam(1e-1)},
    "labels not smoothed": {"label_smoothing": 0.0},
    "labels smoothed by 0.3": {"label_smoothing": 0.3},
    "no inputs dropped": {"dropout": 0.0},
    "half of the inputs dropped": {"dropout": 0.5},
    "a tenth dropped, shifted by up to a pixel": {"dropout": 0.1, "jitter": 1},
}


def held_back(data: Dataset, count: int = HELD_BACK) -> Dataset:
    """The last training images in the place of the test images."""
    images, labels = data.train_images, data.train_labels
    return replace(
        data,
        train_images=images[:-count],
        train_labels=labels[:-count],
        test_images=images[-count:],
        test_labels=labels[-count:],
    )


def save(data: Dataset, say: Callable[[str], object], path: Path = FILE, recipe: Recipe = PROJECTED) -> None:
    """Trains each variation under each seed that `path` does not have yet, and adds it there."""
    split = held_back(data)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"data": data.name, "rows": []}
    done = {(row["what"], row["seed"]) for row in found["rows"]}
    # Seed by seed and next to each other, so that a machine that drifts meets all of them alike.
    for seed, (what, changes) in product(SEEDS, VARIATIONS.items()):
        if (what, seed) in done:
            continue
        trainer = Trainer(replace(recipe, **changes), split, seed=seed, compute_dtype=torch.bfloat16)
        while not trainer.finished:
            trainer.run_epoch(lambda describe: False)
        error, seconds = trainer.rows[-1]["test_error_goodness"], sum(row["train_seconds"] for row in trainer.rows)
        found["rows"].append({"what": what, "seed": seed, "error": error, "train_seconds": round(seconds, 1)})
        found["machine"] = machine.describe("cpu")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
        say(f"{what}, seed {seed}: {error:.2%} in {seconds:.0f} s")


def table(path: Path = FILE) -> str:
    """Each variation's error on the images held back: mean and range, and by how much it is above the recipe's."""
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    by_seed: dict[str, dict[int, float]] = {}
    for row in found["rows"]:
        by_seed.setdefault(row["what"], {})[row["seed"]] = row["error"]
    recipe = by_seed["projected"]
    lines = []
    for what, errors in by_seed.items():
        above = [error - recipe[seed] for seed, error in errors.items() if what != "projected"]
        lines.append((what, results.errors(list(errors.values())), _points(above), str(len(errors))))
    about = found["machine"]
    where = f"{about['cpu']}, torch {about['torch']}, {about['date'][:10]}"
    columns = ("changed alone", "error", "above projected, points", "seeds")
    return f"{page.table(columns, lines)}\n\nMean and range over the seeds; differences are of the same seed. {where}."


def _points(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    least, most = (100 * of(differences) for of in (min, max))
    return f"{100 * sum(differences) / len(differences):+.2f} [{least:+.2f}, {most:+.2f}]"
