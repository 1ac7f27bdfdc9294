"""Which short recipe is the best: successive halving over random choices, on images held back from training.

Candidates are `quick`, `hard-negatives` and draws from `CHOICES`, all of `EPOCHS` epochs, trained on all but the last
10,000 training images and judged on these. Those that are better after one epoch go on to the second, the better of
these to the end; the best there, the best as wide as `quick`, and `quick` are trained under further seeds. Of all that,
only the winner is trained on all training images and tested on the test images, once.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import machine
from ffkernels.recipes.catalogue import HARD_NEGATIVES, QUICK, Recipe, Rule
from ffkernels.recipes.checkpoint import write_atomically
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page, results
from .variations import held_back

FILE = Path("results", "backprop", "search.json")
BEGIN, END = "<!-- search: made by `python -m ffkernels paper tables` -->", "<!-- /search -->"
NOT_YET = "Not measured yet: `python -m ffkernels paper search` does."
EPOCHS = 5
DRAWN, DRAWN_BY = 34, 0  # how many candidates besides the two recipes, and the seed that draws them
# After so many epochs so many candidates are left.
RUNGS = ((1, 16), (2, 7))
FINALISTS, SEEDS = 3, (0, 1, 2)

Changes = dict[str, Any]
Row = dict[str, Any]
Say = Callable[[str], object]

# What makes a loss what it is, and the choices that it alone has.
LOSSES: Mapping[str, tuple[Changes, Mapping[str, Sequence[Any]]]] = {
    "heads": ({}, {"norm": ("rms", "l2", "none"), "label_smoothing": (0.0, 0.1, 0.2)}),
    "class groups": (
        {"head": None},
        {
            "norm": ("rms", "l2", "none"),
            "label_smoothing": (0.0, 0.1),
            "goodness": ("mean", "sum"),
            "temperature": (0.1, 1.0),
        },
    ),
    "swish": (
        {"loss": "swish", "alpha": 6.0},
        {"norm": ("rms", "l2"), "goodness": ("mean", "sum"), "negatives_temperature": (0.5, 1.0, 2.0)},
    ),
    "symba": (
        {"loss": "symba", "alpha": 4.0},
        {"norm": ("rms", "l2"), "goodness": ("mean", "sum"), "negatives_temperature": (0.5, 1.0, 2.0)},
    ),
}
OF_SIDES: Changes = {
    name: getattr(HARD_NEGATIVES, name) for name in ("head", "label", "negatives", "classifier", "label_smoothing")
}
CHOICES: Mapping[str, Sequence[Any]] = {
    # Of heads two in five, as they were the best before.
    "kind": ("heads", "heads", "class groups", "swish", "symba"),
    "hidden": ((500, 500), (500, 500), (1000, 1000)),
    "rate": (5e-4, 1e-3, 2e-3, 3e-3, 5e-3),
    "fall": ("constant, then linear to 1/E", "constant, then linear to 2/E", "cosine"),
    "batch_size": (64, 128, 256),
    "dropout": (0.0, 0.1, 0.2),
    "jitter": (0, 0, 1),
}
# With E epochs; what the last of them has of the rate.
FALLS: Mapping[str, Changes] = {
    "constant, then linear to 1/E": {"cooldown": 1.0},
    "constant, then linear to 2/E": {"cooldown": 2.0},
    "cosine": {"cooldown": None, "cosine": 0.0},
}


def drawn(count: int = DRAWN, seed: int = DRAWN_BY) -> list[Changes]:
    """Choices for so many candidates, the same ones for the same seed."""
    chance = random.Random(seed)
    found: list[Changes] = []
    while len(found) < count:
        choice = {name: chance.choice(values) for name, values in CHOICES.items()}
        choice |= {name: chance.choice(values) for name, values in LOSSES[choice["kind"]][1].items()}
        if choice not in found:
            found.append(choice)
    return found


def recipe_of(choice: Changes, epochs: int = EPOCHS) -> Recipe:
    """The recipe that some choices make of `quick`; a name alone is one of the catalogue."""
    if "recipe" in choice:
        of = {"quick": QUICK, "hard-negatives": HARD_NEGATIVES}[choice["recipe"]]
        return replace(of, epochs=epochs, goodness_every=1 if of.of_classes else epochs)
    changes = {name: value for name, value in choice.items() if name not in ("kind", "rate", "fall")}
    kind = LOSSES[choice["kind"]][0]
    if "loss" in kind:
        changes = OF_SIDES | changes
    changes |= kind | FALLS[choice["fall"]] | {"layers": Rule("adam", lr=choice["rate"])}
    changes["hidden"] = tuple(changes["hidden"])
    recipe = replace(QUICK, name="candidate", epochs=epochs, **changes)
    return recipe if recipe.of_classes else replace(recipe, goodness_every=epochs)


class Search:
    """The runs that were taken, those of `path` first, and what they are taken on.

    Attributes:
        rows: of each candidate and seed its choices, errors after each epoch and seconds of training.
    """

    def __init__(self, data: Dataset, say: Say, path: Path, epochs: int) -> None:
        self.data, self.split, self.say, self.path, self.epochs = data, held_back(data), say, path, epochs
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"data": data.name, "rows": []}
        self.rows: list[Row] = self.found["rows"]
        self._trainers: dict[tuple[str, int], Trainer] = {}

    def errors(self, choice: Changes, seed: int, epochs: int) -> list[float]:
        """Errors on the images held back after each of the first epochs; infinity where the training has diverged."""
        row = next((row for row in self.rows if row["choice"] == _plain(choice) and row["seed"] == seed), None)
        if row is None:
            row = {"choice": _plain(choice), "seed": seed, "errors": [], "train_seconds": 0.0}
            self.rows.append(row)
        if len(row["errors"]) < epochs and None not in row["errors"]:
            key = (json.dumps(row["choice"]), seed)
            if key not in self._trainers:
                self._trainers[key] = Trainer(recipe_of(choice, self.epochs), self.split, seed=seed)
            self._train(self._trainers[key], row, epochs)
        return [math.inf if error is None else error for error in row["errors"][:epochs]]

    def _train(self, trainer: Trainer, row: Row, epochs: int) -> None:
        try:
            while len(trainer.rows) < epochs:
                trainer.run_epoch(lambda describe: False)
        except FloatingPointError:
            row["errors"] = [*map(_error_of, trainer.rows), None]
        else:
            row["errors"] = [*map(_error_of, trainer.rows)]
        row["train_seconds"] = round(sum(epoch["train_seconds"] for epoch in trainer.rows), 1)
        self.save()
        self.say(f"{in_words(row['choice'])}, seed {row['seed']}: {_percent(row['errors'])}")

    def save(self) -> None:
        """Writes all that is found."""
        self.found["machine"] = machine.describe("cpu")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: file.write((json.dumps(self.found, indent=1) + "\n").encode()))

    def halve(self, candidates: Sequence[Changes], rungs: Sequence[tuple[int, int]]) -> list[Changes]:
        """The candidates that are left after the last rung, trained to the end, the best one first."""
        left = list(candidates)
        for epochs, count in (*rungs, (self.epochs, len(left))):
            by_error = [(self.errors(choice, SEEDS[0], epochs)[-1], i) for i, choice in enumerate(left)]
            left = [left[i] for _, i in sorted(by_error)[:count]]
        return left

    def mean(self, choice: Changes, seeds: Sequence[int]) -> float:
        """The mean error at the end over some seeds."""
        return statistics.fmean(self.errors(choice, seed, self.epochs)[-1] for seed in seeds)

    def test(self, choice: Changes) -> None:
        """Trains the winner on all training images, and looks at the test images once, at the end."""
        if "test" in self.found:
            return
        known = self.split.test_images, self.split.test_labels
        trainer = Trainer(
            recipe_of(choice, self.epochs), replace(self.data, test_images=known[0], test_labels=known[1])
        )
        while not trainer.finished:
            trainer.run_epoch(lambda describe: False)
        trainer.test_images, trainer.test_labels = self.data.test_images, self.data.test_labels
        error = trainer.goodness_error() if trainer.classifier is None else trainer.classifier_error()
        self.found["test"] = {"choice": _plain(choice), "seed": 0, "error": error}
        self.save()


def save(
    data: Dataset,
    say: Say,
    path: Path = FILE,
    *,
    candidates: Sequence[Changes] | None = None,
    rungs: Sequence[tuple[int, int]] = RUNGS,
    epochs: int = EPOCHS,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """The search; what `path` has of it already is not run again."""
    search = Search(data, say, path, epochs)
    named: list[Changes] = [{"recipe": "quick"}, {"recipe": "hard-negatives"}]
    left = search.halve([*named, *(drawn() if candidates is None else candidates)], rungs)
    finalists = left[:FINALISTS]
    as_wide = [choice for choice in left if recipe_of(choice).hidden == QUICK.hidden]
    # Of networks as wide as quick's the best too, and quick.
    finalists += [choice for choice in (*as_wide[:1], named[0]) if choice not in finalists]
    search.found["finalists"] = [_plain(choice) for choice in finalists]
    best = min(finalists, key=lambda choice: search.mean(choice, seeds))
    search.test(best)


def _plain(choice: Changes) -> Changes:
    """As JSON has it."""
    plain: Changes = json.loads(json.dumps(choice))
    return plain


def _error_of(row: Row) -> float:
    by_classifier, by_goodness = row["test_error_classifier"], row["test_error_goodness"]
    return float(by_goodness if by_classifier is None else by_classifier)


def _percent(errors: Sequence[float | None]) -> str:
    return ", ".join("diverged" if error is None else f"{error:.2%}" for error in errors)


def in_words(choice: Changes) -> str:
    """A candidate's choices in a line."""
    if "recipe" in choice:
        return str(choice["recipe"])
    words = [choice["kind"], "-".join(map(str, choice["hidden"])), f"rate {choice['rate']:g}"]
    words += [choice["fall"], f"batches of {choice['batch_size']}"]
    words += [f"{choice['dropout']:.0%} of pixels dropped"] * bool(choice["dropout"])
    words += [f"shifted by {choice['jitter']}"] * bool(choice["jitter"])
    own = LOSSES[choice["kind"]][1]
    return ", ".join([*words, *(f"{name.replace('_', ' ')} {choice[name]}" for name in own)])


