"""What the second stage of a step hands to the third."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Judged(NamedTuple):
    """A loss, 0-dim; the goodness, `[rows]` or `[rows, classes]`, or None; and the slopes as `spec.Slopes` has them."""

    loss: Tensor
    goodness: Tensor | None
    first: Tensor | None
    second: Tensor | None
    basis: Tensor | None = None
