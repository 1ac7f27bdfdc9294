"""Modules: one Forward-Forward layer, and a stack of them that trains layer by layer without a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import functional, negatives
from . import validation as check
from .functional import DEFAULT_OBJECTIVE, StepResult
from .normalisation import row_scale
from .objective import Objective
from .peer import FIRST_MEAN, PeerNormalisation

# Rows times labels that a prediction works on at once.
PREDICTION_ROWS = 1280


class FFLinear(nn.Linear):
    """A linear layer `y = act(W normalise(x) + b)` that learns from its own goodness.

    Parameters, their initialisation and their names in `state_dict` are those of `torch.nn.Linear`. The options are
    those of `linear_step_`, and plain attributes: they can be changed at any time. With `peer`, the running mean is the
    buffer `peer_mean` `[out]`, which starts at 0.5.

    Raises:
        ValueError, TypeError: for an option outside what `linear_step_` accepts.
    """

    peer_mean: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        objective: Objective = DEFAULT_OBJECTIVE,
        norm: str = "l2",
        eps: float = 1e-4,
        eps_mode: str = "add",
        activation: str = "relu",
        outputs: str = "post",
        compute_dtype: torch.dtype | None = None,
        peer: PeerNormalisation | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.layer_options(norm, eps, eps_mode, activation)
        check.one_of("outputs", outputs, check.OUTPUTS)
        if not isinstance(objective, Objective):
            raise TypeError(f"objective={objective!r} is not an ffkernels.Objective")
        if peer is not None and not isinstance(peer, PeerNormalisation):
            raise TypeError(f"peer={peer!r} is not an ffkernels.PeerNormalisation")
        super().__init__(in_features, out_features, bias, device, dtype)
        mean = None if peer is None else torch.full_like(self.weight.detach()[:, 0], FIRST_MEAN)
        self.register_buffer("peer_mean", mean)
        self.objective = objective
        self.norm = norm
        self.eps = eps
        self.eps_mode = eps_mode
        self.activation = activation
        self.outputs = outputs
        self.compute_dtype = compute_dtype
        self.peer = peer
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        names = ("norm", "eps", "eps_mode", "activation", "compute_dtype", "backend")
        return {name: getattr(self, name) for name in names}

    def activity(self, x: Tensor, input_sumsq: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Activities `[rows, out]` of rows `x` `[rows, in]`, and their sums of squares `[rows]`.

        `options` go to `ffkernels.linear_forward` and override the layer's own.
        """
        options = {"input_sumsq": input_sumsq, **self._options(), **options}
        return functional.linear_forward(x, self.weight, self.bias, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Activities `[rows, out]`; their gradient reaches weight and bias, and not `input`."""
        return self.activity(input)[0]

    def goodness(self, x: Tensor) -> Tensor:
        """Goodness `[rows]` of rows `x` `[rows, in]`."""
        return self.objective.goodness_of(self.activity(x, keep=False)[1], self.out_features)

    def step(self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any) -> StepResult:
        """One training step, `ffkernels.linear_step_`; `options` go there and override the layer's own."""
        peer = {"peer": self.peer, "peer_mean": None if self.peer is None else self.peer_mean}
        own = {"objective": self.objective, "outputs": self.outputs, **peer, **self._options()}
        return functional.linear_step_(x_pos, x_neg, self.weight, self.bias, optimizer, **{**own, **options})

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}, activation={self.activation}, outputs={self.outputs}"


