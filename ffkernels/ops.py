"""The operators: schemas from the records of `spec`, one place that flattens them and one that puts them together.

All are defined for every device; the backend that a call runs on travels in its last argument, chosen by
`backends.select`. Schemas are written out, which costs a fraction of what `torch.library.custom_op` does per call.
Where nobody watches operators, a call goes to the backend at once, which saves the way through PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from string import ascii_lowercase
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

from .backends import select
from .backends.eager.conv import size_of
from .spec import (
    Geometry,
    Goal,
    Layer,
    LayerStep,
    MapGradients,
    MapRows,
    Maps,
    MapSlopes,
    Numbers,
    Outputs,
    PeerPull,
    Rows,
    Slopes,
    Slot,
    Update,
)

_SCALARS = {int: "int", float: "float", bool: "bool", torch.dtype: "ScalarType"}


class Argument(NamedTuple):
    """One argument of a schema: its name, its type, and whether the operator writes it."""

    name: str
    type: str
    is_written: bool = False


def arguments(record: Any, reads: tuple[str, ...] = (), prefix: str = "") -> Iterator[Argument]:
    """The arguments that a record is flattened to; `reads`: fields that this operator does not write."""
    for field, hint in get_type_hints(record, include_extras=True).items():
        name = prefix + field
        kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
        optional = "?" if kinds != [hint] else ""
        (kind,) = kinds[:1]
        marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
        if kind is Slot:
            yield from arguments(Slot, prefix=f"{name}_")
        elif marks or kind is Tensor:
            yield Argument(name, "Tensor" + optional, "written" in marks and field not in reads)
        elif kind == list[Tensor]:
            yield Argument(name, "Tensor[]", True)
        elif field == "numbers":
            yield Argument(name, "float[]")
        elif get_origin(kind) is tuple:
            yield Argument(name, "int[]")
        else:
            yield Argument(name, _SCALARS.get(kind, "str"))


def schema(name: str, *given: Argument, returns: str = "()") -> str:
    """A schema in PyTorch's language; what is written is named by a letter each."""
    letters = iter(ascii_lowercase)
    texts = []
    for argument in (*given, Argument("backend", "str")):
        kind = argument.type
        if argument.is_written:
            kind = kind.replace("Tensor", f"Tensor({next(letters)}!)")
        texts.append(f"{kind} {argument.name}")
    return f"{name}({', '.join(texts)}) -> {returns}"


_READ_LAYER = tuple(arguments(Layer, reads=("weight", "bias")))
_WRITTEN = (
    Argument("y", "Tensor?", True),
    Argument("sumsq", "Tensor", True),
    Argument("class_sums", "Tensor?", True),
    Argument("squares", "bool"),
    Argument("product_out", "Tensor?", True),
)
# Each operator's records, and how a backend's function of that name takes them.
SCHEMAS = {
    # Written: where given `y` [rows, out] in the compute dtype, or in the weight's; its sums of squares [rows]; and, by
    # backends of `select.SUMS_CLASSES`, sums over class groups [rows, classes]: of `squares`, or of the activities;
    # `product_out` by those of `select.LEAVES_PRODUCT`.
    "linear_forward_": (*arguments(Rows), *_READ_LAYER, *_WRITTEN),
    # One whole layer step on the joint batch. Written: weight and bias (or, under the rule "grad", their gradients),
    # optimizer state, the running mean, and the outputs.
    "linear_step_": tuple(
        argument for record in (Rows, Layer, Goal, PeerPull, Update, Outputs) for argument in arguments(record)
    ),
    # The last stage alone, with slopes that somebody else has made of what the forward has left.
    "linear_update_": tuple(
        argument for record in (Rows, Layer, Slopes, PeerPull, Update) for argument in arguments(record)
    ),
}


def flatten(*records: tuple[Any, ...]) -> list[Any]:
    """The records' fields one after the other."""
    return [value for record in records for value in record]


def flatten_step(rows: Rows, layer: Layer, goal: Goal, pull: PeerPull, update: Update, outputs: Outputs) -> list[Any]:
    """The arguments of the operator `linear_step_` but for the backend."""
    return flatten(rows, layer, goal, pull, *_slots(update), outputs)


def _slots(update: Update) -> tuple[tuple[Any, ...], ...]:
    return (update.rule,), update.weight, update.bias


def _put_together(record: Any, values: Iterator[Any]) -> Any:
    return record(*islice(values, len(record._fields)))


def _update_of(values: Iterator[Any]) -> Update:
    rule = next(values)
    slots = []
    for _ in range(2):
        state, numbers, lr = islice(values, 3)
        if rule != "grad" and not numbers and state:
            *state, brought = state
            numbers = brought.tolist()
        slots.append(Slot(list(state), Numbers(*numbers) if numbers else (), lr))
    return Update(rule, *slots)


def _forward_on_backend(*args: Any) -> None:
    values = iter(args)
    rows, layer = _put_together(Rows, values), _put_together(Layer, values)
    *written, backend = values
    _forward_into(rows, layer, backend, *written)


