"""A stack of layers that trains layer by layer without a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import functional, negatives
from .. import validation as check
from ..functional import StepResult
from ..normalisation import row_scale
from ..objectives import Objective
from . import kept
from .layer import FFLinear, Ran, batch_norms, called_only, overridden
from .layerwise import LayerByLayer, is_matrix, step_of
from .stack import Layer

# Rows times labels that a prediction works on at once; of images.
PREDICTION_ROWS, PREDICTION_IMAGES = 1280, 256


class FFNetwork(LayerByLayer):
    """Forward-Forward layers on top of each other; each normalises what the one below hands on.

    Args:
        layers: `FFLinear` and `FFConv2d`, first one first, of widths that fit; in front of any of them
            `nn.MaxPool2d`, `nn.AvgPool2d`, `nn.LPPool2d`, `nn.Flatten`, `nn.GroupNorm` and `nn.LayerNorm` without
            parameters, and `Shortcut`, which learn nothing and count for no layer: optimizers, results and indices are
            those of the layers that learn, which `layers` holds.

    Raises:
        TypeError, ValueError: for no layers, for one of another kind, and for widths that do not fit.
    """

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

        All layers are checked before the first one is written. A layer none of whose parameters requires a gradient
        stays as it is, its running mean too: it hands on its activities, and has a loss and a goodness. The running
        statistics of its batch normalisation go on in train mode, as PyTorch's do.

        Args:
            x_pos, x_neg: rows of both sides, as in `linear_step_`.
            optimizers: one for all layers, or a sequence with one for each.
            label_field, product: arguments of `linear_step_` for the first layer.
            keep: whether the results keep `y`, every layer's, the last one's too: `features_of` reads them.
            options: further arguments of `linear_step_` for every layer (`labels`, `sample_weight`, `is_positive`,
                `skip_below`).

        Returns:
            One result per layer, its `y` None unless `keep`: activities live only until the next layer has seen them,
            so that memory does not grow with depth; the last layer's are not computed.
        """
        if self.between is None and options.keys() <= kept.OPTIONS:
            per_layer, of_rows = self._optimizers(optimizers), {**options, "label_field": label_field}
            results = kept.step([*iter(self)], x_pos, x_neg, per_layer, keep=keep, product=product, **of_rows)
            if results is not None:
                return results
        ready = self._ready(x_pos, x_neg, optimizers, options, label_field=label_field, product=product, keep=keep)
        x_pos, x_neg = self._into(0, x_pos), None if x_neg is None else self._into(0, x_neg)
        return self._climb(x_pos, x_neg, ready, options, keep=keep)

    @torch.no_grad()
    def step_and_features(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        num_classes: int = 10,
        **options: Any,
    ) -> tuple[list[StepResult], Tensor]:
        """`step` on rows `[rows, in]` and their copies under other labels, and what `features(x_pos)` was before it.

        Where every layer hands on what it had before its update, and on the compiled CPU backend, the rows under the
        neutral label run with the others: one pass over the weights, the first layer's product shared by all three.
        They weigh nothing in the loss, and their coefficients are exactly zero. `options` are those of `step`.
        """
        keep = options.get("keep", False)
        if "labels" in options or any(layer.objective.classes is not None for layer in self):
            raise ValueError("step_and_features overlays labels, which classes do without; accepted: step")
        if not self._runs_together(x_pos, x_neg, num_classes, options):
            features = self.features(x_pos, num_classes=num_classes)
            options = {"label_field": num_classes or None, **options}
            return self.step(x_pos, x_neg, optimizers, **options), features
        negatives.check_rows(x_pos, num_classes)
        rows = len(x_pos)
        others = torch.cat([x_neg, x_pos])
        others[rows:, :num_classes] = 1 / num_classes
        # A mean over 3 rows in place of 2.
        weight = next(self.parameters()).new_full((3 * rows,), 1.5)
        weight[2 * rows :] = 0
        joint = self.step(x_pos, others, optimizers, sample_weight=weight, **{**options, "keep": True})
        activities = [cast("Tensor", result.y) for result in joint]
        neutral = [(y[2 * rows :], result.sumsq[2 * rows :]) for y, result in zip(activities, joint, strict=True)]
        results = [
            replace(
                result,
                y=y[: 2 * rows] if keep else None,
                sumsq=result.sumsq[: 2 * rows],
                goodness=result.goodness[: 2 * rows],
            )
            for y, result in zip(activities, joint, strict=True)
        ]
        return results, self._side_by_side(neutral, None)

    def _runs_together(self, x_pos: Tensor, x_neg: Tensor, num_classes: int, options: dict[str, Any]) -> bool:
        """Whether the rows under the neutral label can be further rows of the step, and change nothing else of it."""

        def fits(layer: Layer) -> bool:
            objective = options.get("objective", layer.objective)
            return (
                isinstance(layer, FFLinear)
                and layer.outputs == "pre"
                and isinstance(objective, Objective)
                and not objective.paired
                and objective.reduction == "mean"
                and not isinstance(objective.threshold, Tensor)
                and step_of(layer) == layer.step
                and not called_only(layer)
                and not overridden(layer, "step")
                and functional.finds_copies(
                    layer.weight,
                    check.compute_dtype_of(layer.compute_dtype, layer.weight),
                    layer.activation,
                    layer.backend,
                )
            )

        # What else changes a forward pass, or says something of each row, belongs to the step's rows alone.
        free = {"objective", "skip_below", "peer", "peer_mean", "keep"}
        return (
            options.keys() <= free
            and bool(num_classes)
            and is_matrix(x_pos)
            and is_matrix(x_neg)
            and x_pos.shape == x_neg.shape
            and self.between is None
            and all(map(fits, self))
        )

    @torch.no_grad()
    def train_layerwise(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
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
        ready = self._ready_layerwise(x_pos, x_neg, optimizers, options)
        return self._layer_by_layer(x_pos, x_neg, ready.optimizers, steps, options)

    def _pass(
        self, x: Tensor, keep: bool = True, input_sumsq: Tensor | None = None, **shared: Any
    ) -> Iterable[tuple[Layer, Ran]]:
        """Layers and what each leaves; without `keep` the last linear layer's activities are left out.

        `input_sumsq`: the rows' sums of squares, where they are known.
        """
        sumsq: Tensor | None = None
        inputs: dict[int, Tensor] | None = {} if self._shortcuts else None
        if input_sumsq is None:
            x = self._into(0, x, inputs)
        else:
            x, sumsq = self._between(0, x, input_sumsq, inputs)
        for index, layer in enumerate(self, 1):
            ran = layer._run(x, sumsq, keep=keep or index < len(self.layers), **shared)
            shared = {}
            yield layer, ran
            if index < len(self.layers):
                # No derivative of any kind goes on to the next layer.
                x, sumsq = self._between(index, ran.y.detach(), ran.sumsq.detach(), inputs)

    def shared_product(self, x: Tensor, num_classes: int = 10) -> Tensor | None:
        """`ffkernels.shared_product` of the first layer, for `step` and `features`.

        None under float16 products, whose rows are scaled before they are rounded, each by its own norm.
        """
        first = self._first_linear()
        negatives.check_rows(x, num_classes)
        compute_dtype = check.compute_dtype_of(first.compute_dtype, first.weight)
        if compute_dtype == torch.float16:
            return None
        return functional.shared_product(x, first.weight, num_classes, compute_dtype=compute_dtype)

    def activities(self, x: Tensor) -> list[Tensor]:
        """Activities `[rows, out]` of every layer."""
        return [ran.y for _, ran in self._pass(x)]

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]` of the last layer; their gradient reaches its own parameters only."""
        return self.activities(x)[-1]

    def goodness(self, x: Tensor, **shared: Any) -> Tensor:
        """Goodness `[rows, layers]` of every layer; the gradient of a column reaches its own layer only.

        `[rows, layers, classes]` where the layers' objectives have classes, all of them the same number.

        `shared`: `product` and `label_field` of `linear_forward`, for the first layer.
        """
        classes = self._classes(range(len(self.layers)))
        per_layer = []
        for i, (layer, ran) in enumerate(self._pass(x, keep=classes is not None, **shared)):
            per_layer.append(self._goodness(i, layer, ran, x))
            x = ran.y
        return torch.stack(per_layer, dim=1)

    def _goodness(self, index: int, layer: Layer, ran: Ran, x: Tensor) -> Tensor:
        """A layer's goodness, from what it has left of rows `x`."""
        return layer.goodness(self._into(index, x)) if overridden(layer, "goodness") else layer._goodness_of(ran)

    def _classes(self, layers: Iterable[int]) -> int | None:
        """How many classes the objectives of these layers have, which must be the same number, or none."""
        counts = {cast("Layer", self.layers[i]).objective.classes for i in layers}
        if len(counts) > 1:
            raise ValueError(
                f"the layers' objectives have {', '.join(map(str, counts))} classes; accepted: the same for all, or "
                "layers= that agree, or layer.goodness"
            )
        return counts.pop()

    @torch.no_grad()
    def predict(
        self, x: Tensor, num_classes: int = 10, layers: Sequence[int] | None = None, label_value: float = 1.0
    ) -> Tensor:
        """The label `[rows]` (int64) under which the network finds each row best.

        Each label in turn is overlaid on the first `num_classes` columns; the goodness of `layers` is summed (Hinton
        2022, section 3.3, leaves out the first). Layers that minimise positives count with the opposite sign. The
        first layer multiplies what the labels have in common once. Layers whose objective has classes need no label:
        one pass over the rows as they are, and the class of the largest sum.

        Args:
            x: `[rows, in]`; what its label field holds does not matter.
            num_classes: K, labels and columns of the label field; not read where the objectives have classes.
            layers: indices of the layers that count; None for all.
            label_value: the value that marks a label.
        """
        chosen = self._chosen(layers, default=range(len(self.layers)))
        classes = self._classes(chosen)
        if classes is not None:
            return self._predict_classes(x, chosen)
        self._first_linear()
        negatives.check_rows(x, num_classes)
        negatives.check_value(label_value)
        signs = [1.0 if layer.objective.maximize else -1.0 for layer in self]
        sign = next(self.parameters()).new_tensor([signs[i] for i in chosen], device=x.device)
        best = [x.new_empty(0, dtype=torch.int64)]
        for rows in x.split(max(1, PREDICTION_ROWS // num_classes)):
            under_all = rows.repeat(num_classes, 1)
            field = under_all.view(num_classes, len(rows), x.shape[1])[:, :, :num_classes]
            field.zero_().diagonal(dim1=0, dim2=2).fill_(label_value)
            totals = (self.goodness(under_all, **self._sharing(rows, num_classes))[:, chosen] * sign).sum(1)
            best.append(totals.view(num_classes, len(rows)).argmax(0))
        return torch.cat(best)

    def _predict_classes(self, x: Tensor, chosen: Sequence[int]) -> Tensor:
        if self._takes_maps:
            check.tensor("x", x)
        else:
            check.matrix("x", x)
        best = [x.new_empty(0, dtype=torch.int64)]
        for rows in x.split(PREDICTION_ROWS if x.dim() == 2 else PREDICTION_IMAGES):
            total: Tensor | float = 0.0
            below = rows
            for i, (layer, ran) in enumerate(self._pass(rows)):
                if i in chosen:
                    own = overridden(layer, "goodness")
                    goodness = layer.goodness(below) if own else layer._goodness_of(ran)
                    total = total + (goodness if layer.objective.maximize else -goodness)
                if i == max(chosen):
                    break
                below = ran.y
            assert isinstance(total, Tensor)
            best.append(total.argmax(1))
        return torch.cat(best)

    def _first_linear(self) -> FFLinear:
        first = self.layers[0]
        if not isinstance(first, FFLinear):
            raise ValueError(
                "the first layer is a convolution, which has no label field; accepted: objectives of classes, or a "
                "classifier on features(x, num_classes=0)"
            )
        return first

    def _sharing(self, x: Tensor, num_classes: int) -> dict[str, Any]:
        """Arguments of `linear_forward` for the first layer and copies of `x` under each label: one product for all."""
        first = self._first_linear()
        if called_only(first):
            return {}
        compute_dtype = check.compute_dtype_of(first.compute_dtype, first.weight)
        if functional.finds_copies(first.weight, compute_dtype, first.activation, first.backend):
            return {"copies": num_classes}
        product = self.shared_product(x, num_classes)
        return {} if product is None else {"product": product.repeat(num_classes, 1), "label_field": num_classes}

    @torch.no_grad()
    def features(
        self,
        x: Tensor,
        layers: Sequence[int] | None = None,
        num_classes: int | None = None,
        product: Tensor | None = None,
    ) -> Tensor:
        """Normalised activities of `layers` under the neutral label, side by side, for a linear classifier.

        Each layer's activities are scaled by its own norm option, as the layer above would see them (rms for "none").

        Args:
            x: `[rows, in]`, or maps, of which so many run at once that their activities take little memory.
            layers: indices; None for all but the first (Hinton 2022, section 3.3), or the only one.
            num_classes: columns of the label field; 0 for rows without one. None: 10, or 0 where the objectives have
                classes, whose rows bear no label.
            product: `shared_product(x, num_classes)` where it is there already.

        Returns:
            `[rows, sum of widths]` in the weights' dtype.
        """
        if num_classes is None:
            num_classes = 10 if next(iter(self)).objective.classes is None else 0
        by_batch = any(norm.training for layer in self for norm in batch_norms(layer))
        if isinstance(x, Tensor) and x.dim() == 4 and len(x) > PREDICTION_IMAGES and not by_batch:
            return torch.cat([self.features(part, layers, num_classes) for part in x.split(PREDICTION_IMAGES)])
        shared: dict[str, Any] = {} if product is None else {"product": product, "label_field": num_classes}
        x = negatives.neutral_label(x, num_classes) if num_classes else x
        passed = kept.forward(self, x, product, num_classes) if self.between is None else None
        if passed is None:
            return self._side_by_side([(ran.y, ran.sumsq) for _, ran in self._pass(x, **shared)], layers)
        return self._side_by_side(passed.activities, layers)

    @torch.no_grad()
    def features_and_product(
        self, x: Tensor, layers: Sequence[int] | None = None, num_classes: int = 10
    ) -> tuple[Tensor, Tensor | None]:
        """`features(x, layers, num_classes)`, and `shared_product(x, num_classes)` for a step on these rows.

        The compiled CPU backend leaves a product of float32 operands on the way through the first layer.
        """
        passed = None
        if self.between is None and is_matrix(x) and num_classes:
            neutral = negatives.neutral_label(x, num_classes)
            passed = kept.forward(self, neutral, None, num_classes, leaves_product=True)
        if passed is None:
            product = self.shared_product(x, num_classes)
            return self.features(x, layers, num_classes, product), product
        return self._side_by_side(passed.activities, layers), passed.product

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
            layer, (y, sumsq) = cast("Layer", self.layers[i]), activities[i]
            y = y.flatten(1)
            norm = layer.norm if layer.norm != "none" else "rms"
            scale = row_scale(sumsq, y.shape[1], norm, layer.eps, layer.eps_mode)
            features.append(y.to(scale.dtype) * scale.unsqueeze(1))
        return features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def _chosen(self, layers: Sequence[int] | None, default: Iterable[int]) -> list[int]:
        if layers is None:
            return list(default)
        count = len(self.layers)
        wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not -count <= i < count]
        if wrong or not len(layers):
            raise ValueError(f"layers={list(layers)!r}; accepted: indices of {count} layers")
        return [i % count for i in layers]
