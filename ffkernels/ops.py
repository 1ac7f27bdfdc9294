"""The operators: their schemas and fakes, and the one list of what a backend implements.

All are defined for every device; the backend that a call runs on travels in its last argument, chosen by
`backends.select`. Schemas are written by hand, which costs a fraction of what `torch.library.custom_op` does per call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import select

_ROWS = "Tensor x_pos, Tensor x_neg, Tensor? input_sumsq, Tensor weight, Tensor? bias"
# How a layer turns rows into activities.
_LAYER = "str norm, float eps, str eps_mode, str activation, ScalarType compute_dtype"
# How sums of squares turn into a loss and row coefficients: `Objective`'s fields; `threshold` overrides both numbers.
_OBJECTIVE = (
    "str goodness, float threshold_pos, float threshold_neg, Tensor? threshold, str loss, bool maximize, "
    "str reduction, float temperature, float alpha"
)
# What the caller knows of the rows: x_neg is x_pos outside the first label_field columns (0: not known), and product
# [n_pos, out] is W x of either side without those columns.
_SHARED = "Tensor? product, int label_field"
# Peer normalisation (`peer.operands`), or no mean: its running mean [out] is moved, its pull added to the gradient.
_PEER = "Tensor(h!)? peer_mean, float peer_strength, float peer_momentum, bool peer_gated"
# How the gradient turns into new parameters: `optim.RULES`.
_UPDATE = (
    "str rule, Tensor(c!)[] weight_state, float[] weight_hyper, Tensor? weight_lr, "
    "Tensor(d!)[] bias_state, float[] bias_hyper, Tensor? bias_lr, Tensor(i!)? weight_rounded"
)

SCHEMAS = {
    # The rows of x_pos [n_pos, in] followed by those of x_neg [n_neg, in] are the joint batch; input_sumsq [rows],
    # weight [out, in] (or what its step has left in weight_rounded), bias [out] are read. Written: where given
    # y [rows, out] in the compute dtype, and its sums of squares [rows].
    "linear_forward_": f"({_ROWS}, {_LAYER}, {_SHARED}, Tensor(a!)? y, Tensor(b!) sumsq, str backend) -> ()",
    # One whole layer step on the joint batch. Written: weight and bias (or, under the rule
    # "grad", their gradients), optimizer state, sumsq [rows], loss [], and where given y [rows, out], the activities
    # before the update, and peer_mean [out]. With is_positive [rows], x_pos is the joint batch and x_neg has no rows.
    # Rows whose loss has a slope below skip_below, a fraction of that of a row far on the wrong side, are left out of
    # the update. weight_rounded [out, in] receives the new weight in the compute dtype, under a rule other than "grad".
    "linear_step_": (
        "(Tensor x_pos, Tensor x_neg, Tensor? is_positive, Tensor? input_sumsq, Tensor? sample_weight, "
        f"Tensor(a!) weight, Tensor(b!)? bias, {_LAYER}, {_OBJECTIVE}, "
        f"float skip_below, {_SHARED}, {_PEER}, {_UPDATE}, "
        "Tensor(e!)? y, Tensor(f!) sumsq, Tensor(g!) loss_out, str backend) -> ()"
    ),
}

# `linear_forward_` with results of its own, for every backend; without `keep` nobody reads y: it is [0, out].
_FORWARD = f"linear_forward({_ROWS}, {_LAYER}, {_SHARED}, bool keep, str backend) -> (Tensor, Tensor)"

_library = torch.library.Library("ffkernels", "DEF")


def _linear_forward(*args: Any) -> tuple[Tensor, Tensor]:
    *read, keep, backend = args
    y, sumsq = _linear_forward_fake(*args)
    select.load(backend).linear_forward_(*read, y if keep else None, sumsq)
    return y, sumsq


def _linear_forward_fake(
    x_pos: Tensor, x_neg: Tensor, input_sumsq: Tensor | None, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    compute_dtype, keep = args[4], args[7]
    rows = x_pos.shape[0] + x_neg.shape[0]
    master = torch.float64 if weight.dtype == torch.float64 else torch.float32
    y = x_pos.new_empty(rows if keep else 0, weight.shape[0], dtype=compute_dtype)
    return y, weight.new_empty(rows, dtype=master)


def _writes_only(*args: Any) -> None:
    return None


def _forward_on_backend(*args: Any) -> None:
    select.load(args[-1]).linear_forward_(*args[:-1])


def _step_on_backend(*args: Any) -> None:
    """Compiled code brings the numbers of an update in a tensor, behind its state: `optim.RULES`."""
    if args[_RULE] != "grad" and not args[_RULE + 2]:
        unpacked = list(args)
        for at in (_RULE + 1, _RULE + 4):
            if unpacked[at]:
                *unpacked[at], numbers = unpacked[at]
                unpacked[at + 1] = numbers.tolist()
        args = tuple(unpacked)
    select.load(args[-1]).linear_step_(*args[:-1])


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    torch.library.register_fake(f"ffkernels::{_name}", _writes_only, lib=_library)
_library.impl("linear_forward_", _forward_on_backend, "CompositeExplicitAutograd")
_library.impl("linear_step_", _step_on_backend, "CompositeExplicitAutograd")
_library.define(_FORWARD)
_library.impl("linear_forward", _linear_forward, "CompositeExplicitAutograd")
torch.library.register_fake("ffkernels::linear_forward", _linear_forward_fake, lib=_library)

linear_forward = torch.ops.ffkernels.linear_forward.default
linear_forward_ = torch.ops.ffkernels.linear_forward_.default
linear_step_ = torch.ops.ffkernels.linear_step_.default
_RULE = [argument.name for argument in linear_step_._schema.arguments].index("rule")
