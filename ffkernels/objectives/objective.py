"""The objective: from a layer's sums of squares to its loss and to the coefficient each row has in the update.

Everything here is plain PyTorch on vectors of one number per row. Kernels never look inside: they hand over the
sums of squares `q` and multiply each row of activities by the coefficient `c` that comes back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Goal, Goodness, Loss, Reduction
from .classes import CLASS_GOODNESS, CLASS_LOSSES

# Of class groups, whose logits are formed in the layer's precision.
LEAST_TEMPERATURE = 1e-38
Threshold = float | tuple[float, float] | Tensor


class LossFunction(NamedTuple):
    """A loss of one logit `t` (large: badly classified), its slope, and whether `t` belongs to a row or to a pair."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    paired: bool


def softplus(t: Tensor) -> Tensor:
    """log(1 + e^t) without overflow, and without the linear shortcut of `F.softplus` that costs digits in float64."""
    return -F.logsigmoid(-t)


def silu_slope(t: Tensor) -> Tensor:
    """d/dt of t sigmoid(t)."""
    sigmoid = torch.sigmoid(t)
    return sigmoid * (1 + t * (1 - sigmoid))


LOSSES: dict[str, LossFunction] = {
    "logistic": LossFunction(softplus, torch.sigmoid, paired=False),
    "symba": LossFunction(softplus, torch.sigmoid, paired=True),
    "swish": LossFunction(F.silu, silu_slope, paired=True),
}
GOODNESS = ("mean", "sum", "norm")
REDUCTIONS = get_args(Reduction)


class RowTerms(NamedTuple):
    """Per row: goodness, and the coefficient `c = 2 dLoss/dq`; and the (part of the) loss, a 0-dim tensor."""

    goodness: Tensor
    coefficient: Tensor
    loss: Tensor


