"""The picture of a result: speed-up and share of the limit per case, and growth along batch, width and depth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffkernels.recipes.picture import FAINT, INK, MISSING, POSITIVE, STYLE, available

from .cases import AXES
from .contenders import OURS
from .machine import in_words
from .report import Result, curves
from .run import Row
from .timing import exponent

__all__ = ["MISSING", "available", "draw", "fingerprint", "kind_of"]

# What a contender is, by the beginning of its name, and how it is drawn; the longest beginning counts.
KINDS = {
    OURS: ("this package", POSITIVE, "o"),
    f"{OURS}, ": ("this package, other backends", "#7cc0b8", "o"),
    f"{OURS}, skip_below": ("this package, an approximation", "#a8c686", "o"),
    f"{OURS}, graph": ("this package, CUDA graph", "#0b4f4a", "o"),
    "fflib": ("the original's package", "#d1495b", "s"),
    "bioff": ("the original's package", "#d1495b", "s"),
    "its own program": ("the original's package", "#d1495b", "s"),
    "autograd": ("plain PyTorch", "#e08e2b", "D"),
    "plain": ("plain PyTorch", "#e08e2b", "D"),
    "autograd, autocast": ("plain PyTorch, autocast", "#b8862f", "d"),
    "autograd, compiled": ("torch.compile", "#6b5ca5", "^"),
    "plain, compiled": ("torch.compile", "#6b5ca5", "^"),
    "backprop": ("backpropagation", "#3d85c6", "v"),
    "backprop, compiled": ("backpropagation, compiled", "#8fb8de", "v"),
    "bare calls": ("products and torch's optimizer", FAINT, "x"),
    "floor": ("bare products and state", FAINT, "|"),
}
LEAST = 0.1  # of the ratios that are drawn where they are
CURVES = {"median_ms": "Time of a step (ms)", "peak_bytes": "Memory of a step at its peak (MB)"}
AXIS_LABELS = {"width": "width of a square layer", "batch": "rows of each side", "depth": "layers"}


def kind_of(contender: str) -> tuple[str, str, str]:
    """What a contender is in a word, its colour and its marker."""
    return KINDS[max((start for start in KINDS if contender.startswith(start)), key=len)]


def draw(result: Result, path: Path) -> None:
    """Draws a result into the PNG file `path`; its metadata hold the fingerprint of the data.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "median_ms" in row]
    drawn = [axis for axis in AXES if len(_points(rows, axis, "median_ms")) > 1]
    by_case = [row for row in rows if not any(row["case"] in AXES[axis] for axis in drawn)]
    cases = list(dict.fromkeys(row["case"] for row in by_case))
    shares = [row for row in by_case if "of_limit" in row]
    height = 0.9 + 0.42 * len(cases)
    about = result["machine"]
    with rc_context(STYLE):
        heights = {"cases": height if cases else 0, "curves": 6.6 if drawn else 0}
        figure = Figure(figsize=(12, sum(heights.values()) + 0.8), layout="constrained")
        figure.suptitle(
            f"{in_words(about)}, commit {(about['commit'] or 'unknown')[:8]}",
            x=0.01, ha="left", fontsize=11,
        )  # fmt: skip
        parts = [part for part in heights if heights[part]]
        made = figure.subfigures(len(parts), 1, height_ratios=[heights[part] for part in parts], squeeze=False)
        for part, (sub,) in zip(parts, made, strict=True):
            if part == "curves":
                grid = sub.subplots(2, len(drawn), squeeze=False)
                for line, key in zip(grid, CURVES, strict=True):
                    for axes, axis in zip(line, drawn, strict=True):
                        _curve(axes, rows, axis, key)
                continue
            panels = sub.subplots(1, 2 if shares else 1, squeeze=False)[0]
            _speed_ups(panels[0], by_case, cases)
            if shares:
                _shares(panels[1], shares, cases)
        figure.savefig(path, dpi=110, metadata={"Description": fingerprint(result)})


