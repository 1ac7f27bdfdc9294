"""What narrower products and rows left out cost in error and save in time: one recipe, all combinations, 3 seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch

from ffkernels.recipes import checkpoint
from ffkernels.recipes.catalogue import ABLATION, Recipe
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.train import Trainer

from . import page, results

FOLDER = Path("results", "ablation")
BEGIN, END = "<!-- ablation: made by `python -m ffkernels paper tables` -->", "<!-- /ablation -->"
NONE_YET = "No run is recorded yet: `python -m ffkernels paper ablation` makes them."
SEEDS = (0, 1, 2)
COMPUTE_DTYPES = (None, torch.bfloat16)
SKIP_BELOW = (0.0, 1e-6, 1e-3, 3e-2)
COLUMNS = (
    "products", "rows left out below", "error by classifier", "by goodness", "seeds", "seconds of training",
    "rows kept by layer",
)  # fmt: skip


def run(data: Dataset, folder: Path, say: Callable[[str], object], recipe: Recipe = ABLATION) -> list[Path]:
    """Trains every combination that has no row in `folder` yet; a run that is interrupted is lost.

    Raises:
        OSError: before a run whose row could not be written.
    """
    written = []
    # Seed by seed and next to each other, so that a machine that drifts meets all of them alike.
    for seed, dtype, skip in product(SEEDS, COMPUTE_DTYPES, SKIP_BELOW):
        trainer = Trainer(recipe, data, seed=seed, compute_dtype=dtype, skip_below=skip)
        name = results.name_of(results.identity(trainer))
        path = results.path_of(folder, results.identity(trainer))
        if path.exists():
            continue
        checkpoint.try_writing(path)
        while not trainer.finished:
            trainer.run_epoch(lambda describe: False)
        row = results.row_of(trainer)
        written.append(results.write(folder, row))
        say(f"{name}: {row['error_classifier']:.2%} by classifier, {row['train_seconds']:.1f} s")
    return written


def table(rows: Sequence[results.Row]) -> str:
    """The rows in Markdown: a line for each combination, mean and range over its seeds."""
    if not rows:
        return NONE_YET
    groups: dict[tuple[str, float], list[results.Row]] = {}
    for row in sorted(rows, key=lambda row: (row["compute_dtype"] != "float32", row["skip_below"])):
        groups.setdefault((row["compute_dtype"], row["skip_below"]), []).append(row)
    lines = []
    for (dtype, skip), of_group in groups.items():
        seconds = [row["train_seconds"] for row in of_group]
        if len({len(row["kept"]) for row in of_group}) > 1:
            raise ValueError(f"rows of {dtype}, {skip:g}: their `kept` are not of the same number of layers")
        kept = [statistics.mean(shares) for shares in zip(*(row["kept"] for row in of_group), strict=True)]
        cells = (
            dtype,
            f"{skip:g}" if skip else "0 (exact)",
            results.errors([row["error_classifier"] for row in of_group]),
            results.errors([row["error_goodness"] for row in of_group]),
            str(len(of_group)),
            f"{statistics.mean(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}]",
            " ".join(f"{share:.1%}" for share in kept),
        )
        lines.append(cells)
    where = {f"{row['device']}, {row['threads']} threads, {row['data']}, {row['epochs']} epochs" for row in rows}
    return f"{page.table(COLUMNS, lines)}\n\nMean and range over the seeds; {'; '.join(sorted(where))}."
