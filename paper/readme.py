"""Tables and pictures of the benchmark in README and docs/benchmarks.md, made from its results and never typed."""

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
PAGE = machine.ROOT / "docs" / "benchmarks.md"
PICTURE = "benchmarks-{device}.png"
BEGIN, END = "<!-- benchmarks: made by `python -m ffkernels bench --readme` -->", "<!-- /benchmarks -->"
# Columns of the table: the kinds of contenders as `picture.kind_of` names them; of several the fastest that is exact.
COLUMNS = {
    "its own package": "the original's package",
    "plain PyTorch": "plain PyTorch",
    "`torch.compile`": "torch.compile",
    "backprop": "backpropagation",
    "bare products": "bare products and state",
}
# README's rows, in a user's words, and its columns.
SHORT = {
    "fflib-float32": "fflib's example, 794-2000-2000",
    "loewex-float32": "loeweX, 784-1000-1000-1000",
    "mohammadpz-float32": "mohammadpz, 784-500, one batch of all images",
    "bioff-float32": "bioff, 794-256-128",
    "cwc-mnist-float32": "CwC's convolutions on MNIST",
    "overhead": "8-8, one image: overhead alone",
    "square-2048": "2048-2048, 2x2,048 rows: products alone",
    "predict-mohammadpz": "prediction, 784-500-500",
}
SHORT_COLUMNS = ("its own package", "plain PyTorch", "`torch.compile`", "backprop")

INTRODUCTION = """\
The time of a step of this package, and how many times as long the others take: the median of ratios paired
within one run, and its interval."""
LEGEND = """\
Bare products are those of all rows, and one pass over weights and optimizer state; above 1 there, this package does
fewer products than that. The pictures also have single layers, and growth."""


def update(readme: Path = README, benchmarks: Path = PAGE) -> list[Path]:
    """Rewrites what stands between the markers of both pages, and draws the pictures; what was written."""
    results = by_device(report.load_results())
    for path in (readme, benchmarks):
        page.parts(path, BEGIN, END)  # both or neither
    page.update(readme, BEGIN, END, short(results))
    page.update(benchmarks, BEGIN, END, text(results))
    written = [readme, benchmarks]
    for name, result in results.items():
        written.append(benchmarks.parent / PICTURE.format(device=name))
        picture.draw(result, written[-1])
    return written


def by_device(results: Sequence[Result]) -> dict[str, Result]:
    """One result per device: every case from the newest run that has it in full, else from the newest quick one.

    CPUs are of three kinds, by what multiplies bfloat16: "cpu", "cpu-avx512-bf16" or "cpu-amx". Of several of a kind
    only the one measured last counts, since its name stands over all rows.
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
    if device == "cpu":
        units = result["machine"].get("bfloat16_units", ())
        return next((f"cpu-{unit.lower()}" for unit in machine.UNITS if unit in units), "cpu")
    return "-".join(device.lower().split())


def _marked(result: Result) -> list[Row]:
    return [{**row, "run": result["machine"]["date"], "quick": result["quick"]} for row in result["rows"]]


def text(results: dict[str, Result]) -> str:
    """The tables in Markdown, one for each device."""
    return "\n\n".join([INTRODUCTION, *(_section(name, result) for name, result in results.items()), LEGEND])


def short(results: dict[str, Result]) -> str:
    """README's table: ratios of a few cases, on the kind of CPU that was measured last."""
    of_cpus = [result for result in results.values() if result["machine"].get("device", "cpu") == "cpu"]
    if not of_cpus:
        return "Nothing is measured yet."
    result = max(of_cpus, key=lambda result: str(result["machine"]["date"]))
    about, rows = result["machine"], [row for row in result["rows"] if "median_ms" in row]
    table = {words: _cells(of_case) for case, words in SHORT.items() if (of_case := _rows_of(rows, case))}
    filled = [column for column in SHORT_COLUMNS if any(cells[column] for cells in table.values())]
    lines = ([case, *(cells[column] for column in filled)] for case, cells in table.items())
    return f"{page.table(['a step of', *filled], lines)}\n\n{machine.in_words(about)}, {about['date'][:10]}."


def _section(name: str, result: Result) -> str:
    about, rows = result["machine"], [row for row in result["rows"] if "median_ms" in row]
    on_curves = {case for cases in AXES.values() for case in cases}
    cases = [
        case
        for case in dict.fromkeys(row["case"] for row in rows)
        if case not in on_curves and not case.startswith("optimizer-")
    ]
    table = {case: _cells(_rows_of(rows, case)) for case in cases}
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


def _rows_of(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


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
