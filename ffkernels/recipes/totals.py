"""An epoch's averages, from what its steps have left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import FFNetwork, StepResult
from ..objectives import Objective, ProjectionHead, class_terms
from .batches import Minibatch
from .metrics import Row, describe
from .processes import ALONE, Processes


class Totals:
    """What the steps of an epoch have left, on the device; nothing is computed before somebody asks."""

    def __init__(self, net: FFNetwork, skip_below: float) -> None:
        self._objectives = [layer.objective for layer in net]
        self._skip_below = skip_below
        self._results: list[list[StepResult | None]] = []
        self._labels: list[Tensor] = []
        self._wrong: list[Tensor] = []
        self._rows: list[int] = []

    @property
    def rows(self) -> int:
        """How many images all processes have trained on."""
        return sum(self._rows)

    def add(self, results: Sequence[StepResult | None], batch: Minibatch, wrong: Tensor | None) -> None:
        """Adds a minibatch: the layers' step results, and `[rows]` which guesses of the classifier were wrong.

        A result is None where a layer had no loss.
        """
        self._labels.append(batch.labels)
        self._results.append([of if of is None or of.y is None else replace(of, y=None) for of in results])
        if wrong is not None:
            self._wrong.append(wrong)
        self._rows.append(batch.rows)

    def averages(self, processes: Processes = ALONE) -> Row:
        """Per layer over the rows of these processes, as numbers; `kept` is the share of rows that took part in the
        updates.

        A layer without a loss has zeros. Of classes, `goodness_neg` is the mean over those that are not a row's own.
        """
        row: Row = {"loss": [], "goodness_pos": [], "goodness_neg": [], "kept": []}
        for objective, of_layer in zip(self._objectives, zip(*self._results, strict=True), strict=True):
            results = [result for result in of_layer if result is not None]
            counts = [count for count, result in zip(self._rows, of_layer, strict=True) if result is not None]
            if not results:
                for values in (row[name] for name in ("loss", "goodness_pos", "goodness_neg", "kept")):
                    values.append(0.0)
                continue
            rows = torch.tensor(counts, dtype=torch.float64)
            losses = torch.stack([result.loss for result in results]).cpu().double()
            pos, neg = (
                torch.cat(side) for side in zip(*[(r.goodness_pos, r.goodness_neg) for r in results], strict=True)
            )
            objective = objective.objective if isinstance(objective, ProjectionHead) else objective
            assert isinstance(objective, Objective)
            if objective.classes is None:
                is_positive = torch.arange(len(pos) + len(neg), device=pos.device) < len(pos)
                kept = objective.in_doubt(torch.cat([pos, neg]), is_positive, self._skip_below)
            else:
                labels = torch.cat(self._labels)
                kept = class_terms(objective, pos, labels, skip_below=self._skip_below)[0].any(1)
                own = pos.gather(1, labels[:, None])
                pos, neg = own, (pos.sum(1, keepdim=True) - own) / max(objective.classes - 1, 1)
            row["loss"].append(((losses * rows).sum() / rows.sum()).item())
            for name, values in (("goodness_pos", pos), ("goodness_neg", neg), ("kept", kept.float())):
                row[name].append(_mean(values, processes))
        wrong = _mean(torch.cat(self._wrong).float(), processes) if self._wrong else None
        return {**row, "train_error_classifier": wrong}

    def describe(self) -> str:
        return describe(self.averages())


def _mean(values: Tensor, processes: Processes) -> float:
    """The mean over all of these processes' values."""
    if processes.size == 1:
        return values.mean().item()
    total, count = processes.sum(torch.stack([values.sum(dtype=torch.float64).cpu(), torch.tensor(float(len(values)))]))
    return (total / count).item()
