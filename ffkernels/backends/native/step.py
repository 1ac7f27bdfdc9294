"""The operators: records in, one call of the compiled library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from ... import spec
from ...spec import Goal, Layer, LayerStep, Outputs, PeerPull, Rows, Slopes, Slot, Update
from . import maps
from .library import load
from .records import (
    DTYPES,
    END_LAYOUT,
    LAYOUT,
    MEMBERS,
    NO_MATRIX,
    NOTHING,
    NUMBERS_LAYOUT,
    OUTPUTS_LAYOUT,
    ROWS_LAYOUT,
    STATES,
    STEP_LAYOUT,
)

if TYPE_CHECKING:
    from ..select import Request

# Those that csrc/cpu/objective.h and classes.h have.
LOSSES = ("logistic", "symba", "swish", "cross_entropy", "pvn", "cwc")
_RULES = get_args(spec.Rule)
_PARAMETERS = ("weight", "bias")
_FLOAT32 = torch.float32
_DTYPES = {"mask": torch.bool, "labels": torch.int64}
_NO_GOAL, _NO_PULL, _NO_UPDATE = NOTHING[Goal], NOTHING[PeerPull], NOTHING[Update]
# Of each member its kind, whether a call writes it, and its name.
_TAKEN = {record: [(m.kind, m.is_written, m.name) for m in members] for record, members in MEMBERS.items()}
_ZERO = (0,)
_NO_STATE = _ZERO * STATES
_NUMBER_OF = {dtype: number for number, dtype in enumerate(DTYPES)}
_NO_NUMBERS = (0.0,) * len(spec.Numbers._fields)
_NO_OUTPUTS, _NO_SLOPES = NOTHING[Outputs], NOTHING[Slopes]


def unsupported(request: Request) -> str | None:
    """Why the compiled library cannot run a call, or None."""
    if request.device.type != "cpu":
        return f"runs on the CPU, not on {request.device.type}"
    if load().library is None:
        return load().reason
    if request.dtype != torch.float32:
        return f"{request.dtype} parameters: has float32 ones"
    if request.geometry is not None and request.compute_dtype == torch.float16:
        return "torch.float16 products of a convolution: has float32 and bfloat16 ones"
    if request.geometry is not None and (reason := maps.unsupported(request.geometry, request.activation)):
        return reason
    if request.shares and request.compute_dtype != torch.float32:
        return f"a shared product of {request.compute_dtype} operands: takes one of float32 ones"
    if request.rule is not None and request.rule not in _RULES:
        return f"rule {request.rule!r}: has {', '.join(_RULES)}"
    return None


def linear_forward_(
    rows: Rows, layer: Layer, y: Tensor | None, sumsq: Tensor, product_out: Tensor | None = None
) -> None:
    """See `ops.SCHEMAS`."""
    call = _Call("ffk_linear_forward")
    call.take(rows)
    call.take(layer, read=_PARAMETERS)
    call.values += _NO_GOAL + _NO_PULL + _NO_UPDATE
    # Nobody writes a loss here.
    call.take(Outputs(y, sumsq, sumsq, product_out=product_out))
    call.values += _NO_SLOPES
    call.run(rows, layer)


def linear_step_(rows: Rows, layer: Layer, goal: Goal, pull: PeerPull, update: Update, outputs: Outputs) -> None:
    """See `ops.SCHEMAS`."""
    call = _Call("ffk_linear_step")
    call.take(rows)
    _take_step(call, layer, goal, pull, update)
    call.take(outputs._replace(rounded=None))
    call.values += _NO_SLOPES
    call.run(rows, layer)
    if outputs.rounded is not None:
        outputs.rounded.copy_(layer.weight)


class Prepared(NamedTuple):
    """What a call says between its rows and its outputs, with the numbers of the update's rule as they were."""

    update: Update
    said: bytes


