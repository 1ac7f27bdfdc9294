"""A stack of layers under a step: what is checked before the first one is written, and what each hands to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import validation as check
from ..backends import select
from ..functional import StepResult
from .conv import FFConv2d
from .layer import FFLinear, batch_norms, called_only, overridden
from .stack import Layer, Shortcut, shortcuts, stacked


def step_of(layer: Layer) -> Callable[..., StepResult]:
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
    return step_of(layer)(x_pos, x_neg, optimizer, **options)


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


def is_matrix(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


class LayerByLayer(nn.Module):
    """Layers on top of each other, and the steps of each in turn; what they are asked for and give is `FFNetwork`'s."""

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

    # Past `Module.__getattr__`, which costs a small network's step more than a layer's product does.
    def __iter__(self) -> Iterator[Layer]:
        return iter(self._modules["layers"]._modules.values())  # type: ignore[union-attr, arg-type]

    def __len__(self) -> int:
        return len(self._modules["layers"]._modules)  # type: ignore[union-attr]

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
                    step_of(layer)(*sides, optimizer, outputs=outputs[i], only_checks=True, **options)
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
                step_of(first)(x_pos, x_neg, optimizer, outputs=outputs, only_checks=True, **options)
            except (ValueError, TypeError) as error:
                return error
        return None

    @property
    def _takes_maps(self) -> bool:
        """Whether rows may be maps."""
        return self.between is not None or isinstance(self.layers[0], FFConv2d)

    def _has_dimensions(self, x: object) -> bool:
        """Whether rows have as many dimensions as is usual for the first layer."""
        return (isinstance(x, Tensor) and x.dim() == 4) if self._takes_maps else is_matrix(x)

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
            return [optimizers] * len(self)
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
