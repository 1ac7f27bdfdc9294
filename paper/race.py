"""Forward-Forward against backpropagation on one network: how long each trains until its test error is low.

The same images, batches, schedule and machine for all; what a learner needs is counted (classifier, neutral pass, the
making of batches), tests are not. Backpropagation runs at each of five rates, with labels smoothed and not, and counts
by what reached the target soonest: a choice on the test images, in its favour.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench import machine
from ffkernels.recipes.catalogue import RECIPES, Recipe
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import curves, page, results

FOLDER, PAGE = Path("results", "backprop"), Path("docs", "explanation", "cost.md")
SEEDS = (0, 1, 2, 3, 4)
LOOKS = 4


@dataclass(frozen=True)
class Race:
    """One network, and who trains it.

    Attributes:
        what: of the command line; "-" and what follows it is in the names of its files.
        names: recipes; the first one's batches and schedule are backpropagation's too.
        rates, smoothings: of backpropagation, each with each.
        targets: errors; the last one is that by which a setting is the best.
        shown: the errors that the picture shows.
    """

    what: str
    names: tuple[str, ...]
    targets: tuple[float, ...]
    shown: tuple[float, float]
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
    smoothings: tuple[float, ...] = (0.0, 0.1)

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.what}.json"

    @property
    def picture(self) -> Path:
        return PAGE.parent / f"{self.what}.png"

    @property
    def marks(self) -> tuple[str, str]:
        return f"<!-- {self.what}: made by `python -m ffkernels paper tables` -->", f"<!-- /{self.what} -->"


LINEAR = Race("race", ("quick", "hard-negatives"), (0.02, 0.015), (0.011, 0.11))
CONVOLUTIONS = Race("race-convolutions", ("conv-quick",), (0.015, 0.01), (0.006, 0.11), smoothings=(0.1,))
RACES = {race.what: race for race in (LINEAR, CONVOLUTIONS)}

Row = dict[str, Any]
Say = Callable[[str], object]


def measure(
    race: Race, data: Dataset, say: Say, recipes: Sequence[Recipe] | None = None, seeds: Sequence[int] = SEEDS
) -> list[Row]:
    """A row for each learner and seed: its curve, as `curves.Curve` has it."""
    runners = [RECIPES[name] for name in race.names] if recipes is None else recipes
    rows: list[Row] = []

    def add(seed: int, recipe: Recipe, learner: Row) -> None:
        of = Trainer(recipe, data, seed=seed)
        row = {**learner, "seed": seed, **_curve(of, learner).row()}
        rows.append(row)
        say(f"{name_of(row)}, seed {seed}: {row['errors'][-1]:.2%} in {row['seconds'][-1]:.1f} s")

    # Seed by seed, so that a machine that drifts meets all learners alike.
    for seed in seeds:
        for recipe in runners:
            add(seed, recipe, {"learner": recipe.name})
        for rate, smoothing in product(race.rates, race.smoothings):
            add(seed, runners[0], {"learner": "backprop", "lr": rate, "label_smoothing": smoothing})
    best_of = {name: best(race, rows)[0][name] for name in ("lr", "label_smoothing")}
    for seed in seeds:
        add(seed, runners[0], {"learner": "compiled backprop", **best_of})
    return rows


def _curve(of: Trainer, learner: Row) -> curves.Curve:
    if "lr" not in learner:
        return curves.forward_forward(of, LOOKS)
    rate, smoothing = learner["lr"], learner["label_smoothing"]
    compiled = learner["learner"] != "backprop"
    return curves.backpropagation(of, rate, LOOKS, label_smoothing=smoothing, compiled=compiled)


def best(race: Race, rows: Sequence[Row]) -> list[Row]:
    """Backpropagation's rows at the rate and smoothing that reach the last target in the fewest seconds, by median."""
    by_setting: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        if row["learner"] == "backprop":
            by_setting.setdefault((row["lr"], row["label_smoothing"]), []).append(row)
    return min(by_setting.values(), key=lambda of: (_median(of, race.targets[-1]), statistics.median(_ends(of))))