def table(path: Path = FILE) -> str:
    """The finalists under all seeds; every candidate under the first one; what the winner's test came to."""
    if not path.exists():
        return NOT_YET
    found = json.loads(path.read_text())
    rows: list[Row] = found["rows"]
    finalists = [(choice, [row for row in rows if row["choice"] == choice]) for choice in found["finalists"]]
    finalists.sort(key=lambda pair: statistics.fmean(row["errors"][-1] for row in pair[1]))
    quick = {row["seed"]: row["errors"][-1] for row in rows if row["choice"] == {"recipe": "quick"}}
    lines = []
    for choice, of in finalists:
        above = [row["errors"][-1] - quick[row["seed"]] for row in of]
        points = f"{100 * statistics.fmean(above):+.2f} [{100 * min(above):+.2f}, {100 * max(above):+.2f}]"
        ends = results.errors([row["errors"][-1] for row in of])
        own = choice == {"recipe": "quick"}
        lines.append((in_words(choice), ends, "" if own else points, str(len(of))))
    about, test = found["machine"], found["test"]
    parts = [
        page.table(("candidate", "error", "above quick, points", "seeds"), lines),
        f"Mean and range over the seeds, on the 10,000 images held back; differences are of the same seed. The best of "
        f"them, {in_words(test['choice'])}, trained on all images, has {test['error']:.2%} of the test images wrong.",
    ]
    firsts = [row for row in rows if row["seed"] == SEEDS[0]]
    kinds: dict[str, list[Row]] = {}
    for row in firsts:
        kinds.setdefault(row["choice"].get("kind", row["choice"].get("recipe")), []).append(row)
    by_kind = [
        (kind, str(len(of)), _least(of, 1), str(sum(len(row["errors"]) >= EPOCHS for row in of)), _least(of, EPOCHS))
        for kind, of in kinds.items()
    ]
    columns = ("loss", "candidates", "best after one epoch", "trained to the end", "best at the end")
    where = f"{machine.in_words(about)}, commit {about['commit']}, {about['date'][:10]}."
    return "\n\n".join([*parts, page.table(columns, by_kind), where])


def _least(rows: Sequence[Row], epochs: int) -> str:
    """The least error after so many epochs."""
    found = [row["errors"][epochs - 1] for row in rows if len(row["errors"]) >= epochs]
    known = [error for error in found if error is not None]
    return f"{min(known):.2%}" if known else ""
