"""README's tables and pictures of the benchmark, made from its result files and never typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import machine, picture, report
from bench.cases import AXES, CASES
from bench.contenders import OURS
from bench.report import Result
from bench.run import Row
from bench.timing import Ratio

from . import page

README = machine.ROOT / "README.md"
PICTURE = "docs/benchmarks-{device}.png"
BEGIN, END = "<!-- benchmarks: made by `python -m ffkernels bench --readme` -->", "<!-- /benchmarks -->"
# Columns of the table: the kinds of contenders as `picture.kind_of` names them; of several the fastest that is exact.
COLUMNS = {
    "its own package": "the original's package",
    "plain PyTorch": "plain PyTorch",
    "`torch.compile`": "torch.compile",
    "backprop": "backpropagation",
    "floor": "floor: products and state",
}

INTRODUCTION = """\
The time of a step of this package, and how many times as long the others take: the median of ratios paired
within one run, and its interval."""
LEGEND = """\
The floor is the bare products of all rows and one pass over weights and optimizer state; above 1 there, this
package does fewer products than that. The pictures also have single layers, and growth."""


def update(readme: Path = README) -> list[Path]:
    """Rewrites what stands between the two markers, and draws the pictures; what was written."""
    results = by_device(report.load_results())
    page.update(readme, BEGIN, END, text(results))
    written = [readme]
    for name, result in results.items():
        written.append(readme.parent / PICTURE.format(device=name))
        written[-1].parent.mkdir(exist_ok=True)
        picture.draw(result, written[-1])
    return written


def by_device(results: Sequence[Result]) -> dict[str, Result]:
    """One result per device, CPUs as "cpu" or "cpu-amx": every case from the newest run that has it in full, else from
    the newest quick one; of several CPUs of a kind only the one measured last, since its name stands over all rows.
    """
    found: dict[str, Result] = {}
    newest = {_name(result): result["machine"] for result in results}
    for quick in (True, False):
        for result in (result for result in results if result["quick"] == quick):
            name = _name(result)
            if any(result["machine"].get(key) != newest[name].get(key) for key in ("cpu", "threads")):
                continue
            rows: dict[str, list[Row]] = {}
            for row in (found[name]["rows"] if name in found else []) + _marked(result):
                rows.setdefault(row["case"], []).append(row)
            for case, of_case in rows.items():
                last = of_case[-1]["run"]
                rows[case] = [row for row in of_case if row["run"] == last]
            found[name] = {**result, "rows": [row for of_case in rows.values() for row in of_case]}
    return dict(sorted(found.items()))


def _name(result: Result) -> str:
    device = result["machine"].get("device", "cpu")
    if device == "cpu" and "AMX" in result["machine"].get("bfloat16_units", ()):
        return "cpu-amx"
    return "-".join(device.lower().split())


def _marked(result: Result) -> list[Row]:
    return [{**row, "run": result["machine"]["date"], "quick": result["quick"]} for row in result["rows"]]


def text(results: dict[str, Result]) -> str:
    """The tables in Markdown, one for each device."""
    return "\n\n".join([INTRODUCTION, *(_section(name, result) for name, result in results.items()), LEGEND])


def _section(name: str, result: Result) -> str:
    about, rows = result["machine"], [row for row in result["rows"] if "median_ms" in row]
    on_curves = {case for cases in AXES.values() for case in cases}
    cases = [
        case
        for case in dict.fromkeys(row["case"] for row in rows)
        if case not in on_curves and not case.startswith("optimizer-")
    ]
    table = {case: _cells([row for row in rows if row["case"] == case]) for case in cases}
    filled = [column for column in next(iter(table.values()), {}) if any(cells[column] for cells in table.values())]
    forced = f", with `FFKERNELS_BACKEND={about['backend_forced']}`" if about.get("backend_forced") else ""
    lines = [
        f"**{machine.in_words(about)}**, {about['date'][:10]}{forced}:",
        "",
        page.table(filled, ([cells[column] for column in filled] for cells in table.values())),
    ]
    if any(row["quick"] for row in rows):
        lines += ["", "(q): from a `--quick` run, with wide intervals."]
    return "\n".join([*lines, "", f"![Benchmarks, {name}]({PICTURE.format(device=name)})"])


def _cells(rows: Sequence[Row]) -> dict[str, str]:
    ours = next(row for row in rows if row["contender"] == OURS)
    case = CASES.get(ours["case"])
    cells = {
        "case": f"{ours['case']}{'' if case is None else f': {case}'}{' (q)' if ours['quick'] else ''}",
        "this package": report.duration(ours["median_ms"] / 1e3),
    }
    fastest = {column: _fastest(rows, kind) for column, kind in COLUMNS.items()}
    for column, row in fastest.items():
        cells[column] = "" if row is None else str(Ratio(**row["over_ours"]))
    cells["share of the limit"] = f"{ours['of_limit']:.2f}" if "of_limit" in ours else ""
    memory = [report.size(row["peak_bytes"]) for row in (ours, fastest["plain PyTorch"]) if row and "peak_bytes" in row]
    cells["memory (plain PyTorch's)"] = f"{memory[0]} ({memory[1]})" if len(memory) > 1 else ""
    return cells


def _fastest(rows: Sequence[Row], kind: str) -> Row | None:
    """Of the contenders of a kind the fastest that computes the same; of another algorithm the fastest."""
    of_kind = [
        row
        for row in rows
        if picture.kind_of(row["contender"])[0].startswith(kind)
        and row.get("same_step", True)
        and not row["contender"].endswith(", graph")
    ]
    return min(of_kind, key=lambda row: row["median_ms"], default=None)
