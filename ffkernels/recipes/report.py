"""A finished run as one page of HTML that needs nothing else: errors, goodness, features, epochs, what was trained."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from . import picture
from .checkpoint import write_atomically
from .run import summary
from .train import Trainer

REPORT = "report.html"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 60rem; padding: 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
.pair { display: flex; flex-wrap: wrap; gap: 1rem } .pair figure { flex: 1 1 18rem; margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
"""  # noqa: E501


def write(trainer: Trainer, path: Path) -> None:
    """Writes the page of a finished run.

    Raises:
        ImportError: without matplotlib.
        OSError: naming `path`, where it cannot be written.
    """
    last = trainer.rows[-1]
    errors = [
        f"{last[key]:.2%} {reader}"
        for key, reader in (("test_error_classifier", "by classifier"), ("test_error_goodness", "by goodness"))
        if last[key] is not None
    ]
    about = f"Error over {len(trainer.rows)} epochs; at the end {', '.join(errors)}."
    curves = [
        _figure(about, picture.error_curves, trainer.rows),
        _figure("Rows that took part in each layer's updates, over epochs.", picture.kept_curves, trainer.rows),
    ]
    sections = [f"<h2>Training</h2>{_pair(curves)}", *_layers(trainer)]
    sections.append(f"<h2>What the first layer looks for</h2>{_features(trainer)}")
    sections.append(f"<h2>Epochs</h2>{_epochs(trainer)}")
    sections.append(f"<h2>What was trained</h2>{_settings(trainer)}")
    title = html.escape(f"Forward-Forward: {summary(trainer)}")
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(sections)}</body></html>\n"
    )
    write_atomically(path, lambda file: file.write(text.encode()))


def _layers(trainer: Trainer) -> Iterable[str]:
    sides = trainer.test_goodness()
    for i, layer in enumerate(trainer.net):
        positive, negative = (side[:, i] for side in sides)
        of_classes = layer.objective.classes is not None
        names = ("their own class", "the best other one") if of_classes else ("positive", "negative")
        means = f"on average {positive.mean().item():.3g} and {negative.mean().item():.3g}"
        about = f"Layer {i + 1}: goodness of test images, {names[0]} and {names[1]}, {means}."
        by_how_much = f"Layer {i + 1}: the difference of the two."
        figures = [
            _figure(about, picture.goodness_histogram, positive, negative, layer.objective),
            _figure(by_how_much, picture.difference_histogram, positive - negative, layer.objective),
        ]
        yield f"<h2>Layer {i + 1}</h2>{_pair(figures)}"


def _figure(about: str, draw: Callable[..., None], *of: Any, size: tuple[float, float] = (5, 3)) -> str:
    """A panel of the run's picture, with what it shows in words."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**picture.STYLE, "svg.fonttype": "none", "svg.hashsalt": "ffkernels"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes, *of)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    words = html.escape(about)
    data = base64.b64encode(drawn.getvalue()).decode()
    return (
        f'<figure><img alt="{words}" src="data:image/svg+xml;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def _pair(figures: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def _features(trainer: Trainer) -> str:
    return _figure("The units of the first layer with the largest weights.", picture.features, trainer, size=(7, 7))


def _epochs(trainer: Trainer) -> str:
    columns = ("epoch", "by classifier", "by goodness", "loss of each layer", "seconds")
    rows = []
    for row in trainer.rows:
        errors = (row["test_error_classifier"], row["test_error_goodness"])
        shown = ["" if error is None else f"{error:.2%}" for error in errors]
        rows.append(
            [str(row["epoch"]), *shown, " / ".join(f"{loss:.4g}" for loss in row["loss"]), f"{row['seconds']:.1f}"]
        )
    return _table(columns, rows)


def _settings(trainer: Trainer) -> str:
    recipe = trainer.recipe
    words = {"source": recipe.source, "assumed": recipe.assumed, "published error": recipe.published}
    rows = [[name, value] for name, value in words.items() if value]
    rows += [[name, str(value)] for name, value in trainer.settings().items()]
    rows += [["ffkernels", __version__], ["torch", torch.__version__]]
    return _table(("setting", "value"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