class FFNetwork(nn.Module):
    """Forward-Forward layers on top of each other; each normalises what the one below hands on.

    Args:
        layers: the layers, first one first; `out_features` of each must be `in_features` of the next.

    Raises:
        TypeError, ValueError: for no layers, for one that is not an `FFLinear`, and for widths that do not fit.
    """

    def __init__(self, layers: Iterable[FFLinear]) -> None:
        super().__init__()
        layers = list(layers)
        for i, layer in enumerate(layers):
            if not isinstance(layer, FFLinear):
                raise TypeError(f"layers[{i}] is a {type(layer).__name__}; accepted: ffkernels.FFLinear")
            if i and layer.in_features != layers[i - 1].out_features:
                raise ValueError(
                    f"layers[{i}] has in_features={layer.in_features}; accepted: {layers[i - 1].out_features}, "
                    "the width of the layer below"
                )
        if not layers:
            raise ValueError("layers is empty; accepted: at least one FFLinear")
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[FFLinear]:
        return iter(cast("Iterable[FFLinear]", self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    def step(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        *,
        label_field: int | None = None,
        product: Tensor | None = None,
        keep: bool = False,
        **options: Any,
    ) -> list[StepResult]:
        """One step of every layer on a minibatch; each hands its activities to the next as its `outputs` says.

        Args:
            x_pos, x_neg: rows of both sides, as in `linear_step_`.
            optimizers: one for all layers, or a sequence with one for each.
            label_field, product: arguments of `linear_step_` for the first layer.
            keep: whether the results keep `y`, every layer's, the last one's too: `features_of` reads them.
            options: further arguments of `linear_step_` for every layer (`sample_weight`, `is_positive`, `skip_below`).

        Returns:
            One result per layer, its `y` None unless `keep`: activities live only until the next layer has seen them,
            so that memory does not grow with depth; the last layer's are not computed.
        """
        shared = {"label_field": label_field, "product": product}
        results = []
        sumsq = None
        is_positive = options.get("is_positive")
        last = len(self.layers) - 1
        for i, (layer, optimizer) in enumerate(zip(self, self._optimizers(optimizers), strict=True)):
            if i < last and layer.outputs == "none":
                raise ValueError(f"layers[{i}].outputs='none' but a layer comes after it; accepted: 'post' or 'pre'")
            outputs = "none" if i == last and not keep else layer.outputs
            result = layer.step(x_pos, x_neg, optimizer, outputs=outputs, input_sumsq=sumsq, **shared, **options)
            shared = {}
            results.append(result if keep else replace(result, y=None))
            if i < last:
                sumsq = result.sumsq
                assert result.y is not None
                x_pos, x_neg = (result.y, None) if is_positive is not None else result.sides(result.y)
        return results

    @torch.no_grad()
    def step_and_features(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        num_classes: int = 10,
        **options: Any,
    ) -> tuple[list[StepResult], Tensor]:
        """`step` on twins `[rows, in]` that differ in their label, and what `features(x_pos)` was before it.

        Where every layer hands on what it had before its update, and on the compiled CPU backend, the rows under the
        neutral label run with the others: one pass over the weights, the first layer's product shared by all three.
        They weigh nothing in the loss, and their coefficients are exactly zero. `options` are those of `step`.
        """  # fmt: skip
        if not self._runs_together(options):
            features = self.features(x_pos, num_classes=num_classes)
            return self.step(x_pos, x_neg, optimizers, label_field=num_classes, **options), features
        rows = len(x_pos)
        others = torch.cat([x_neg, x_pos])
        others[rows:, :num_classes] = 1 / num_classes
        # A mean over 3 rows in place of 2.
        weight = torch.full((3 * rows,), 1.5, dtype=next(self.parameters()).dtype)
        weight[2 * rows :] = 0
        joint = self.step(x_pos, others, optimizers, keep=True, sample_weight=weight, **options)
        neutral = [(cast("Tensor", result.y)[2 * rows :], result.sumsq[2 * rows :]) for result in joint]
        results = [
            replace(result, y=None, sumsq=result.sumsq[: 2 * rows], goodness=result.goodness[: 2 * rows])
            for result in joint
        ]
        return results, self._side_by_side(neutral, None)

    def _runs_together(self, options: dict[str, Any]) -> bool:
        def fits(layer: FFLinear) -> bool:
            objective, compute_dtype = layer.objective, check.compute_dtype_of(layer.compute_dtype, layer.weight)
            return (
                layer.outputs == "pre"
                and not objective.paired
                and objective.reduction == "mean"
                and not isinstance(objective.threshold, Tensor)
                and functional.finds_copies(layer.weight, compute_dtype, layer.activation, layer.backend)
            )

        return "sample_weight" not in options and all(map(fits, self))

    @torch.no_grad()
    def train_layerwise(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        steps: int,
        **options: Any,
    ) -> list[Tensor]:
        """Trains the layers one after the other, each for `steps` steps on the same fixed rows.

        Returns:
            The losses of each layer, `[steps]`, before the step that they belong to.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} is not an integer >= 1")
        losses = []
        for layer, optimizer in zip(self, self._optimizers(optimizers), strict=True):
            results = [layer.step(x_pos, x_neg, optimizer, outputs="none", **options) for _ in range(steps)]
            losses.append(torch.stack([result.loss for result in results]))
            x_pos, x_neg = layer(x_pos), layer(x_neg)
        return losses

    def _optimizers(self, optimizers: Optimizer | Sequence[Optimizer | None] | None) -> Sequence[Optimizer | None]:
        if optimizers is None or isinstance(optimizers, Optimizer):
            return [optimizers] * len(self.layers)
        if len(optimizers) != len(self.layers):
            raise ValueError(
                f"optimizers has {len(optimizers)} entries; accepted: one optimizer, or {len(self.layers)}"
            )
        return optimizers

    def _pass(self, x: Tensor, keep: bool = True, **shared: Any) -> Iterable[tuple[FFLinear, Tensor, Tensor]]:
        """Layers, activities, sums of squares; without `keep` the last layer's activities are left out."""
        sumsq = None
        for index, layer in enumerate(self, 1):
            y, q = layer.activity(x, sumsq, keep=keep or index < len(self.layers), **shared)
            shared = {}
            yield layer, y, q
            # No derivative of any kind goes on to the next layer.
            x, sumsq = y.detach(), q.detach()

    def shared_product(self, x: Tensor, num_classes: int = 10) -> Tensor | None:
        """`ffkernels.shared_product` of the first layer, for `step` and `features`.

        None under float16 products, whose rows are scaled before they are rounded, each by its own norm.
        """
        negatives.check_rows(x, num_classes)
        first = next(iter(self))
        compute_dtype = check.compute_dtype_of(first.compute_dtype, first.weight)
        if compute_dtype == torch.float16:
            return None
        return functional.shared_product(x, first.weight, num_classes, compute_dtype=compute_dtype)

    def activities(self, x: Tensor) -> list[Tensor]:
        """Activities `[rows, out]` of every layer."""
        return [y for _, y, _ in self._pass(x)]

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]` of the last layer; their gradient reaches its own parameters only."""
        return self.activities(x)[-1]

    def goodness(self, x: Tensor, **shared: Any) -> Tensor:
        """Goodness `[rows, layers]` of every layer; the gradient of a column reaches its own layer only.

        `shared`: `product` and `label_field` of `linear_forward`, for the first layer.
        """
        passed = self._pass(x, keep=False, **shared)
        per_layer = [layer.objective.goodness_of(sumsq, layer.out_features) for layer, _, sumsq in passed]
        return torch.stack(per_layer, dim=1)

    @torch.no_grad()
    def predict(
        self, x: Tensor, num_classes: int = 10, layers: Sequence[int] | None = None, label_value: float = 1.0
    ) -> Tensor:
        """The label `[rows]` (int64) under which the network finds each row best.

        Each label in turn is overlaid on the first `num_classes` columns; the goodness of `layers` is summed (Hinton
        2022, section 3.3, leaves out the first). Layers that minimise positives count with the opposite sign. The
        first layer multiplies what the labels have in common once.

        Args:
            x: `[rows, in]`; what its label field holds does not matter.
            num_classes: K, labels and columns of the label field.
            layers: indices of the layers that count; None for all.
            label_value: the value that marks a label.
        """
        chosen = self._chosen(layers, default=range(len(self.layers)))
        sign = torch.tensor([1.0 if layer.objective.maximize else -1.0 for layer in self], device=x.device)[chosen]
        negatives.check_rows(x, num_classes)
        negatives.check_value(label_value)
        best = [x.new_empty(0, dtype=torch.int64)]
        for rows in x.split(max(1, PREDICTION_ROWS // num_classes)):
            under_all = rows.repeat(num_classes, 1)
            field = under_all.view(num_classes, len(rows), -1)[:, :, :num_classes]
            field.zero_().diagonal(dim1=0, dim2=2).fill_(label_value)
            totals = (self.goodness(under_all, **self._sharing(rows, num_classes))[:, chosen] * sign).sum(1)
            best.append(totals.view(num_classes, -1).argmax(0))
        return torch.cat(best)

    def _sharing(self, x: Tensor, num_classes: int) -> dict[str, Any]:
        """Arguments of `linear_forward` for the first layer and copies of `x` under each label: one product for all."""
        first = next(iter(self))
        compute_dtype = check.compute_dtype_of(first.compute_dtype, first.weight)
        if functional.finds_copies(first.weight, compute_dtype, first.activation, first.backend):
            return {"copies": num_classes}
        product = self.shared_product(x, num_classes)
        return {} if product is None else {"product": product.repeat(num_classes, 1), "label_field": num_classes}

    @torch.no_grad()
    def features(
        self, x: Tensor, layers: Sequence[int] | None = None, num_classes: int = 10, product: Tensor | None = None
    ) -> Tensor:
        """Normalised activities of `layers` under the neutral label, side by side, for a linear classifier.

        Each layer's activities are scaled by its own norm option, as the layer above would see them (rms for "none").

        Args:
            x: `[rows, in]`.
            layers: indices; None for all but the first (Hinton 2022, section 3.3), or the only one.
            num_classes: columns of the label field; 0 for rows without one.
            product: `shared_product(x, num_classes)` where it is there already.

        Returns:
            `[rows, sum of widths]` in the weights' dtype.
        """
        shared: dict[str, Any] = {} if product is None else {"product": product, "label_field": num_classes}
        passed = self._pass(negatives.neutral_label(x, num_classes) if num_classes else x, **shared)
        return self._side_by_side([(y, sumsq) for _, y, sumsq in passed], layers)

    @torch.no_grad()
    def features_of(self, results: Sequence[StepResult], layers: Sequence[int] | None = None) -> Tensor:
        """What `features` makes of the positive rows of a `step` with `keep=True`, from the activities it left."""
        if len(results) != len(self.layers) or any(result.y is None for result in results):
            raise ValueError(f"results={len(results)} without activities; accepted: those of step(..., keep=True)")
        sides = [(cast("Tensor", result.pos), result.sides(result.sumsq)[0]) for result in results]
        return self._side_by_side(sides, layers)

    def _side_by_side(self, activities: list[tuple[Tensor, Tensor]], layers: Sequence[int] | None) -> Tensor:
        features = []
        for i in self._chosen(layers, default=range(min(1, len(self.layers) - 1), len(self.layers))):
            layer, (y, sumsq) = cast("FFLinear", self.layers[i]), activities[i]
            norm = layer.norm if layer.norm != "none" else "rms"
            scale = row_scale(sumsq, layer.out_features, norm, layer.eps, layer.eps_mode)
            features.append(y.to(scale.dtype) * scale.unsqueeze(1))
        return torch.cat(features, dim=1)

    def _chosen(self, layers: Sequence[int] | None, default: Iterable[int]) -> list[int]:
        if layers is None:
            return list(default)
        count = len(self.layers)
        wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not -count <= i < count]
        if wrong or not len(layers):
            raise ValueError(f"layers={list(layers)!r}; accepted: indices of {count} layers")
        return [i % count for i in layers]
