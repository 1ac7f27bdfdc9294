"""A run in its folder: metrics and checkpoint after every epoch, and going on from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from . import checkpoint
from .metrics import Row, describe, describe_test
from .progress import Progress
from .train import Trainer

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


def train(trainer: Trainer, output: Path, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Trains the epochs that are still to do; after each writes metrics and checkpoint into the folder `output`.

    Of several processes, which all call this, the first one writes.

    Args:
        trainer: fresh, or brought to where a checkpoint was.
        output: is made where it does not exist.
        should_stop: asked after every step; True ends the run, whose checkpoint then is of the last whole epoch.

    Returns:
        Whether the run is finished.

    Raises:
        OSError: naming the file that cannot be written, before the first epoch where that can be known.
    """
    processes = trainer.processes
    if processes.writes:
        for file in [output / name for name in (CHECKPOINT, METRICS)]:
            checkpoint.try_writing(file)
        if not trainer.rows:
            # A later --resume must not find the run that this one replaces.
            (output / CHECKPOINT).unlink(missing_ok=True)
        write_metrics(output, trainer.rows)
    settings = trainer.settings()
    done = len(trainer.rows) * trainer.steps_per_epoch
    with Progress(trainer.epochs * trainer.steps_per_epoch, done, shows=processes.writes) as progress:

        def after_step(describe: Callable[[], str]) -> bool:
            progress.step(describe)
            return processes.any(should_stop())

        while not trainer.finished:
            row = trainer.run_epoch(after_step)
            if row is None:
                return False
            if processes.writes:
                checkpoint.save(output / CHECKPOINT, settings, trainer.state())
                write_metrics(output, trainer.rows)
            numbers = f"epoch {row['epoch']}/{trainer.epochs}: {describe_test(row)}; {describe(row)}"
            progress.line(f"{numbers} ({row['seconds']:.1f} s)")
            if processes.any(should_stop()):
                break
    return trainer.finished


def resume(trainer: Trainer, output: Path) -> bool:
    """Brings a fresh trainer to where the checkpoint in `output` was; False where there is none.

    Raises:
        ValueError: for a checkpoint that is damaged or of other settings; the trainer is as it was.
        OSError: for one that cannot be read.
    """
    path = output / CHECKPOINT
    if not path.exists():
        return False
    state = checkpoint.load(path, trainer.settings())
    try:
        trainer.load_state(state)
    except ValueError as error:
        raise checkpoint.damaged(path, str(error)) from error
    return True


def write_metrics(output: Path, rows: list[Row]) -> None:
    """One JSON object a line, one line an epoch: errors as fractions, goodness and loss per layer."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    checkpoint.write_atomically(output / METRICS, lambda file: file.write(lines.encode()))


def summary(trainer: Trainer) -> str:
    """What a finished run has come to."""
    seconds = sum(row["seconds"] for row in trainer.rows)
    units = [of.channels for of in trainer.recipe.convolutions] + list(trainer.recipe.hidden)
    widths = "-".join(map(str, (next(iter(trainer.net)).weight.shape[1], *units)))
    dtype = str(trainer.compute_dtype or torch.float32).removeprefix("torch.")
    return (
        f"{trainer.recipe.name} ({widths}) on {trainer.data.name}: {describe_test(trainer.rows[-1])}; "
        f"{len(trainer.rows)} epochs in {seconds:.0f} s on {trainer.device.type}, {dtype} products"
    )
