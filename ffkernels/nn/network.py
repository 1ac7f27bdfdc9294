"""A stack of layers that trains layer by layer without a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional, negatives
from .. import validation as check
from ..backends import select
from ..functional import StepResult
from ..normalisation import row_scale
from ..objectives import Objective
from . import kept
from .conv import FFConv2d
from .layer import FFLinear, Ran, batch_norms, called_only, overridden
from .stack import Layer, Shortcut, shortcuts, stacked

# Rows times labels that a prediction works on at once; of images.
PREDICTION_ROWS, PREDICTION_IMAGES = 1280, 256


def _step_of(layer: Layer) -> Callable[..., StepResult]:
    """The step of a layer; of a frozen one, the forward pass that takes its place in a network."""
    if not layer.weight.requires_grad and not any(p.requires_grad for p in layer.parameters()):
        return layer._hand_on
    return layer.step


class Take(Protocol):
    """How a layer takes its step: `FFLinear.step`, but that the layer is an argument."""

    def __call__(
        self, layer: Layer, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any
    ) -> StepResult: ...


def take_step(
    layer: Layer, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any
) -> StepResult:
    """The step of a layer on one process."""
    return _step_of(layer)(x_pos, x_neg, optimizer, **options)


class Ready(NamedTuple):
    """The arguments of a network's step, layer by layer; `shared` are the first layer's alone."""

    optimizers: Sequence[Optimizer | None]
    outputs: Sequence[str]
    shared: dict[str, Any]


def _handed_on(layer: Layer, options: dict[str, Any]) -> torch.dtype | None:
    """The dtype of a layer's activities; None where only a call of it could tell."""
    if called_only(layer) or overridden(layer, "step"):
        return None
    return check.compute_dtype_of(options.get("compute_dtype", layer.compute_dtype), layer.weight)