def prepare(layer: Layer, goal: Goal, pull: PeerPull, update: Update) -> Prepared | None:
    """What steps with these records have in common for as long as their tensors stay where they are.

    None where a step reads a threshold from a tensor, or copies one.
    """
    if goal.threshold is not None or update.rule == "grad":
        return None
    call = _Call("")
    _take_step(call, layer, goal, pull, update)
    return None if call.copies else Prepared(update, STEP_LAYOUT.pack(*call.values))


def linear_steps_(rows: Rows, steps: Sequence[LayerStep]) -> None:
    """See `ops.linear_steps_`; all of them are prepared."""
    library = load().library
    assert library is not None
    call = _Call("")
    vector, matrix = call.vector, call.matrix
    x_pos, x_neg, is_positive, input_sumsq, weights, product, field, labels = rows
    of_rows = (
        *matrix(x_pos), *matrix(x_neg), vector(is_positive, torch.bool), vector(input_sumsq, _FLOAT32),
        sample_weight := vector(weights, _FLOAT32), *matrix(product), field,
        classes := vector(labels, torch.int64),
    )  # fmt: skip
    n_pos, n_neg = x_pos.shape[0], x_neg.shape[0]
    end = END_LAYOUT.pack(*_NO_SLOPES, torch.get_num_threads())
    parts: list[bytes] = []
    for _, _, _, update, (y, sumsq, loss, _, goodness, y_after, sumsq_after, _), prepared in steps:
        of_outputs = (
            *matrix(y), sumsq.data_ptr(), loss.data_ptr(), *NO_MATRIX, vector(goodness, _FLOAT32),
            *matrix(y_after), vector(sumsq_after, _FLOAT32), *NO_MATRIX,
        )  # fmt: skip
        parts += ROWS_LAYOUT.pack(*of_rows), _said(prepared, update), OUTPUTS_LAYOUT.pack(*of_outputs), end
        if sumsq_after is not None:
            y, sumsq = y_after, sumsq_after
        if y is not None:
            at, width, number = y.data_ptr(), y.shape[1], _NUMBER_OF[y.dtype]
            of_rows = (
                at, n_pos, width, width, number, at + n_pos * width * y.itemsize, n_neg, width, width, number,
                0, sumsq.data_ptr(), sample_weight, *NO_MATRIX, 0, classes,
            )  # fmt: skip
    failed = library.ffk_linear_steps(b"".join(parts), len(steps))
    if failed != 0:
        raise _no_memory(steps[failed - 1].layer, n_pos + n_neg)


def _said(prepared: Prepared, update: Update) -> bytes:
    """What was prepared, with the rule's numbers as they are now."""
    said = prepared.said
    if update is prepared.update and update.weight.lr is None and update.bias.lr is None:
        return said
    own = len(said) - NUMBERS_LAYOUT.size
    weight = own - STATES * 8 - NUMBERS_LAYOUT.size
    between = said[weight + NUMBERS_LAYOUT.size : own]
    numbers = [NUMBERS_LAYOUT.pack(*_numbers(slot)) for slot in (update.weight, update.bias)]
    return said[:weight] + numbers[0] + between + numbers[1]


def _no_memory(layer: Layer, rows: int) -> MemoryError:
    out, width = layer.weight.shape
    return MemoryError(f"no memory for a layer step of {out} x {width} on {rows} rows")


def _take_step(call: _Call, layer: Layer, goal: Goal, pull: PeerPull, update: Update) -> None:
    """Adds what stands between a step's rows and its outputs."""
    threshold = goal.threshold
    if threshold is not None and threshold.dim() == 0:
        one = float(threshold)
        goal = goal._replace(threshold_pos=one, threshold_neg=one, threshold=None)
    call.take(layer, read=_PARAMETERS if update.rule == "grad" else ())
    if goal.threshold is None:
        call.values += _numbers_of(goal)
    else:
        call.take(goal)
    if pull.mean is None:
        call.values += _NO_PULL
    else:
        call.take(pull)
    call.take(update)


