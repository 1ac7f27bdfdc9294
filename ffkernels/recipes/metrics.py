"""An epoch's row of metrics: what it holds, and how it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def is_number(value: Any) -> bool:
    """Whether it is a float, or an int that one can hold."""
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def check_rows(rows: object, epochs: int, layers: int, classifier: bool) -> None:
    """Raises ValueError unless `rows` are those of the first epochs of a run with so many layers, in their order."""
    if not isinstance(rows, list) or len(rows) > epochs:
        found = f"{len(rows)} epochs" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"rows: {found}, not a list of at most {epochs} epochs")

    def per_layer(value: object) -> bool:
        return isinstance(value, list) and len(value) == layers and all(map(is_number, value))

    def share(value: Any) -> bool:
        return is_number(value) and 0 <= value <= 1

    def unknown(value: object) -> bool:
        return value is None

    of_classifier = share if classifier else unknown
    right: dict[str, Callable[[Any], bool]] = {
        "lr": is_number,
        **dict.fromkeys(("loss", "goodness_pos", "goodness_neg", "kept"), per_layer),
        **dict.fromkeys(("train_error_classifier", "test_error_classifier"), of_classifier),
        "test_error_goodness": lambda value: unknown(value) or share(value),
        **dict.fromkeys(("train_seconds", "seconds"), lambda value: is_number(value) and value >= 0),
    }
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or type(row.get("epoch")) is not int or row["epoch"] != i + 1:
            raise ValueError(f"rows[{i}]: {str(row)[:80]!r} is not the row of epoch {i + 1}")
        for name, is_right in right.items():
            if not is_right(row.get(name)):
                raise ValueError(f"rows[{i}][{name!r}]: {str(row.get(name))[:80]!r} is no {name}")


def describe(row: Row) -> str:
    """One line on an epoch's training: the classifier's error, goodness of both sides and rows kept, by layer."""
    sides = ("/".join(f"{g:.3g}" for g in row[side]) for side in ("goodness_pos", "goodness_neg"))
    text = "goodness pos {} neg {}, rows kept {}".format(*sides, "/".join(f"{share:.0%}" for share in row["kept"]))
    error = row["train_error_classifier"]
    return text if error is None else f"train error {error:.2%}, {text}"


def describe_test(row: Row) -> str:
    """The test errors of an epoch."""
    errors = {"classifier": row["test_error_classifier"], "goodness": row["test_error_goodness"]}
    known = [f"{error:.2%} by {reader}" for reader, error in errors.items() if error is not None]
    return f"test error {', '.join(known)}" if known else "not tested"