def fingerprint(result: Result) -> str:
    """A digest of what a picture shows, which tells whether it was drawn from these data."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _points(rows: Sequence[Row], axis: str, key: str) -> list[int]:
    return sorted({x for points in curves(rows, key)[axis].values() for x, _ in points})


def _per_case(axes: Any, cases: Sequence[str]) -> None:
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for line in range(1, len(cases)):
        axes.axhline(line - 0.5, color=FAINT, alpha=0.2, linewidth=0.8)
    axes.axvline(1, color=INK, linewidth=0.8)


def _speed_ups(axes: Any, rows: Sequence[Row], cases: Sequence[str]) -> None:
    others = [row for row in rows if row["contender"] != OURS]
    for case, offset, row in _spread(others, cases):
        label, colour, marker = kind_of(row["contender"])
        ratio = row["over_ours"]
        reach = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        if ratio["median"] < LEAST:  # at the edge, pointing out of the picture
            ratio, reach, marker = {"median": LEAST}, [[0], [0]], "<"
        filled = colour if row.get("same_step", True) else "none"
        axes.errorbar(
            ratio["median"], case + offset, xerr=reach, label=label, color=colour,
            marker=marker, markersize=5, markerfacecolor=filled, linestyle="", elinewidth=1,
        )  # fmt: skip
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    _per_case(axes, cases)
    axes.set(title="Time over this package's (right of 1: this package is faster)")
    _legend(axes)


def _shares(axes: Any, rows: Sequence[Row], cases: Sequence[str]) -> None:
    for case, offset, row in _spread([row for row in rows if not row["contender"].startswith("backprop")], cases):
        label, colour, marker = kind_of(row["contender"])
        look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "", "label": label}
        filled = colour if row.get("same_step", True) else "none"
        axes.plot(row["of_limit"], case + offset, markerfacecolor=filled, **look)
    _per_case(axes, cases)
    axes.set_yticklabels([])
    axes.set_xlim(left=0)
    axes.set(title="Share of this machine's limit (products of all rows, bytes at least)")


def _spread(rows: Sequence[Row], cases: Sequence[str]) -> list[tuple[int, float, Row]]:
    """Each row with the index of its case and its place around that line, so that marks do not cover each other."""
    spread = []
    for index, case in enumerate(cases):
        of_case = [row for row in rows if row["case"] == case]
        for place, row in enumerate(of_case):
            spread.append((index, 0.7 * ((place + 0.5) / len(of_case) - 0.5), row))
    return spread


def _curve(axes: Any, rows: Sequence[Row], axis: str, key: str) -> None:
    for name, points in curves(rows, key)[axis].items():
        label, colour, marker = kind_of(name)
        sizes, values = zip(*points, strict=True)
        if not all(values):  # the floor allocates nothing
            continue
        values = tuple(value / 1e6 for value in values) if key == "peak_bytes" else values
        slope = exponent(sizes, values)
        grows = "" if slope is None else f" ~ {axis}$^{{{slope:.2f}}}$"
        axes.plot(sizes, values, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label + grows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(_points(rows, axis, key))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    _plain_numbers(axes.yaxis, between=high < 1000 * low)
    axes.grid(axis="y", color=FAINT, alpha=0.25)
    axes.set(title=CURVES[key], xlabel=AXIS_LABELS[axis])
    if axes.lines:
        axes.legend(fontsize=7)


def _plain_numbers(axis: Any, between: bool = True) -> None:
    """Powers of ten as numbers, and with `between` their double and fivefold too."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if between and f"{value:e}"[0] in "25" else "")


def _legend(axes: Any) -> None:
    label, colour, marker = kind_of(OURS)
    handles = {label: axes.plot([], [], color=colour, marker=marker, linestyle="")[0]}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)
    if any(container.lines[0].get_markerfacecolor() == "none" for container in axes.containers):
        hollow = axes.plot([], [], color=INK, marker="o", markerfacecolor="none", linestyle="")[0]
        handles["hollow: not exact"] = hollow
    axes.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
