"""One picture of a finished run: error and rows kept over epochs, goodness of both sides, first-layer features."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..objectives import AnyObjective, Objective
from .checkpoint import write_atomically
from .metrics import Row
from .run import summary
from .train import Trainer

PICTURE = "picture.png"
MISSING = "matplotlib is not installed, so there will be no picture: pip install 'ffkernels[train]'"

POSITIVE, NEGATIVE, INK, FAINT = "#1b7f79", "#d1495b", "#222222", "#9a9a9a"
STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "legend.frameon": False,
    "text.color": INK,
}
BINS = 70
TILES = 10  # features shown in each direction


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def unavailable(trainer: Trainer) -> str | None:
    """Why a trainer's picture cannot be drawn once it has finished; None where nothing is known against it."""
    if not available():
        return MISSING
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"matplotlib cannot be imported ({type(error).__name__}: {error}), so there will be no picture"
    if len(trainer.test_labels) < trainer.fewest_rows:
        return f"{trainer.recipe.name} makes negatives from two test images and there is one: no picture"
    return None


def draw(trainer: Trainer, path: Path) -> None:
    """Draws a trained network's picture into the PNG file `path`.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layers = len(trainer.net)
    with rc_context(STYLE):
        figure = Figure(figsize=(14, 8), layout="constrained")
        figure.suptitle(f"Forward-Forward: {summary(trainer)}", x=0.01, ha="left", fontsize=12)
        heights = (2 + layers // 4, *[1] * layers)
        grid = figure.add_gridspec(1 + layers, 3, width_ratios=(1.5, 1, 3.1), height_ratios=heights)
        error_curves(figure.add_subplot(grid[0, 0]), trainer.rows)
        kept_curves(figure.add_subplot(grid[0, 1]), trainer.rows)
        sides = trainer.test_goodness()
        for i, layer in enumerate(trainer.net):
            positive, negative = (side[:, i] for side in sides)
            axes = figure.add_subplot(grid[1 + i, 0])
            axes.set_title(f"Layer {i + 1}: goodness of test images")
            goodness_histogram(axes, positive, negative, layer.objective)
            if i == 0:
                axes.legend(fontsize=8)
            axes = figure.add_subplot(grid[1 + i, 1])
            difference_histogram(axes, positive - negative, layer.objective)
        features(figure.add_subplot(grid[:, 2]), trainer)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def error_curves(axes: Any, rows: list[Row]) -> None:
    """Errors over epochs."""
    curves = (
        ("test_error_classifier", "test, by classifier", {"color": POSITIVE, "marker": "o"}),
        ("test_error_goodness", "test, by goodness", {"color": NEGATIVE, "marker": "s"}),
        ("train_error_classifier", "training, by classifier", {"color": FAINT, "linestyle": "--"}),
    )
    for key, label, look in curves:
        points = [(row["epoch"], 100 * row[key]) for row in rows if row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **look)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    least, most = axes.get_ylim()
    # Within less than a decade each line has its number.
    shown = "25" if most > 5 * least else "123456789"
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}%" if f"{value:e}"[0] in shown else "")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Error", xlabel="epoch")
    axes.grid(axis="y", which="both", color=FAINT, alpha=0.25)
    axes.legend(fontsize=8)


def kept_curves(axes: Any, rows: list[Row]) -> None:
    """How many rows took part in the updates, over epochs."""
    epochs = [row["epoch"] for row in rows]
    for i, shares in enumerate(zip(*(row["kept"] for row in rows), strict=True)):
        axes.plot(epochs, [100 * share for share in shares], label=f"layer {i + 1}", marker="o", markersize=3)
    axes.set_ylim(0, 103)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Rows that took part in updates", xlabel="epoch")
    axes.legend(fontsize=8, ncols=2)


def goodness_histogram(axes: Any, positive: Tensor, negative: Tensor, objective: AnyObjective) -> None:
    """Goodness of test images as positive and as negative rows, `[images]` each."""
    sides = ("positive", "negative") if objective.classes is None else ("own class", "best of the others")
    low, high = _range(torch.cat([positive, negative]))
    for values, label, color in zip((positive, negative), sides, (POSITIVE, NEGATIVE), strict=True):
        axes.hist(values.clamp(low, high).tolist(), BINS, range=(low, high), label=label, color=color, alpha=0.6)
    if isinstance(objective, Objective) and objective.loss in ("logistic", "pvn"):
        axes.axvline(objective.thresholds()[0], color=INK, linestyle=":", label="threshold")
    _without_counts(axes)


def difference_histogram(axes: Any, difference: Tensor, objective: AnyObjective) -> None:
    """By how much the positive side is above the negative one; in the title, for how many images the layer is right."""
    low, high = _range(difference)
    right = (difference > 0) if objective.maximize else (difference < 0)
    axes.hist(difference.clamp(low, high).tolist(), BINS, range=(low, high), color=FAINT)
    axes.axvline(0, color=INK, linestyle=":")
    sides = "positive minus negative" if objective.classes is None else "own minus best other"
    axes.set_title(f"{sides} ({right.float().mean().item():.1%})")
    _without_counts(axes)


def _range(values: Tensor) -> tuple[float, float]:
    """Where all but the outermost thousandths lie, which would squeeze the rest into a corner."""
    low, high = values.quantile(0.001).item(), values.quantile(0.999).item()
    return low, max(high, low + 1e-6)


def _without_counts(axes: Any) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def features(axes: Any, trainer: Trainer) -> None:
    """Weights of the first layer as images."""
    weight, label = next(iter(trainer.net)).weight, trainer.recipe.label
    if label == "columns":
        weight = weight[:, trainer.data.num_classes :]
    label_pixels = trainer.data.num_classes if label == "pixels" else 0
    shape = trainer.data.shape if weight.dim() == 2 else tuple(weight.shape[1:])
    image = mosaic(weight.detach().cpu(), label_pixels, shape)
    axes.imshow(image.tolist(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    left_out = "; label pixels left out" if label_pixels else ""
    axes.set_title(f"Weights of the first layer, largest first (red +, blue -{left_out})")


def mosaic(weight: Tensor, label_pixels: int, shape: tuple[int, ...]) -> Tensor:
    """The units with the largest weights as a grid of images, each scaled to -1..1; NaN is blank.

    `weight` `[units, ...]`, as many numbers as a `shape` `(channels, height, width)` has; of colours the mean is shown.
    """
    _, height, width = shape
    images = weight.reshape(-1, *shape).mean(1).flatten(1)
    images[:, :label_pixels] = 0
    images = images[images.norm(dim=1).argsort(descending=True)[: TILES**2]]
    images /= images.abs().amax(1, keepdim=True).clamp(min=torch.finfo(images.dtype).tiny)
    images[:, :label_pixels] = math.nan
    tiles = torch.full((TILES**2, height + 1, width + 1), math.nan)
    tiles[: len(images), :height, :width] = images.view(-1, height, width)
    return tiles.view(TILES, TILES, height + 1, width + 1).transpose(1, 2).flatten(2).flatten(0, 1)