def _forward_into(
    rows: Rows,
    layer: Layer,
    backend: str,
    y: Tensor | None,
    sumsq: Tensor,
    class_sums: Tensor | None,
    squares: bool,
    product_out: Tensor | None,
) -> None:
    sums = () if class_sums is None else (class_sums, squares)
    product = {} if product_out is None else {"product_out": product_out}
    select.load(backend).linear_forward_(rows, layer, y, sumsq, *sums, **product)


def _step_on_backend(*args: Any) -> None:
    values = iter(args)
    records = [_put_together(record, values) for record in (Rows, Layer, Goal, PeerPull)]
    update = _update_of(values)
    outputs = _put_together(Outputs, values)
    select.load(next(values)).linear_step_(*records, update, outputs)


def _update_on_backend(*args: Any) -> None:
    values = iter(args)
    records = [_put_together(record, values) for record in (Rows, Layer, Slopes, PeerPull)]
    update = _update_of(values)
    select.load(next(values)).linear_update_(*records, update)


# `linear_forward_` with results of its own; without `keep` nobody reads y: it is [0, out].
_FORWARD = schema(
    "linear_forward", *arguments(Rows), *_READ_LAYER, Argument("keep", "bool"), returns="(Tensor, Tensor)"
)


def _results(rows: Rows, layer: Layer, keep: bool) -> tuple[Tensor, Tensor]:
    total, weight = rows.x_pos.shape[0] + rows.x_neg.shape[0], layer.weight
    master = torch.float64 if weight.dtype == torch.float64 else torch.float32
    y = rows.x_pos.new_empty(total if keep else 0, weight.shape[0], dtype=layer.compute_dtype)
    return y, weight.new_empty(total, dtype=master)


def _linear_forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    values = iter(args)
    rows, layer = _put_together(Rows, values), _put_together(Layer, values)
    return _results(rows, layer, next(values))


def _linear_forward(*args: Any) -> tuple[Tensor, Tensor]:
    *read, keep, backend = args
    y, sumsq = _linear_forward_fake(*args)
    _forward_on_backend(*read, y if keep else None, sumsq, None, True, None, backend)
    return y, sumsq


def _writes_only(*args: Any) -> None:
    return None


_CONVOLUTION = (*arguments(MapRows), *_READ_LAYER, *arguments(Geometry))
# A convolution's forward pass, to the fields of `Maps`; and the gradients of weight and bias by the moments' slopes,
# which may overwrite the maps.
_CONV_FORWARD = schema(
    "conv2d_forward",
    *_CONVOLUTION,
    Argument("is_centred", "bool"),
    Argument("pivot", "Tensor?"),
    returns=f"({', '.join(['Tensor'] * 6)})",
)
_CONV_GRADIENTS = schema(
    "conv2d_gradients_",
    *_CONVOLUTION,
    *arguments(Maps),
    *arguments(MapSlopes, prefix="slope_"),
    returns=f"({', '.join(['Tensor'] * len(MapGradients._fields))})",
)


def _convolution_of(values: Iterator[Any]) -> tuple[MapRows, Layer, Geometry]:
    rows, layer = _put_together(MapRows, values), _put_together(Layer, values)
    # What the dispatcher hands on as lists.
    geometry: Any = [tuple(v) if isinstance(v, list) else v for v in islice(values, len(Geometry._fields))]
    return rows, layer, Geometry(*geometry)


def _conv_forward(*args: Any) -> Maps:
    values = iter(args)
    read = _convolution_of(values)
    is_centred, pivot, backend = values
    return select.load(backend).conv2d_forward(*read, is_centred, pivot)


def _conv_forward_fake(*args: Any) -> Maps:
    values = iter(args)
    read = _convolution_of(values)
    is_centred, pivot, backend = values
    return select.load(backend).conv2d_forward_like(*read, is_centred, pivot)


def _conv_gradients(*args: Any) -> MapGradients:
    values = iter(args)
    read, maps = _convolution_of(values), _put_together(Maps, values)
    slopes = _put_together(MapSlopes, values)
    return select.load(next(values)).conv2d_gradients_(*read, maps, slopes)


def _conv_gradients_fake(*args: Any) -> MapGradients:
    values = iter(args)
    rows, layer, geometry = _convolution_of(values)
    _, slopes = _put_together(Maps, values), _put_together(MapSlopes, values)
    new, channels = layer.weight.new_empty, len(layer.weight)
    by_place = new(1, channels, *size_of(rows, layer, geometry)) if slopes.by_place else new(0)
    return MapGradients(new(layer.weight.shape), new(channels), by_place)


# Arguments of an operator that only writes, to its backend.
ON_BACKEND = {
    "linear_forward_": _forward_on_backend,
    "linear_step_": _step_on_backend,
    "linear_update_": _update_on_backend,
}
_library = torch.library.Library("ffkernels", "DEF")
for _name, _run in ON_BACKEND.items():
    _library.define(schema(_name, *SCHEMAS[_name]))
    torch.library.register_fake(f"ffkernels::{_name}", _writes_only, lib=_library)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