def _facts(
    layers: Iterable[Layer],
    given: Sequence[Tensor],
    optimizers: Sequence[Optimizer | None],
    outputs: Sequence[str],
    options: dict[str, Any],
) -> tuple[object, ...]:
    """What the checks of a network's layers read: where it is as it was, they would find what they found."""

    def of(value: object) -> object:
        if isinstance(value, Tensor) and value.dtype == torch.int64:  # labels, another tensor at every step
            return value.shape, value.device
        if isinstance(value, Tensor):
            return id(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
        return value if isinstance(value, str | float | int | tuple | None) else id(value)

    facts: list[object] = [select.forced_backend(None), *outputs]
    facts += [(x.shape, x.dtype, x.device) for x in given]
    facts += [(name, of(value)) for name, value in options.items()]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        facts += [id(layer), id(optimizer), called_only(layer), id(layer.objective), of(layer.objective.threshold)]
        facts += [of(value) for value in layer._options().values()]
        facts.append(getattr(layer, "dropout", None))
        if isinstance(layer, FFLinear):
            facts += [id(layer.peer), of(layer.peer_mean)]
        parameters: Iterable[Tensor | None] = (layer.weight, layer.bias)
        if layer._modules:
            facts.append(layer.training)
            for norm in batch_norms(layer):
                facts += [id(norm), norm.training, norm.momentum, *map(of, norm.buffers())]
            facts += [check.is_watched(module) for module in layer.children()]
            parameters = layer.parameters()
        for p in parameters:
            facts += [of(p), None if p is None else p.data_ptr()]
            if optimizer is not None and p is not None:
                state = optimizer.state.get(p)
                facts.append(None if state is None else [(key, of(value)) for key, value in state.items()])
        if optimizer is not None:
            facts.append([(id(group), len(group["params"])) for group in optimizer.param_groups])
    return tuple(facts)


def _is_matrix(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


class FFNetwork(nn.Module):
    """Forward-Forward layers on top of each other; each normalises what the one below hands on.

    Args:
        layers: `FFLinear` and `FFConv2d`, first one first, of widths that fit; in front of any of them
            `nn.MaxPool2d`, `nn.AvgPool2d`, `nn.LPPool2d`, `nn.Flatten`, `nn.GroupNorm` and `nn.LayerNorm` without
            parameters, and `Shortcut`, which learn nothing and count for no layer: optimizers, results and indices are
            those of the layers that learn, which `layers` holds.

    Raises:
        TypeError, ValueError: for no layers, for one of another kind, and for widths that do not fit.
    """

    # Networks pickled by earlier versions lack it.
    _shortcuts: frozenset[int] = frozenset()

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers is a {type(layers).__name__}; accepted: a list of layers, even of a single one")
        learning, between = stacked(list(layers))
        heads = [layer.objective for layer in learning if isinstance(layer.objective, nn.Module)]
        if len(set(heads)) < len(heads):
            raise ValueError("two layers have the same ProjectionHead; accepted: one for each layer")
        self.layers = nn.ModuleList(learning)
        self.between = nn.ModuleList([nn.Sequential(*modules) for modules in between]) if any(between) else None
        self._shortcuts = shortcuts(between)
        # The facts under which the last check of all layers found nothing.
        self._checked: object = None

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast("Iterable[Layer]", self.layers))

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
            per_layer, outputs = self._optimizers(optimizers), self._outputs(keep)
            shared = {"label_field": label_field, "product": product}
            results = kept.step(self, x_pos, x_neg, per_layer, outputs, keep=keep, **shared, **options)
            if results is not None:
                return results
        ready = self._ready(x_pos, x_neg, optimizers, options, label_field=label_field, product=product, keep=keep)
        x_pos, x_neg = self._into(0, x_pos), None if x_neg is None else self._into(0, x_neg)
        return self._climb(x_pos, x_neg, ready, options, keep=keep)

    def _outputs(self, keep: bool) -> list[str]:
        """What each layer hands on; the last one only to who keeps it."""
        outputs: list[str] = [layer.outputs for layer in self]
        return outputs if keep else [*outputs[:-1], "none"]

    def _ready(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        options: dict[str, Any],
        *,
        label_field: int | None = None,
        product: Tensor | None = None,
        keep: bool = False,
    ) -> Ready:
        """The arguments of a step, checked but for what the first layer checks itself."""
        for name in ("outputs", "input_sumsq"):
            if name in options:
                raise TypeError(f"{name} came to a whole network; accepted: layer.outputs, and sums made by the layers")
        per_layer = self._optimizers(optimizers)
        outputs = self._outputs(keep)
        if "none" in outputs[:-1]:
            i = outputs.index("none")
            raise ValueError(f"layers[{i}].outputs='none' but a layer comes after it; accepted: 'post' or 'pre'")
        self._check_upper(x_pos, x_neg, per_layer, outputs, options)
        self._check_labels(x_pos, options)
        shared = {"label_field": label_field, "product": product}
        if not isinstance(self.layers[0], FFLinear):
            for name, value in shared.items():
                if value is not None:
                    raise ValueError(f"{name} came to a network whose first layer is a convolution; accepted: None")
            shared = {}
        return Ready(per_layer, outputs, shared)

    def _climb(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        ready: Ready,
        options: dict[str, Any],
        *,
        keep: bool,
        sumsq: Tensor | None = None,
        take: Take = take_step,
    ) -> list[StepResult]:
        """A step of each layer by `take`, on rows as the first one takes them; `sumsq`: their sums of squares."""
        results = []
        one_side, last, shared = x_neg is None, len(self.layers) - 1, ready.shared
        inputs = self._inputs(x_pos, x_neg)
        for i, (layer, optimizer) in enumerate(zip(self, ready.optimizers, strict=True)):
            result = take(
                layer, x_pos, x_neg, optimizer, outputs=ready.outputs[i], input_sumsq=sumsq, **shared, **options
            )
            shared = {}
            results.append(result if keep else replace(result, y=None))
            if i < last:
                assert result.y is not None
                y, sumsq = self._between(i + 1, result.y, result.sumsq, inputs)
                x_pos, x_neg = (y, None) if one_side else result.sides(y)
        return results

    def _into(self, index: int, x: Tensor, inputs: dict[int, Tensor] | None = None) -> Tensor:
        """Rows as a layer takes them: what stands in front of it is done.

        `inputs`: those of layers below that shortcuts begin at, to which its own is added if one does here.
        """
        if self.between is None:
            return x
        for module in cast("nn.Sequential", self.between[index]):
            if isinstance(module, Shortcut):
                if inputs is None:
                    raise ValueError(
                        f"layers[{index}] has a Shortcut in front of it, but its goodness is overridden; accepted: "
                        "one of the two"
                    )
                x = module.join(x, inputs[index - module.back])
            else:
                x = module(x)
        if inputs is not None and index in self._shortcuts:
            inputs[index] = x
        return x

    def _inputs(self, x_pos: Tensor, x_neg: Tensor | None = None) -> dict[int, Tensor] | None:
        """Where the inputs of layers go that shortcuts begin at, the first one's of a joint batch; None for none."""
        if not self._shortcuts:
            return None
        if 0 not in self._shortcuts:
            return {}
        return {0: x_pos if x_neg is None else torch.cat([x_pos, x_neg])}

    def _between(
        self, index: int, x: Tensor, sumsq: Tensor, inputs: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`_into`, and what is known of the sums of squares of such rows."""
        y = self._into(index, x, inputs)
        keeps = self.between is None or all(isinstance(m, nn.Flatten) for m in cast("Any", self.between[index]))
        return y, sumsq if keeps else None

    def _check_labels(self, x: Tensor, options: dict[str, Any]) -> None:
        """Raises for labels that do not fit every layer, each of which looks at them again before it writes."""
        labels = options.get("labels")
        classes = [layer.objective.classes for layer in self if layer.objective.classes is not None]
        if labels is not None and classes and "objective" not in options and isinstance(x, Tensor) and x.dim():
            check.labels(labels, len(x), min(classes), x.device)

    def _check_upper(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        per_layer: Sequence[Optimizer | None],
        outputs: Sequence[str],
        options: dict[str, Any],
    ) -> None:
        """Raises what a step of any layer but the first would, which checks itself before it writes.

        Compiled code has no need of it: there all checks are made when it is traced, before anything runs.
        """
        given = [x for x in (x_pos, x_neg) if x is not None]
        if len(self.layers) == 1 or torch.compiler.is_compiling() or not all(self._has_dimensions(x) for x in given):
            return
        facts = None if "is_positive" in options else _facts(self, given, per_layer, outputs, options)
        if facts is not None and facts == self._checked:
            return
        rows = sum(map(len, given))
        below = None
        # A row's shape on its way up: maps hang on the geometry of all that is below.
        shape = x_pos.shape[1:] if self._takes_maps else None
        inputs: dict[int, Tensor] | None = {} if self._shortcuts else None
        for i, (layer, optimizer) in enumerate(zip(self, per_layer, strict=True)):
            try:
                if shape is not None:
                    shape = self._into(i, torch.empty(1, *shape, device="meta"), inputs).shape[1:]
                if (below is not None or isinstance(layer, FFConv2d)) and not overridden(layer, "step"):
                    dtype = x_pos.dtype if below is None else _handed_on(below, options) or layer.weight.dtype
                    of_row = shape or (cast("FFLinear", layer).in_features,)
                    x = layer.weight.new_zeros((), dtype=dtype).expand(rows, *of_row)
                    sides = (x, None) if x_neg is None else (x[: len(x_pos)], x[len(x_pos) :])
                    _step_of(layer)(*sides, optimizer, outputs=outputs[i], only_checks=True, **options)
                if shape is not None:
                    shape = torch.Size(layer._shape_after(shape))
            except (ValueError, TypeError, RuntimeError) as error:
                # What the first layer says too, in the same words, is wrong with the call and not with a layer.
                first = self._wrong_in_first(x_pos, x_neg, per_layer[0], outputs[0], options)
                if first is not None:
                    if str(first) == str(error):
                        raise first from None
                    i, error = 0, first
                kind = ValueError if isinstance(error, RuntimeError) else type(error)
                raise kind(f"layers[{i}]: {error}") from None
            below = layer
        self._checked = facts

    def _wrong_in_first(
        self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, outputs: str, options: dict[str, Any]
    ) -> ValueError | TypeError | None:
        """What the first layer's step would raise, of a linear one, which is checked only when it comes to it."""
        first = next(iter(self))
        if isinstance(first, FFLinear) and not overridden(first, "step"):
            try:
                _step_of(first)(x_pos, x_neg, optimizer, outputs=outputs, only_checks=True, **options)
            except (ValueError, TypeError) as error:
                return error
        return None

    @property
    def _takes_maps(self) -> bool:
        """Whether rows may be maps."""
        return self.between is not None or isinstance(self.layers[0], FFConv2d)

    def _has_dimensions(self, x: object) -> bool:
        """Whether rows have as many dimensions as is usual for the first layer."""
        return (isinstance(x, Tensor) and x.dim() == 4) if self._takes_maps else _is_matrix(x)

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
                and _step_of(layer) == layer.step
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
            and _is_matrix(x_pos)
            and _is_matrix(x_neg)
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

    def _ready_layerwise(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        options: dict[str, Any],
    ) -> Ready:
        """The arguments of steps layer by layer, which hand nothing on, checked as those of a step are."""
        per_layer, outputs = self._optimizers(optimizers), ["none"] * len(self.layers)
        self._check_upper(x_pos, x_neg, per_layer, outputs, options)
        self._check_labels(x_pos, options)
        return Ready(per_layer, outputs, {})

    def _layer_by_layer(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        per_layer: Sequence[Optimizer | None],
        steps: int,
        options: dict[str, Any],
        take: Take = take_step,
    ) -> list[Tensor]:
        losses = []
        of_pos: dict[int, Tensor] | None = {} if self._shortcuts else None
        of_neg: dict[int, Tensor] | None = {} if self._shortcuts else None
        for i, (layer, optimizer) in enumerate(zip(self, per_layer, strict=True)):
            x_pos, x_neg = self._into(i, x_pos, of_pos), None if x_neg is None else self._into(i, x_neg, of_neg)
            results = [take(layer, x_pos, x_neg, optimizer, outputs="none", **options) for _ in range(steps)]
            losses.append(torch.stack([result.loss for result in results]))
            if x_neg is not None and batch_norms(layer):
                # The statistics are those of both sides together, as in the steps.
                x_pos, x_neg = layer(torch.cat([x_pos, x_neg])).split([len(x_pos), len(x_neg)])
            else:
                x_pos, x_neg = layer(x_pos), None if x_neg is None else layer(x_neg)
        return losses

    def _optimizers(self, optimizers: Optimizer | Sequence[Optimizer | None] | None) -> Sequence[Optimizer | None]:
        if optimizers is None or isinstance(optimizers, Optimizer):
            return [optimizers] * len(self.layers)
        if not isinstance(optimizers, Sequence):
            raise TypeError(
                f"optimizers is a {type(optimizers).__name__}; accepted: a torch.optim.Optimizer, a sequence of them, "
                "or None"
            )
        if len(optimizers) != len(self.layers):
            raise ValueError(
                f"optimizers has {len(optimizers)} entries; accepted: one optimizer for all, or {len(self.layers)}, "
                "one for each layer"
            )
        return optimizers

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
        passed = self._pass(negatives.neutral_label(x, num_classes) if num_classes else x, **shared)
        return self._side_by_side([(ran.y, ran.sumsq) for _, ran in passed], layers)

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