def linear_update_(rows: Rows, layer: Layer, slopes: Slopes, pull: PeerPull, update: Update) -> None:
    """See `ops.SCHEMAS`."""
    call = _Call("ffk_linear_update")
    call.take(rows)
    call.take(layer, read=_PARAMETERS if update.rule == "grad" else ())
    call.values += _NO_GOAL
    call.take(pull)
    call.take(update)
    call.values += _NO_OUTPUTS
    call.take(slopes)
    call.run(rows, layer)


def _numbers(slot: Slot) -> tuple[float, ...]:
    numbers = slot.numbers or _NO_NUMBERS
    return numbers if slot.lr is None else (float(slot.lr), *numbers[1:])


@lru_cache
def _numbers_of(goal: Goal) -> list[Any]:
    """The values of a goal without a tensor, which is the same one at every step."""
    call = _Call("")
    call.take(goal)
    return call.values


class _Call:
    """One call's values in the order of `records.LAYOUT`, and the only source of addresses among them: of tensors in
    row-major order, or of copies of them.

    Copies live as long as this object does, which is until the call is over; what is only read is never written.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[Any] = []
        self.copies: list[Tensor] = []
        self.written: list[tuple[Tensor, Tensor]] = []

    def take(self, record: tuple[Any, ...], read: tuple[str, ...] = ()) -> None:
        """Adds a record; `read`: members that this call does not write, though others do."""
        values = self.values
        for (kind, is_written, name), value in zip(_TAKEN[type(record)], record, strict=True):
            if value is None:
                values += NO_MATRIX if kind == "matrix" else _ZERO
            elif kind == "vector":
                values.append(self.vector(value, _FLOAT32, is_written and name not in read))
            elif kind == "matrix":
                values += self.matrix(value, is_written, name not in read)
            elif kind is None:
                values.append(value)
            elif type(kind) is dict:
                values.append(kind[value])
            elif kind == "slot":
                self._slot(value)
            else:
                values.append(self.vector(value, _DTYPES[kind]))

    def vector(self, value: Tensor | None, dtype: torch.dtype, is_written: bool = False) -> int:
        """The address of a vector's numbers in a dtype."""
        if value is None:
            return 0
        if value.dtype != dtype or not value.is_contiguous() or value.is_neg():
            value = self._copy(value, dtype, is_written)
        return value.data_ptr()

    def matrix(self, value: Tensor | None, is_written: bool = False, goes_back: bool = True) -> tuple[int, ...]:
        """The values of a matrix; of one that nobody writes only the rows must be without gaps."""
        if value is None:
            return NO_MATRIX
        has_gaps = not value.is_contiguous() and (is_written or (value.stride(1) != 1 and value.shape[1] > 1))
        if has_gaps or value.is_neg():
            value = self._copy(value, value.dtype, is_written and goes_back)
        return value.data_ptr(), *value.shape, value.stride(0), _NUMBER_OF[value.dtype]

    def _slot(self, slot: Slot) -> None:
        values = self.values
        for tensor in slot.state:
            # Of what is written only Adam's step count may come in another dtype.
            if tensor.dtype != _FLOAT32 or not tensor.is_contiguous():
                tensor = self._copy(tensor, _FLOAT32, True)
            values.append(tensor.data_ptr())
        values += _NO_STATE[len(slot.state) :]
        values += _numbers(slot)

    def _copy(self, tensor: Tensor, dtype: torch.dtype, is_written: bool) -> Tensor:
        """A copy in row-major order; what is written to it goes back when the call is over."""
        copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.copies.append(copy)
        if is_written:
            self.written.append((tensor, copy))
        return copy

    def run(self, rows: Rows, layer: Layer) -> None:
        library = load().library
        assert library is not None
        if getattr(library, self.name)(LAYOUT.pack(*self.values, torch.get_num_threads())) != 0:
            raise _no_memory(layer, len(rows.x_pos) + len(rows.x_neg))
        for tensor, copy in self.written:
            tensor.copy_(copy)