def reached(row: Row, target: float) -> float:
    """Seconds until the error was first at most the target; infinity where it never was."""
    found = (after for error, after in zip(row["errors"], row["seconds"], strict=True) if error <= target)
    return next(found, math.inf)


def _median(rows: Sequence[Row], target: float) -> float:
    return statistics.median(reached(row, target) for row in rows)


def _ends(rows: Sequence[Row]) -> list[float]:
    return [row["errors"][-1] for row in rows]


def name_of(row: Row) -> str:
    """A learner in words."""
    if "lr" not in row:
        return f"Forward-Forward, {row['learner']}"
    return f"{row['learner']}, rate {row['lr']:g}" + (", labels smoothed" if row["label_smoothing"] else "")


def save(race: Race, data: Dataset, say: Say, path: Path | None = None) -> None:
    """Measures, and writes it as data."""
    path = path or race.file
    about = machine.describe("cpu")
    rows = measure(race, data, say)
    found = {"machine": about, "data": data.name, "recipe": _conditions(RECIPES[race.names[0]]), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


def _conditions(recipe: Recipe) -> Row:
    channels = [f"{of.channels} channels pooled by {of.pool}" for of in recipe.convolutions]
    layers = [*(channels or ["784"]), *map(str, recipe.hidden)]
    return {"layers": layers, "batch_size": recipe.batch_size, "epochs": recipe.epochs}


def shown(race: Race, rows: Sequence[Row]) -> list[list[Row]]:
    """The learners of table and picture, each with its seeds: of backpropagation the best."""
    ours = [[row for row in rows if row["learner"] == name] for name in race.names]
    compiled = [row for row in rows if row["learner"] == "compiled backprop"]
    return [of for of in (*ours, best(race, rows), compiled) if of]


def not_yet(race: Race) -> str:
    return f"Not measured yet: `python -m ffkernels paper {race.what}` does."


def table(race: Race, path: Path | None = None) -> str:
    """Each learner's seconds to the targets, medians over seeds, and its error at the end."""
    path = path or race.file
    if not path.exists():
        return not_yet(race)
    found = json.loads(path.read_text())
    plain = best(race, found["rows"])
    lines = []
    for of in shown(race, found["rows"]):
        times = [_seconds(_median(of, target), len(of)) for target in race.targets]
        over = _median(of, race.targets[-1]) / _median(plain, race.targets[-1])
        ends = results.errors(_ends(of))
        lines.append((name_of(of[0]), *times, f"{over:.2f}" if math.isfinite(over) else "", ends, str(len(of))))
    about, of_race = found["machine"], found["recipe"]
    columns = (
        "learner",
        *(f"to {target:.1%}" for target in race.targets),
        "over backprop",
        "error at the end",
        "seeds",
    )
    layers = "-".join(map(str, of_race["layers"]))
    where = (
        f"{layers}, batches of {of_race['batch_size']}, {of_race['epochs']} epochs, float32, {found['data']}. "
        f"Medians over the seeds of seconds of training. {machine.in_words(about)}, {about['date'][:10]}."
    )
    return f"{page.table(columns, lines)}\n\n{where}"


def _seconds(value: float, seeds: int) -> str:
    return f"{value:.1f} s" if math.isfinite(value) else f"not under most of {seeds} seeds"


def draw(race: Race, path: Path | None = None, picture: Path | None = None) -> None:
    """Error over seconds: the median over the seeds, and a band from the least to the most.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for of in shown(race, json.loads((path or race.file).read_text())["rows"]):
        errors = [sorted(column) for column in zip(*(row["errors"] for row in of), strict=True)]
        seconds = [statistics.median(column) for column in zip(*(row["seconds"] for row in of), strict=True)]
        (line,) = axes.plot(seconds, [100 * statistics.median(column) for column in errors], label=name_of(of[0]))
        low, high = ([100 * column[at] for column in errors] for at in (0, -1))
        axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    ticks = (0.7, 1, 1.5, 2, 3, 5, 10)
    axes.set_yticks(ticks, [f"{tick:g}%" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(*(100 * error for error in race.shown))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("test error on MNIST")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture or race.picture, dpi=110)
