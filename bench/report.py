"""Results as data and as text: the file, the table in the terminal, the growth along an axis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import AXES
from .contenders import OURS
from .run import Row
from .timing import exponent

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]
COLUMNS = (
    "case", "contender", "time", "host", "over ours", "of limit", "memory", "resident", "first step", "same step",
)  # fmt: skip


def save(result: Result, path: Path) -> None:
    """Writes a result as JSON with one line for each row."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def load_results(folder: Path = RESULTS) -> list[Result]:
    """All results in a folder, the oldest first."""
    return [load(path) for path in sorted(folder.glob("*.json"))]


def load(path: Path) -> Result:
    """A result as `save` wrote it."""
    result: Result = json.loads(path.read_text())
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, one block for each case; the host's time apart where it is not the whole."""
    apart = any(row.get("host_ms") != row.get("median_ms") for row in rows)
    columns = [column for column in COLUMNS if column != "host" or apart]
    cells: list[Sequence[str]] = [columns]
    before = None
    for row in rows:
        if row["case"] != before and before is not None:
            cells.append(("",) * len(columns))
        shown = _cells(row) | {"case": row["case"] if row["case"] != before else ""}
        before = row["case"]
        cells.append([shown.get(column, "") for column in columns])
    flush_right = ("time", "host", "of limit", "memory", "resident", "first step")
    return aligned(cells, right=[i for i, column in enumerate(columns) if column in flush_right])


def _cells(row: Row) -> dict[str, str]:
    """What the table says of a row, by column."""
    if "failed" in row:
        return {"contender": row["contender"], "same step": f"did not run: {row['failed']}"[:80]}
    ratio = row["over_ours"]
    cells = {
        "contender": row["contender"],
        "time": duration(row["median_ms"] / 1e3),
        "host": duration(row["host_ms"] / 1e3),
        "over ours": f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        "same step": _proof(row),
    }
    if row["contender"] == OURS:
        del cells["over ours"]
    if "of_limit" in row:
        cells["of limit"] = f"{row['of_limit']:.2f}"
    if "first_step_s" in row:
        cells["first step"] = duration(row["first_step_s"])
    sizes = {"memory": row.get("peak_bytes"), "resident": row.get("resident_bytes")}
    return cells | {column: size(number) for column, number in sizes.items() if number is not None}


def aligned(cells: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines of cells in columns, those in `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    return f"{seconds * factor:.{3 if seconds * factor < 1000 else 4}g} {unit}"


def size(number: float) -> str:
    """Bytes, with a unit."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _proof(row: Row) -> str:
    if "same_step" not in row:
        return f"no: {row.get('another', 'products and state only')}"
    return f"{'yes' if row['same_step'] else 'NO'}: off by {row['error']:.1e}, allowed {row['budget']:.1e}"


def curves(rows: Iterable[Row], key: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """For each axis and contender, `(size, row[key])` along that axis, in order; rows that lack the key left out."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {axis: {} for axis in AXES}
    for row in rows:
        for axis, cases in AXES.items():
            if row["case"] in cases and key in row:
                found[axis].setdefault(row["contender"], []).append((cases[row["case"]], row[key]))
    return {axis: {name: sorted(points) for name, points in of.items()} for axis, of in found.items()}


def growth(rows: Sequence[Row]) -> str:
    """How time and memory grow along each axis: exponents through the larger half of the sizes; "" without curves."""
    times, memory = curves(rows, "median_ms"), curves(rows, "peak_bytes")
    cells: list[Sequence[str]] = [("axis", "contender", "sizes", "time grows as", "memory grows as")]
    for axis, of in times.items():
        for name, points in of.items():
            slopes = []
            for curve in (points, memory[axis].get(name, [])):
                slope = exponent(*zip(*curve, strict=True)) if len(curve) > 2 else None
                slopes.append("" if slope is None else f"{axis}^{slope:.2f}")
            if any(slopes):
                cells.append((axis, name, f"{points[0][0]}..{points[-1][0]}", *slopes))
    return aligned(cells) if len(cells) > 1 else ""
