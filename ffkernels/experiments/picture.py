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
        f"Forward-Forward on {trainer.data.name}, preset {trainer.preset.name}, {widths}: test error "
        f"{last['test_error_classifier']:.2%} by classifier, {last['test_error_goodness']:.2%} by goodness, "
        f"{len(trainer.rows)} epochs in {seconds:.0f} s"
    )


def _error_curves(axes: Any, rows: list[Row]) -> None:
    curves = (
        ("test_error_classifier", "test, by classifier", {"color": POSITIVE, "marker": "o"}),
        ("test_error_goodness", "test, by goodness", {"color": NEGATIVE, "marker": "s"}),
        ("train_error_classifier", "training, by classifier", {"color": FAINT, "linestyle": "--"}),
    )
    for key, label, look in curves:
        points = [(row["epoch"], 100 * row[key]) for row in rows if row[key] is not None]
        axes.plot(*zip(*points, strict=True), label=label, markersize=4, **look)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}%" if f"{value:e}"[0] in "25" else "")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Error", xlabel="epoch")
    axes.grid(axis="y", which="both", color=FAINT, alpha=0.25)
    axes.legend()


def _goodness_histograms(all_axes: Any, trainer: Trainer) -> None:
    sides = trainer.test_goodness()
    for i, (axes, layer) in enumerate(zip(all_axes, trainer.net.layers, strict=True)):
        both = torch.stack([side[:, i] for side in sides])
        # The outermost thousandth would squeeze the rest into a corner.
        low, high = both.quantile(0.001).item(), both.quantile(0.999).item()
        for values, label, color in zip(both, ("positive", "negative"), (POSITIVE, NEGATIVE), strict=True):
            axes.hist(values.clamp(low, high).tolist(), BINS, (low, high), label=label, color=color, alpha=0.65)
        if not layer.objective.paired:
            axes.axvline(layer.objective.threshold, color=INK, linestyle=":", label="threshold")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_title(f"Layer {i + 1}: goodness of test images")
    all_axes[0].legend()
    kind = trainer.net.layers[0].objective.goodness
    all_axes[-1].set_xlabel(f"{kind} of squared activities; positive: right label, negative: a wrong one")


def _features(axes: Any, trainer: Trainer) -> None:
    """The weights of the first units, each scaled by its own largest, as one mosaic of images."""
    weight = trainer.net.layers[0].weight.detach().cpu()
    axes.imshow(mosaic(weight, trainer.data.num_classes).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title("First layer: weights (red +, blue -; label pixels left out)")


def mosaic(weight: Tensor, label_pixels: int) -> Tensor:
    """Weights `[units, pixels]` of the first units as images in a grid, scaled to -1..1 each; NaN where nothing is shown."""
    rows, columns = GRID
    side = math.isqrt(weight.shape[1])
    tiles = torch.full((rows * columns, side + 1, side + 1), math.nan)
    shown = weight[: len(tiles), : side * side].clone()
    shown[:, :label_pixels] = math.nan
    shown /= shown.abs().nan_to_num().amax(1, keepdim=True).clamp(min=torch.finfo(shown.dtype).tiny)
    tiles[: len(shown), :side, :side] = shown.view(-1, side, side)
    return tiles.view(rows, columns, side + 1, side + 1).transpose(1, 2).reshape(rows * (side + 1), -1)
