"""A loss of the caller's own: any function of a layer's goodness, moments or activities, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..spec import Goodness
from .classes import CLASS_GOODNESS, moments_goodness, slopes_by_activity
from .head import ProjectionHead
from .judged import Judged
from .objective import GOODNESS, Objective, check_classes, goodness_of

Reads = Literal["goodness", "moments", "activities"]


class Moments(NamedTuple):
    """`[rows, units]` each unit's activity, and its square; the sums over places in a layer that has several."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class GivenLoss:
    """What a layer learns, as a function `function(read, is_positive)` that returns a 0-dim loss.

    Its slopes come from autograd on what it reads alone; the layer's product, update and optimizer run as under an
    `Objective`. Parameters that the function closes over learn as well: their gradients are added to their `.grad`, as
    by `backward()`, before the layer is written. `is_positive` is `[rows]` bool, positives first where the sides came
    apart. With `classes`, the function takes `(read, labels)` instead, and there are no negative rows.

    Args:
        function: called once a step, with gradients on. What a random number in it is drawn from is the caller's.
        reads: what comes first: "goodness" `[rows]`, or `[rows, classes]`; "moments", a `Moments` of `[rows, units]`;
            or "activities" `[rows, units]`, of a convolution `[rows, channels, h, w]` behind its pool, of which
            anything that autograd can differentiate is a loss. All in the weight's dtype. The last two take a further
            pass over the activities.
        goodness: "mean", "sum" or "norm": how sums of squares become a goodness; with classes as in `Objective`.
        maximize: whether a high goodness is that of a positive row, which predictions go by.
        classes: into how many groups the units are divided, as in `Objective`; None: into none.

    Raises:
        ValueError, TypeError: for a value outside these; in a step, for a loss that is no tensor, not 0-dim, not
            finite (on a CPU), detached from what it was given, or on another device, before anything is written.
    """

    function: Callable[..., Tensor]
    reads: Reads = "goodness"
    goodness: Goodness = "mean"
    maximize: bool = True
    classes: int | None = None

    def __post_init__(self) -> None:
        # A class would be called with a goodness, as a function is.
        of_class = any(self.function is kind for kind in (Objective, ProjectionHead, GivenLoss))
        if not callable(self.function) or of_class:
            raise TypeError(
                f"objective={self.function!r} is not an ffkernels.Objective, a ProjectionHead, a GivenLoss or a "
                "function of goodness and is_positive; such as ffkernels.Objective(loss='swish')"
            )
        check_classes(self.classes)
        accepted_goodness = GOODNESS if self.classes is None else CLASS_GOODNESS
        for name, accepted in (("reads", get_args(Reads)), ("goodness", accepted_goodness)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in accepted:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, accepted))}")
        if not isinstance(self.maximize, bool):
            raise TypeError(f"maximize={self.maximize!r} is not a bool")

    # What a step asks any objective.
    paired = False
    threshold = None
    loss = None

    def goodness_of(self, sumsq: Tensor, width: int, *, out: Tensor | None = None) -> Tensor:
        """Goodness of rows with sums of squares `sumsq` in a layer of `width` units; same shape and dtype."""
        return goodness_of(self.goodness, sumsq, width, out=out)

    def value(self, y: Tensor, goodness: Tensor, side: Tensor, learns: bool = True) -> Tensor:
        """The loss of activities `y` `[rows, units]` of this goodness; autograd-compatible.

        `side`: `is_positive`, or the labels. `learns`: whether it must hang on what it is given.
        """
        read = {"goodness": goodness, "activities": y, "moments": Moments(y, y.square())}[self.reads]
        return self._checked(self.function(read, side), y, learns)

    def judge(
        self,
        y: Tensor,
        sumsq: Tensor,
        side: Tensor,
        second: Tensor | None = None,
        places: int = 1,
        maps: Tensor | None = None,
    ) -> Judged:
        """Loss and slopes of activities `y` `[rows, units]` with sums of squares `sumsq` `[rows]`.

        `second`: in a layer of several `places`, the sums over them of squares; `y` are then those of activities,
            which `maps` `[rows, units, h, w]` are.
        """
        units, goodness = y.shape[1], None
        if self.classes is not None:
            goodness = moments_goodness(y, second, self.classes, self.goodness, places)
        with torch.enable_grad():
            if self.reads == "goodness":
                leaf = (sumsq if goodness is None else goodness).detach().requires_grad_()
                given = [leaf]
                read: Tensor | Moments = leaf if goodness is not None else self.goodness_of(leaf, units * places)
            else:
                given = [(y if maps is None else maps).detach().requires_grad_()]
                read = given[0]
                if self.reads == "moments":
                    given.append((y.square() if second is None else second.detach()).requires_grad_())
                    read = Moments(*given)
            loss = self._checked(self.function(read, side), y)
            loss.backward()
        found = [t.grad for t in given]
        if all(t is None for t in found):
            raise ValueError(
                f"the loss that objective returned does not hang on the {self.reads} that it was given; accepted: one "
                "that does"
            )
        if y.device.type == "cpu" and not all(t is None or bool(t.isfinite().all()) for t in found):
            raise ValueError(
                f"the loss that objective returned has a slope by the {self.reads} that is not finite, as of a root or "
                "a logarithm at 0; accepted: finite ones"
            )
        found = [None if t is None else t.to(y.dtype) for t in found]
        loss, first = loss.detach(), found[0]
        if self.reads != "goodness":
            return Judged(loss, goodness, first, found[1] if self.reads == "moments" else None)
        assert first is not None
        if goodness is not None:
            return Judged(loss, goodness, *slopes_by_activity(first, units, self.goodness, places))
        return Judged(loss, None, None, first.unsqueeze(1))

    def _checked(self, loss: object, y: Tensor, learns: bool = True) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(f"objective returned a {type(loss).__name__}; accepted: a 0-dim torch.Tensor, the loss")
        if loss.dim() != 0 or not loss.is_floating_point():
            raise ValueError(
                f"objective returned a {loss.dtype} tensor of shape {tuple(loss.shape)}; accepted: a 0-dim loss, such "
                "as its mean()"
            )
        if loss.device != y.device:
            raise ValueError(
                f"objective returned a loss on {loss.device} but the layer is on {y.device}; accepted: the same device"
            )
        if learns and not loss.requires_grad:
            raise ValueError(
                f"objective returned a loss detached from the {self.reads} that it was given; accepted: one computed "
                "from it, without detach(), item() or no_grad()"
            )
        if loss.device.type == "cpu" and not bool(loss.isfinite()):
            raise ValueError(f"objective returned a loss of {loss.item()}; accepted: a finite one")
        return loss


AnyObjective = Objective | GivenLoss | ProjectionHead


def any_objective(objective: object) -> AnyObjective:
    """An objective as it is; a function as a loss of the goodness."""
    if isinstance(objective, Objective | GivenLoss | ProjectionHead):
        return objective
    return GivenLoss(objective)  # type: ignore[arg-type]
