"""One picture of a finished run: error over epochs, goodness of both sides, first-layer features. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .train import Trainer

PICTURE = "picture.png"
MISSING = "matplotlib is not installed, so there will be no picture: pip install matplotlib"

POSITIVE, NEGATIVE, INK, FAINT = "#1b7f79", "#d1495b", "#222222", "#9a9a9a"
BINS = 80
GRID = (8, 12)  # features shown: rows, columns


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(trainer: Trainer, path: Path) -> None:
    """Draws a trained network's picture into the PNG file `path`.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.titlesize": 11,
             "axes.titlelocation": "left", "legend.frameon": False, "font.size": 10, "text.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(14, 8.2), layout="constrained")
        figure.suptitle(title(trainer), x=0.01, ha="left", fontsize=14)
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.12), wspace=0.03)
        curves, histograms = left.subfigures(2, 1, height_ratios=(1, 0.35 + 0.35 * len(trainer.net)))
        _error_curves(curves.subplots(), trainer.rows)
        _goodness_histograms(histograms.subplots(len(trainer.net), 1, squeeze=False)[:, 0], trainer)
        _features(right.subplots(), trainer)
        figure.savefig(path, dpi=120)


def title(trainer: Trainer) -> str:
    """What was trained on what, to which error, in how long."""
    last = trainer.rows[-1]
    widths = "-".join(str(width) for width in (trainer.net.layers[0].in_features, *trainer.preset.hidden))
    seconds = sum(row["seconds"] for row in trainer.rows)
    return (
        f"Forward-Forward on {trainer.data.name}, preset {trainer.name}, {widths}: test error "
        f"{last['test_error_classifier']:.2%} by classifier, {last['test_error_goodness']:.2%} by goodness, "
        f"{len(trainer.rows)} epochs in {seconds:.0f} s"
    )
