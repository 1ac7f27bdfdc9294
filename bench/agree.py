"""Whether two runs of one commit say the same: how far their paired ratios lie apart."""

from __future__ import annotations

from dataclasses import dataclass

from .contenders import OURS
from .report import Result, aligned

ALLOWED = 0.05
LEAST_MS = 1.0  # of a step of this package; what is shorter is the host's time


@dataclass(frozen=True)
class Pair:
    """One contender of one case: its time over ours in both runs."""

    case: str
    contender: str
    ratios: tuple[float, float]

    @property
    def apart(self) -> float:
        """How far the larger ratio is above the smaller, as a share of it."""
        return max(self.ratios) / min(self.ratios) - 1

    @property
    def agrees(self) -> bool:
        return self.apart <= ALLOWED


def pairs_of(first: Result, second: Result) -> list[Pair]:
    """Every contender of every case over a millisecond that both runs timed.

    Raises:
        ValueError: for runs on different machines, of different commits, or without a case in common.
    """
    for key in ("device", "cpu", "threads", "commit"):
        values = [result["machine"].get(key) for result in (first, second)]
        if values[0] != values[1]:
            raise ValueError(f"--agree takes two runs of one commit on one machine; their {key}s: {values}")
    ratios: list[dict[tuple[str, str], float]] = []
    for result in (first, second):
        rows = [row for row in result["rows"] if "median_ms" in row]
        long = {row["case"] for row in rows if row["contender"] == OURS and row["median_ms"] >= LEAST_MS}
        medians = {(row["case"], row["contender"]): row["over_ours"]["median"] for row in rows}
        ratios.append({key: median for key, median in medians.items() if key[0] in long})
    pairs = [Pair(*key, (ratios[0][key], ratios[1][key])) for key in ratios[0] if key in ratios[1] and key[1] != OURS]
    if not pairs:
        raise ValueError(f"the two runs have no case over {LEAST_MS:g} ms in common")
    return pairs


def table(pairs: list[Pair]) -> str:
    """A line for each contender, those that lie furthest apart last, and how many agree."""
    cells: list[tuple[str, ...]] = [("case", "contender", "over ours", "and again", "apart", "")]
    for pair in sorted(pairs, key=lambda pair: pair.apart):
        ratios = (f"{ratio:.3f}" for ratio in pair.ratios)
        cells.append((pair.case, pair.contender, *ratios, f"{pair.apart:.1%}", "" if pair.agrees else "NO"))
    agreeing = sum(pair.agrees for pair in pairs)
    return f"{aligned(cells, right=(2, 3, 4))}\n\n{agreeing} of {len(pairs)} ratios agree within {ALLOWED:.0%}."
