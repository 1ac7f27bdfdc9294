"""What a step leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import validation as check


@dataclass(frozen=True, eq=False, init=False)
class StepResult:
    """What a layer step leaves behind; device tensors, none of them with a gradient.

    Attributes:
        y: `[rows, out]` activities of the joint batch: recomputed with the updated weights (`outputs="post"`), those
            before the update ("pre"), or None ("none"). In the compute dtype.
        sumsq: `[rows]` sums of squares of `y`'s rows (of the activities before the update where `y` is None);
            the next layer's `input_sumsq`.
        goodness: `[rows]` goodness before the update; with an objective of classes `[rows, classes]`.
        loss: 0-dim, before the update.
        n_pos: how many rows are positive; None where `is_positive` says it.
        is_positive: `[rows]` as it came, or None: then the first `n_pos` rows are positive.
    """

    y: Tensor | None
    sumsq: Tensor
    goodness: Tensor
    loss: Tensor
    n_pos: int | None
    is_positive: Tensor | None = None

    def __init__(
        self,
        y: Tensor | None,
        sumsq: Tensor,
        goodness: Tensor,
        loss: Tensor,
        n_pos: int | None,
        is_positive: Tensor | None = None,
    ) -> None:
        # What a frozen class writes field by field takes longer than a small layer's product.
        vars(self).update(y=y, sumsq=sumsq, goodness=goodness, loss=loss, n_pos=n_pos, is_positive=is_positive)

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Positive and negative rows of `values` `[rows, ...]`. With `is_positive`, picking waits for the device."""
        check.tensor("values", values)
        if self.is_positive is not None:
            return values[self.is_positive], values[~self.is_positive]
        return values[: self.n_pos], values[self.n_pos :]

    @property
    def pos(self) -> Tensor | None:
        """`[n_pos, out]` activities of the positive rows."""
        return None if self.y is None else self.sides(self.y)[0]

    @property
    def neg(self) -> Tensor | None:
        """`[n_neg, out]` activities of the negative rows."""
        return None if self.y is None else self.sides(self.y)[1]

    @property
    def goodness_pos(self) -> Tensor:
        """`[n_pos]` goodness of the positive rows."""
        return self.sides(self.goodness)[0]

    @property
    def goodness_neg(self) -> Tensor:
        """`[n_neg]` goodness of the negative rows."""
        return self.sides(self.goodness)[1]
