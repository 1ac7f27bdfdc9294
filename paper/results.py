"""What finished runs have come to: a row of data each, and the table of docs/results.md made of them."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from ffkernels import __version__
from ffkernels.recipes.catalogue import RECIPES
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.metrics import is_number
from ffkernels.recipes.train import MOST_EPOCHS, Trainer

from . import page

FOLDER = "results"
PAGE = Path("docs", "results.md")
BEGIN, END = "<!-- results: made by `python -m ffkernels reproduce --readme` -->", "<!-- /results -->"
NONE_YET = "No run is recorded yet: `python -m ffkernels reproduce NAME` writes one into `results/`."
COLUMNS = (
    "recipe", "epochs", "products", "error by classifier", "by goodness", "published", "seeds",
    "seconds of training",
)  # fmt: skip

Row = dict[str, Any]


def _text(value: object) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_EPOCHS


def _share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _seconds(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


# What the tables read of a row: what it must be, in words and as a test.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("recipe", "data", "compute_dtype", "device"), ("a text", _text)),
    "seed": ("a whole number from 0", lambda value: type(value) is int and value >= 0),
    **dict.fromkeys(("epochs", "threads"), ("a whole number from 1", _count)),
    "skip_below": ("a number in 0..1", _share),
    **dict.fromkeys(
        ("error_classifier", "error_goodness"),
        ("null or a number in 0..1", lambda value: value is None or _share(value)),
    ),
    **dict.fromkeys(("train_seconds", "seconds"), ("a number from 0", _seconds)),
    "kept": ("a list of numbers in 0..1", lambda value: isinstance(value, list) and all(map(_share, value))),
}


def identity(trainer: Trainer) -> Row:
    """The part of a row that is known before the run."""
    return {
        "recipe": trainer.recipe.name,
        "data": trainer.data.name,
        "seed": trainer.seed,
        "epochs": trainer.epochs,
        "compute_dtype": str(trainer.compute_dtype or torch.float32).removeprefix("torch."),
        "skip_below": trainer.skip_below,
    }


def row_of(trainer: Trainer) -> Row:
    """The row of a finished run: errors as fractions, seconds of training alone and with the tests."""
    last = trainer.rows[-1]
    return {
        **identity(trainer),
        "error_classifier": last["test_error_classifier"],
        "error_goodness": last["test_error_goodness"],
        "train_seconds": round(sum(row["train_seconds"] for row in trainer.rows), 1),
        "seconds": round(sum(row["seconds"] for row in trainer.rows), 1),
        "kept": [
            sum(shares) / len(trainer.rows) for shares in zip(*(row["kept"] for row in trainer.rows), strict=True)
        ],
        "device": machine.name_of(trainer.device.type),
        "threads": torch.get_num_threads(),
        "versions": {"ffkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": machine.commit(),
        "date": machine.now(),
    }


def name_of(row: Row) -> str:
    """What tells a run from the others, as a file's name."""
    parts = [row["recipe"], row["data"], f"{row['epochs']}ep", row["compute_dtype"]]
    parts += [f"skip{row['skip_below']:g}"] if row["skip_below"] else []
    return "-".join([*parts, f"seed{row['seed']}"])


def path_of(folder: Path, row: Row) -> Path:
    """One file for each recipe, data, length, dtype, fraction and seed: a later run of the same replaces it."""
    return folder / f"{name_of(row)}.json"


def write(folder: Path, row: Row) -> Path:
    """Writes the row's file."""
    path = path_of(folder, row)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(row, indent=1) + "\n").encode()))
    return path


def load(folder: Path) -> list[Row]:
    """All rows in `folder`.

    Raises:
        ValueError: for a file that is no row, naming what it lacks.
        OSError: for one that cannot be read.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            row = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no row of results ({type(error).__name__}: {error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: no row of results ({type(row).__name__}, not an object)")
        for name, (wanted, is_right) in FIELDS.items():
            if name not in row:
                raise ValueError(f"{path}: no row of results ({name!r} is missing)")
            if not is_right(row[name]):
                raise ValueError(f"{path}: no row of results ({name} {str(row[name])[:80]!r} is not {wanted})")
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown: one line for runs that differ in their seed alone, mean and range of their errors."""
    if not rows:
        return NONE_YET
    groups: dict[tuple[Any, ...], list[Row]] = {}
    order = list(RECIPES)
    for row in sorted(rows, key=lambda row: order.index(row["recipe"]) if row["recipe"] in order else len(order)):
        what = ("recipe", "data", "epochs", "compute_dtype", "skip_below")
        groups.setdefault(tuple(row[name] for name in what), []).append(row)
    lines = []
    for (recipe, data, epochs, dtype, skip), of_group in groups.items():
        known = RECIPES.get(recipe)
        published = known.published if known is not None and data == known.published_on else ""
        cells = (
            recipe + (f" on {data}" if data != "mnist" else ""),
            str(epochs),
            dtype + (f", rows below {skip:g} left out" if skip else ""),
            errors([row["error_classifier"] for row in of_group]),
            errors([row["error_goodness"] for row in of_group]),
            published,
            str(len(of_group)),
            seconds(of_group),
        )
        lines.append(cells)
    return page.table(COLUMNS, lines)


def seconds(rows: Sequence[Row]) -> str:
    """Mean seconds of training on each machine, and with each number of threads."""
    machines: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        machines.setdefault((row["device"], row["threads"]), []).append(row["train_seconds"])
    return "; ".join(
        f"{statistics.mean(times):,.0f} ({device}, {threads} thread{'s' if threads > 1 else ''})"
        for (device, threads), times in machines.items()
    )


def errors(of_runs: Sequence[float | None]) -> str:
    """Mean and range of the errors that are known."""
    found = [error for error in of_runs if error is not None]
    if not found:
        return ""
    mean = f"{statistics.mean(found):.2%}"
    return mean if len(found) == 1 else f"{mean} [{min(found):.2%}, {max(found):.2%}]"


def update_page(path: Path, folder: Path) -> None:
    """Rewrites what stands between the page's two markers.

    Raises:
        ValueError: where a marker is missing, or a file of results is none.
    """
    page.update(path, BEGIN, END, table(load(folder)))