_library.define(_FORWARD)
_library.impl("linear_forward", _linear_forward, "CompositeExplicitAutograd")
torch.library.register_fake("ffkernels::linear_forward", _linear_forward_fake, lib=_library)
for _name, _schema, _convolution, _fake in (
    ("conv2d_forward", _CONV_FORWARD, _conv_forward, _conv_forward_fake),
    ("conv2d_gradients_", _CONV_GRADIENTS, _conv_gradients, _conv_gradients_fake),
):
    _library.define(_schema)
    _library.impl(_name, _convolution, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffkernels::{_name}", _fake, lib=_library)

_operators = torch.ops.ffkernels
_PLAIN = frozenset({Tensor, Parameter})


def are_followed(*tensors: Tensor) -> bool:
    """Whether somebody follows operators: a compiler, a mode, a kind of tensor, a profiler, a tracer."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


def linear_forward_(
    rows: Rows,
    layer: Layer,
    y: Tensor | None,
    sumsq: Tensor,
    backend: str,
    class_sums: Tensor | None = None,
    squares: bool = True,
    product_out: Tensor | None = None,
) -> None:
    """Writes the sums of squares of `y`, and what else is given: `SCHEMAS`."""
    if are_followed(layer.weight, rows.x_pos, rows.x_neg):
        _operators.linear_forward_(*flatten(rows, layer), y, sumsq, class_sums, squares, product_out, backend)
    else:
        _forward_into(rows, layer, backend, y, sumsq, class_sums, squares, product_out)


def linear_forward(rows: Rows, layer: Layer, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    """`y`, `[0, out]` without `keep`, and its sums of squares."""
    if are_followed(layer.weight, rows.x_pos, rows.x_neg):
        return _operators.linear_forward(*flatten(rows, layer), keep, backend)
    y, sumsq = _results(rows, layer, keep)
    select.load(backend).linear_forward_(rows, layer, y if keep else None, sumsq)
    return y, sumsq


def linear_step_(
    rows: Rows,
    layer: Layer,
    goal: Goal,
    pull: PeerPull,
    update: Update,
    outputs: Outputs,
    backend: str,
    prepared: object = None,
) -> None:
    """Takes one whole step of a layer: `SCHEMAS`. `prepared`: for backends of `select.PREPARES`."""
    if are_followed(layer.weight, rows.x_pos, rows.x_neg):
        _operators.linear_step_(*flatten_step(rows, layer, goal, pull, update, outputs), backend)
    elif prepared is None:
        select.load(backend).linear_step_(rows, layer, goal, pull, update, outputs)
    else:
        linear_steps_(rows, [LayerStep(layer, goal, pull, update, outputs, prepared)], backend)


def linear_steps_(rows: Rows, steps: Sequence[LayerStep], backend: str) -> None:
    """Takes a step of each of several layers on what the one below hands on, where nobody follows operators.

    For backends of `select.PREPARES`.
    """
    select.load(backend).linear_steps_(rows, steps)


def rows_above(rows: Rows, y: Tensor, sumsq: Tensor) -> Rows:
    """The rows of the next layer: what a layer's step on `rows` hands on."""
    n_pos = rows.x_pos.shape[0]
    return Rows(y[:n_pos], y[n_pos:], None, sumsq, rows.sample_weight, None, 0, rows.labels)


def linear_update_(rows: Rows, layer: Layer, slopes: Slopes, pull: PeerPull, update: Update, backend: str) -> None:
    """Updates a layer by given slopes: `SCHEMAS`."""
    if are_followed(layer.weight, rows.x_pos, rows.x_neg):
        _operators.linear_update_(*flatten(rows, layer, slopes, pull, *_slots(update)), backend)
    else:
        select.load(backend).linear_update_(rows, layer, slopes, pull, update)


def conv2d_forward(
    rows: MapRows, layer: Layer, geometry: Geometry, is_centred: bool, pivot: Tensor | None, backend: str
) -> Maps:
    """Activities and moments of a convolutional layer; moments are about `pivot` if that is given, about one that is
    found among the activities with `is_centred`, else about zero."""
    if are_followed(layer.weight, rows.x):
        return Maps(*_operators.conv2d_forward(*flatten(rows, layer, geometry), is_centred, pivot, backend))
    return select.load(backend).conv2d_forward(rows, layer, geometry, is_centred, pivot)


def conv2d_gradients_(
    rows: MapRows, layer: Layer, geometry: Geometry, maps: Maps, slopes: MapSlopes, backend: str
) -> MapGradients:
    """Gradients of weight and bias by the moments' slopes; what is handed on comes over `maps.p`."""
    if are_followed(layer.weight, rows.x):
        return MapGradients(*_operators.conv2d_gradients_(*flatten(rows, layer, geometry, maps, slopes), backend))
    return select.load(backend).conv2d_gradients_(rows, layer, geometry, maps, slopes)