@dataclass(frozen=True, eq=False)
class Objective:
    """What a layer learns: goodness above the threshold for positive rows and below it for negative ones; or, with
    `classes`, the goodness of a row's own class above that of the others, without negative rows.

    With `q` the sum of squared activities of a row (Hinton, "The Forward-Forward Algorithm", 2022, section 2):

    * goodness `g = q / width` ("mean"), `q` ("sum") or `sqrt(q)` ("norm");
    * sign `s = -1` for positive and `+1` for negative rows, swapped when `maximize=False`;
    * "logistic": `l_i = softplus(s_i (g_i - threshold_i) / temperature)` per row;
    * "symba" (Lee and Song, 2023): `l_i = softplus(-alpha (g_pos_i - g_neg_i))` per pair of the sides' i-th rows;
    * "swish": the same with `t sigmoid(t)` for the softplus;
    * reduction: the mean over all rows ("mean"), or the mean over positives plus that over negatives ("sum_of_means");
      pair losses take the mean over pairs under either name.

    With `classes=K`, the units are divided into K groups of consecutive units, whose sizes differ by one at most, the
    larger ones first. Each has a goodness `g_k`: the "mean" or "sum" of the squares in it, or its mean "activity" (Sun
    et al., "DeeperForward", 2025). With `t = g / temperature` (`-g` where `maximize=False`) and `c` a row's class:

    * "cross_entropy": `-sum_k q_k log softmax(t)_k`, `q` the label, smoothed by `label_smoothing`;
    * "cwc": `-log((e^t_c + 1e-9) / (sum_k e^t_k + 1e-9))`, `t` clamped to +-50 (Papachristodoulou et al.,
      "Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm", 2024);
    * "pvn" (ibid.): `softplus((threshold - g_c) / temperature)` and `softplus((mean of the others - threshold) /
      temperature)`; their mean ("mean") or sum ("sum_of_means").

    All take the mean over rows.

    Args:
        goodness: "mean", "sum" or "norm"; with classes "mean", "sum" or "activity".
        threshold: a number, a (positive, negative) pair of numbers, or a tensor: 0-dim, or one value for each row of
            the joint batch. A tensor is read at every step, so it can be changed in place between steps. With
            classes a number alone, which only "pvn" reads.
        loss: "logistic", "symba" or "swish"; with classes "cross_entropy", "cwc" or "pvn".
        maximize: whether positive rows get a high goodness (True) or a low one.
        reduction: "mean" or "sum_of_means".
        temperature: divides the logit of row losses; > 0.
        alpha: scale of the pair losses; > 0.
        classes: into how many groups the units are divided; None: into none.
        label_smoothing: what share of a label "cross_entropy" spreads over all classes; 0 to 1.

    Raises:
        ValueError, TypeError: for a value outside these, and for a threshold that is not finite.
    """

    goodness: Goodness = "mean"
    threshold: Threshold = 2.0
    loss: Loss = "logistic"
    maximize: bool = True
    reduction: Reduction = "mean"
    temperature: float = 1.0
    alpha: float = 4.0
    classes: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if self.classes is None and isinstance(self.loss, str) and self.loss in CLASS_LOSSES:
            raise ValueError(f"loss={self.loss!r} came without classes; accepted: classes=K, how many there are")
        goodness, losses = (GOODNESS, tuple(LOSSES)) if self.classes is None else (CLASS_GOODNESS, CLASS_LOSSES)
        for name, accepted in (("goodness", goodness), ("loss", losses), ("reduction", REDUCTIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in accepted:
                among = "" if self.classes is None else ", as classes have it"
                if name != "reduction" and self.classes is None:
                    others = CLASS_GOODNESS if name == "goodness" else CLASS_LOSSES
                    among = f" (with classes=: {', '.join(map(repr, others))})"
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, accepted))}{among}")
        if not isinstance(self.maximize, bool):
            raise TypeError(f"maximize={self.maximize!r} is not a bool")
        for name in ("temperature", "alpha"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value <= sys.float_info.max:
                raise ValueError(f"{name}={short(value)} is not a positive finite number")
        if 1 / self.temperature == math.inf or (self.classes and self.temperature < LEAST_TEMPERATURE):
            raise ValueError(f"temperature={self.temperature!r} is too small: a logit is divided by it")
        if self.paired and self.temperature != 1:
            raise ValueError(f"temperature={self.temperature!r} has no meaning for loss={self.loss!r}: use alpha")
        self._check_threshold()
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        smoothing = self.label_smoothing
        if not _is_number(smoothing) or not 0 <= smoothing <= 1:
            raise ValueError(f"label_smoothing={short(smoothing)} is not a number in 0..1")
        if smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing={smoothing!r} has no meaning for loss={self.loss!r}; accepted: 0")

    def _check_threshold(self) -> None:
        threshold = self.threshold
        if self.classes is not None and not _is_number(threshold):
            raise TypeError(f"threshold={short(threshold)} is not a number, as classes take it")
        if isinstance(threshold, Tensor):
            if threshold.is_nested or threshold.layout != torch.strided:
                raise TypeError(f"threshold has layout {threshold.layout}; accepted: a dense tensor")
            if not threshold.is_floating_point() or threshold.dim() > 1:
                raise TypeError(
                    f"threshold is a {threshold.dtype} tensor of shape {tuple(threshold.shape)}; accepted: "
                    "a floating-point tensor, 0-dim or with one value for each row"
                )
            # A meta tensor has no values.
            if not threshold.is_meta and not bool(threshold.isfinite().all()):
                raise ValueError("threshold holds NaN or infinity; accepted: finite values")
            return
        values = threshold if isinstance(threshold, tuple) else (threshold,)
        if len(values) > 2 or not values or not all(_is_number(v) for v in values):
            raise TypeError(f"threshold={threshold!r} is not a number, a (positive, negative) pair or a tensor")
        if not all(abs(v) <= sys.float_info.max for v in values):
            raise ValueError(f"threshold={short(threshold)} is not finite")

    @property
    def paired(self) -> bool:
        """Whether the loss compares the i-th positive with the i-th negative row."""
        return self.classes is None and LOSSES[self.loss].paired

    def goodness_of(self, sumsq: Tensor, width: int, *, out: Tensor | None = None) -> Tensor:
        """Goodness of rows with sums of squares `sumsq` in a layer of `width` units; same shape and dtype.

        `out` receives it where no gradient is asked for.
        """
        return goodness_of(self.goodness, sumsq, width, out=out)

    def thresholds(self) -> tuple[float, float]:
        """The thresholds of both sides as numbers; what stands here for a tensor threshold is not used."""
        if isinstance(self.threshold, Tensor):
            return 0.0, 0.0
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold, self.threshold)

    def goal(self, skip_below: float = 0.0) -> Goal:
        """The objective as the backends take it."""
        tensor = self.threshold if isinstance(self.threshold, Tensor) else None
        pos, neg = (float(v) for v in self.thresholds())
        numbers = (float(self.temperature), float(self.alpha), float(skip_below))
        of_classes = (self.classes or 0, float(self.label_smoothing))
        return Goal(self.goodness, pos, neg, tensor, self.loss, self.maximize, self.reduction, *numbers, *of_classes)

    @classmethod
    def of(cls, goal: Goal) -> Objective:
        """The objective that has become this goal; of a tensor threshold, `terms` is told."""
        thresholds = (goal.threshold_pos, goal.threshold_neg)
        return cls(goal.goodness, thresholds, goal.loss, goal.maximize, goal.reduction, goal.temperature, goal.alpha)

    def terms(
        self,
        sumsq: Tensor,
        width: int,
        is_positive: Tensor,
        counts: tuple[float | Tensor, float | Tensor],
        sample_weight: Tensor | None = None,
        threshold: Tensor | None = None,
        skip_below: float = 0.0,
    ) -> RowTerms:
        """Goodness, update coefficient and loss of some rows of a batch.

        Args:
            sumsq: `[rows]` sums of squared activities.
            width: units of the layer.
            is_positive: `[rows]` bool. For pair losses the first half is positive, the second its partners.
            counts: how many positive and negative rows the *whole* batch has; the divisors of the reduction.
            sample_weight: `[rows]`, or `[rows / 2]` for pair losses.
            threshold: 0-dim or `[rows]`; None for the numbers of this objective.
            skip_below: rows whose loss is less steep than this get a coefficient of zero.
        """
        goodness = self.goodness_of(sumsq, width)
        slope, loss = self.slope_and_loss(goodness, is_positive, counts, sample_weight, threshold, skip_below)
        if self.goodness == "norm":
            # The slope of a root at zero is infinite, but such a row has no activity to move.
            coefficient = torch.where(sumsq > 0, slope / goodness, 0.0)
        else:
            coefficient = slope * (2 / width if self.goodness == "mean" else 2)
        return RowTerms(goodness, coefficient, loss)

    def slope_and_loss(
        self,
        goodness: Tensor,
        is_positive: Tensor,
        counts: tuple[float | Tensor, float | Tensor],
        sample_weight: Tensor | None = None,
        threshold: Tensor | None = None,
        skip_below: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """`[rows]` slopes dLoss/dgoodness, and the (part of the) loss; the arguments are those of `terms`."""
        loss = LOSSES[self.loss]
        logit, scale = self._logit(goodness, is_positive, threshold)
        weight: float | Tensor
        if loss.paired:
            weight = _reciprocal(counts[0], goodness)
        else:
            if self.reduction == "mean":
                weight = _reciprocal(counts[0] + counts[1], goodness)
            else:
                pos, neg = (_reciprocal(count, goodness) for count in counts)
                weight = _by_side(is_positive, pos, neg, goodness)
        if sample_weight is not None:
            weight = weight * sample_weight
        steepness = loss.slope(logit)
        if skip_below:
            steepness = steepness.masked_fill_(steepness.abs() < skip_below, 0.0)
        slope = weight * scale * steepness
        if loss.paired:
            slope = torch.cat([slope, -slope])
        return slope, (weight * loss.value(logit)).sum()

    def in_doubt(
        self, goodness: Tensor, is_positive: Tensor, skip_below: float = 0.0, threshold: Tensor | None = None
    ) -> Tensor:
        """`[rows]` bool (`[pairs]` for pair losses): the rows that take part in an update; the others' slope is zero.

        The arguments are those of `terms`.
        """
        steepness = LOSSES[self.loss].slope(self._logit(goodness, is_positive, threshold)[0])
        return steepness.abs() >= skip_below if skip_below else steepness != 0

    def _logit(self, goodness: Tensor, is_positive: Tensor, threshold: Tensor | None) -> tuple[Tensor, float | Tensor]:
        """The loss's logit of each row or pair, and its derivative in the (positive row's) goodness."""
        scale: float | Tensor
        if self.paired:
            half = goodness.shape[0] // 2
            scale = -self.alpha if self.maximize else self.alpha
            return scale * (goodness[:half] - goodness[half:]), scale
        theta = _by_side(is_positive, *self.thresholds(), goodness) if threshold is None else threshold
        scale = _by_side(is_positive, -1.0, 1.0, goodness) * ((1 if self.maximize else -1) / self.temperature)
        return scale * (goodness - theta), scale


def goodness_of(goodness: Goodness, sumsq: Tensor, width: int, *, out: Tensor | None = None) -> Tensor:
    """Goodness of rows with sums of squares `sumsq` in a layer of `width` units; see `Objective.goodness_of`."""
    if goodness == "mean":
        return torch.div(sumsq, width, out=out)
    if goodness == "norm":
        if out is not None:
            return torch.sqrt(sumsq, out=out)
        # The slope of a root at zero is infinite; a row of zeros gets none.
        zero = sumsq == 0
        return sumsq.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return sumsq


def check_classes(classes: object) -> None:
    """Raises ValueError unless it is a number of class groups, or None."""
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"classes={short(classes)} is not None or an integer >= 1")


def short(value: object) -> str:
    """`repr(value)` for a message; Python refuses to write out integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"<{type(value).__name__} of too many digits>"
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reciprocal(count: float | Tensor, like: Tensor) -> float | Tensor:
    """1 / count; 1 for an empty side, which has no rows to weigh."""
    return 1 / count.to(like.dtype).clamp(min=1) if isinstance(count, Tensor) else 1 / max(count, 1)


def _by_side(is_positive: Tensor, positive: float | Tensor, negative: float | Tensor, like: Tensor) -> float | Tensor:
    """`[rows]` of `positive` or `negative` in `like`'s dtype; a plain number where both are the same."""
    if not isinstance(positive, Tensor) and positive == negative:
        return positive
    pos, neg = (v.to(like.dtype) if isinstance(v, Tensor) else like.new_full((), v) for v in (positive, negative))
    return torch.where(is_positive, pos, neg)


DEFAULT_OBJECTIVE = Objective()
