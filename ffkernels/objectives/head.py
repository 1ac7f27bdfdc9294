"""A learned head as a layer's objective: scores of the classes from the activities, and their cross-entropy."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .classes import class_terms
from .judged import Judged
from .objective import Objective, short

Form = Literal["projection", "prototypes"]


class ProjectionHead(nn.Module):
    """What a layer learns: that a learned matrix `W` `[classes, units]` tells the classes from its activities `y`.

    * "projection": the goodness of class `k` is `g_k = <w_k, y>` (Gong et al., "Mono-Forward", 2025);
    * "prototypes": `g_k = <w_k, y> / (|w_k| |y|)`, the cosine to a prototype on the sphere ("Hyperspherical
      Forward-Forward", arXiv 2605.00082).

    The loss is the cross-entropy of `softmax(g / temperature)`. With `e = dLoss/dg`, `dy = e W` and `dW = e^T y` for a
    projection; for prototypes both are tangents of their spheres. A step updates `W` with the layer, by the caller's
    optimizer, which must hold it; `dy` is that of the `W` before it.

    Args:
        classes: K.
        units: the width of the layer; None: `FFLinear` fills in its own.
        form: "projection" or "prototypes".
        temperature: divides the goodness; > 0.
        label_smoothing: what share of a label is spread over all classes.

    Raises:
        ValueError, TypeError: for a value outside these.
    """

    weight: Tensor | None
    # What a step asks any objective.
    paired = False
    threshold = None
    maximize = True
    loss = None

    def __init__(
        self,
        classes: int,
        units: int | None = None,
        *,
        form: Form = "projection",
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if classes is None:
            raise ValueError("classes=None is not an integer >= 1")
        if form not in get_args(Form):
            raise ValueError(f"form={form!r} is not one of {', '.join(map(repr, get_args(Form)))}")
        self.objective = Objective(
            loss="cross_entropy", classes=classes, temperature=temperature, label_smoothing=label_smoothing
        )
        if units is not None and (isinstance(units, bool) or not isinstance(units, int) or units < 1):
            raise ValueError(f"units={short(units)} is not None or an integer >= 1")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype} is not a floating-point dtype")
        self.classes, self.form = classes, form
        self.register_parameter("weight", None)
        if units is not None:
            self.fit(torch.empty(units, 0, device=device, dtype=dtype))

    def fit(self, weight: Tensor) -> None:
        """Makes the matrix for a layer with this weight `[units, in]`, initialised as a `torch.nn.Linear` is."""
        units = len(weight)
        if self.weight is None:
            self.weight = nn.Parameter(weight.new_empty(self.classes, units).detach())
            bound = 1 / math.sqrt(max(units, 1))
            nn.init.uniform_(self.weight, -bound, bound)
        elif self.weight.shape != (self.classes, units):
            raise ValueError(
                f"objective.weight has shape {tuple(self.weight.shape)}; accepted: {(self.classes, units)}, classes "
                "and units of its layer"
            )

    def scores(self, y: Tensor) -> Tensor:
        """`[rows, classes]` goodness of activities `y` `[rows, units]`; autograd-compatible."""
        assert self.weight is not None
        if self.form == "projection":
            return y @ self.weight.t()
        return (y @ _directions(self.weight)[0].t()) * _one_over_length(y.square().sum(1))

    def judge(
        self, y: Tensor, sumsq: Tensor, labels: Tensor, sample_weight: Tensor | None, skip_below: float
    ) -> tuple[Judged, Tensor]:
        """Loss and slopes of activities `y` `[rows, units]` with sums of squares `sumsq`; and dLoss/dW."""
        weight = self.weight
        assert weight is not None
        if self.form == "projection":
            goodness = y @ weight.t()
            slope, loss = class_terms(self.objective, goodness, labels, sample_weight, skip_below)
            return Judged(loss, goodness, slope, None, weight.detach()), slope.t() @ y
        basis, length = _directions(weight)
        scale = _one_over_length(sumsq)
        goodness = (y @ basis.t()) * scale
        slope, loss = class_terms(self.objective, goodness, labels, sample_weight, skip_below)
        first = slope * scale
        second = (slope * goodness).sum(1, keepdim=True) * scale.square() / -2
        by_basis = first.t() @ y
        radial = (by_basis * basis).sum(1, keepdim=True)
        return Judged(loss, goodness, first, second, basis.detach()), (by_basis - radial * basis) / length

    def extra_repr(self) -> str:
        return f"classes={self.classes}, form={self.form}"


def _directions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one, and `[rows, 1]` their lengths; a row of zeros has none, and stays."""
    length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    length = length.masked_fill(length == 0, 1)
    return weight / length, length


def _one_over_length(sumsq: Tensor) -> Tensor:
    """`[rows, 1]`; 0 for a row without activity, or one whose square is no normal number: it has no direction."""
    none = sumsq < torch.finfo(sumsq.dtype).tiny
    return sumsq.masked_fill(none, 1).rsqrt().masked_fill(none, 0).unsqueeze(1)
