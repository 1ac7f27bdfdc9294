"""The operators: records in, one call of the compiled library."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from ... import spec
from ...spec import Goal, Layer, Outputs, PeerPull, Rows, Slopes, Slot, Update
from . import maps
from .library import load
from .records import DTYPES, LAYOUT, MEMBERS, NO_MATRIX, NOTHING, STATES

if TYPE_CHECKING:
    from ..select import Request

# Those that csrc/cpu/objective.h and classes.h have.
LOSSES = ("logistic", "symba", "swish", "cross_entropy", "pvn", "cwc")
_RULES = get_args(spec.Rule)
_PARAMETERS = ("weight", "bias")
_DTYPES = {"mask": torch.bool, "labels": torch.int64}
_NO_GOAL, _NO_PULL, _NO_UPDATE = NOTHING[Goal], NOTHING[PeerPull], NOTHING[Update]
_NO_STATE = (0,) * STATES
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
    if request.shares:
        return "finds out by itself what rows share: takes no product"
    if request.rule is not None and request.rule not in _RULES:
        return f"rule {request.rule!r}: has {', '.join(_RULES)}"
    return None


def linear_forward_(rows: Rows, layer: Layer, y: Tensor | None, sumsq: Tensor) -> None:
    """See `ops.SCHEMAS`."""
    call = _Call("ffk_linear_forward")
    call.take(rows)
    call.take(layer, read=_PARAMETERS)
    call.values += _NO_GOAL + _NO_PULL + _NO_UPDATE
    # Nobody writes a loss here.
    call.take(Outputs(y, sumsq, sumsq))
    call.values += _NO_SLOPES
    call.run(rows, layer)


def linear_step_(rows: Rows, layer: Layer, goal: Goal, pull: PeerPull, update: Update, outputs: Outputs) -> None:
    """See `ops.SCHEMAS`."""
    call = _Call("ffk_linear_step")
    threshold = goal.threshold
    if threshold is not None and threshold.dim() == 0:
        one = float(threshold)
        goal = goal._replace(threshold_pos=one, threshold_neg=one, threshold=None)
    call.take(rows)
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
    call.take(outputs if outputs.rounded is None else outputs._replace(rounded=None))
    call.values += _NO_SLOPES
    call.run(rows, layer)
    if outputs.rounded is not None:
        outputs.rounded.copy_(layer.weight)


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


@lru_cache
def _numbers_of(goal: Goal) -> list[Any]:
    """The values of a goal without a tensor, which is the same one at every step."""
    call = _Call("")
    call.take(goal)
    return call.values


class _Call:
    """One call's values in the order of `records.LAYOUT`, and the only source of addresses among them: of tensors in
    row-major order, or of copies of them.

    What an address belongs to lives as long as this object does, which is until the call is over. What is only read is
    never written.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[Any] = []
        self.alive: list[Tensor] = []
        self.written: list[tuple[Tensor, Tensor]] = []

    def take(self, record: tuple[Any, ...], read: tuple[str, ...] = ()) -> None:
        """Adds a record; `read`: members that this call does not write, though others do."""
        values = self.values
        for (_, name, _, kind, is_written), value in zip(MEMBERS[type(record)], record, strict=True):
            if kind is None:
                values.append(value)
            elif type(kind) is dict:
                values.append(kind[value])
            elif value is None:
                values += NO_MATRIX if kind == "matrix" else (0,)
            elif kind == "matrix":
                values += self._matrix(value, is_written, is_written and name not in read)
            elif kind == "slot":
                self._slot(value)
            elif is_written and name not in read:
                values.append(self._written(value).data_ptr())
            else:
                values.append(self._read(value, _DTYPES.get(kind, torch.float32)).data_ptr())

    def _slot(self, slot: Slot) -> None:
        values = self.values
        for tensor in slot.state:
            values.append(self._written(tensor).data_ptr())
        values += _NO_STATE[len(slot.state) :]
        numbers = slot.numbers or _NO_NUMBERS
        values += numbers if slot.lr is None else (float(slot.lr), *numbers[1:])

    def _matrix(self, tensor: Tensor, is_whole: bool, is_written: bool) -> tuple[int, int, int, int, int]:
        """`is_whole`: the library takes such a matrix without gaps; of others, only the rows must be."""
        if is_written:
            tensor = self._written(tensor, tensor.dtype)
        elif is_whole:
            tensor = self._read(tensor, tensor.dtype)
        else:
            if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                tensor = tensor.contiguous()
            self.alive.append(tensor)
        rows, columns = tensor.shape
        return tensor.data_ptr(), rows, columns, tensor.stride(0), DTYPES.index(tensor.dtype)

    def _read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
        self.alive.append(tensor)
        return tensor

    def _written(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        # Of what is written only Adam's step count may come in another dtype.
        if tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.written.append((tensor, copy))
        return copy

    def run(self, rows: Rows, layer: Layer) -> None:
        library = load().library
        assert library is not None
        if getattr(library, self.name)(LAYOUT.pack(*self.values, torch.get_num_threads())) != 0:
            out, width = layer.weight.shape
            total = len(rows.x_pos) + len(rows.x_neg)
            raise MemoryError(f"no memory for a layer step of {out} x {width} on {total} rows")
        for tensor, copy in self.written:
            tensor.copy_(copy)
