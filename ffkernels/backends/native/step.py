"""The two operators: tensors in, one call of the compiled library."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .library import Call, Update, load

if TYPE_CHECKING:
    from ..select import Request

# The order of csrc/cpu/interface.h's enumerations.
_NORMS = ("none", "l2", "rms")
_EPS_MODES = ("add", "clamp", "inside")
_ACTIVATIONS = ("relu", "leaky_relu", "identity")
_GOODNESS = ("mean", "sum", "norm")
_LOSSES = ("logistic", "symba", "swish")
_REDUCTIONS = ("mean", "sum_of_means")
_RULES = {"grad": 0, "sgd": 1, "sgdw": 1, "adam": 2}


def unsupported(request: Request) -> str | None:
    """Why the compiled library cannot run a call, or None."""
    if request.device.type != "cpu":
        return f"runs on the CPU, not on {request.device.type}"
    if load().library is None:
        return load().reason
    if request.dtype != torch.float32:
        return f"{request.dtype} parameters: has float32 ones"
    if request.compute_dtype == torch.float16:
        return "torch.float16 products: has float32 and bfloat16 ones"
    if request.activation not in _ACTIVATIONS:
        return f"activation {request.activation!r}: has {', '.join(_ACTIVATIONS)}"
    if request.shares:
        return "finds out by itself what rows share: takes no product"
    for kind, name, known in (("loss", request.loss, _LOSSES), ("rule", request.rule, _RULES)):
        if name is not None and name not in known:
            return f"{kind} {name!r}: has {', '.join(known)}"
    if request.peer == "gated" or (request.peer and request.activation == "leaky_relu"):
        return (
            f"{request.peer} peer normalisation of {request.activation}: has it straight through, of relu and identity"
        )
    return None


def linear_forward_(
    x_pos: Tensor,
    x_neg: Tensor,
    input_sumsq: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    activation: str,
    compute_dtype: torch.dtype,
    product: Tensor | None,
    label_field: int,
    y: Tensor | None,
    sumsq: Tensor,
) -> None:
    """See `ops.SCHEMAS`."""
    operands = _Operands()
    call = _layer(operands, x_pos, x_neg, input_sumsq, norm, eps, eps_mode, activation, compute_dtype)
    call.out, call.in_ = weight.shape
    call.weight, call.bias = operands.read(weight), operands.read(bias)
    call.y, call.sumsq = operands.write(y, compute_dtype), operands.write(sumsq)
    operands.run("ffk_linear_forward", call)


def linear_step_(
    x_pos: Tensor,
    x_neg: Tensor,
    is_positive: Tensor | None,
    input_sumsq: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    activation: str,
    compute_dtype: torch.dtype,
    goodness: str,
    threshold_pos: float,
    threshold_neg: float,
    threshold: Tensor | None,
    loss: str,
    maximize: bool,
    reduction: str,
    temperature: float,
    alpha: float,
    skip_below: float,
    product: Tensor | None,
    label_field: int,
    peer_mean: Tensor | None,
    peer_strength: float,
    peer_momentum: float,
    peer_gated: bool,
    rule: str,
    weight_state: list[Tensor],
    weight_hyper: list[float],
    weight_lr: Tensor | None,
    bias_state: list[Tensor],
    bias_hyper: list[float],
    bias_lr: Tensor | None,
    weight_rounded: Tensor | None,
    y: Tensor | None,
    sumsq: Tensor,
    loss_out: Tensor,
) -> None:
    """See `ops.SCHEMAS`."""
    operands = _Operands()
    call = _layer(operands, x_pos, x_neg, input_sumsq, norm, eps, eps_mode, activation, compute_dtype)
    call.out, call.in_ = weight.shape
    updated = operands.read if rule == "grad" else operands.write
    call.weight, call.bias = updated(weight), updated(bias)
    call.y, call.sumsq, call.loss = operands.write(y, compute_dtype), operands.write(sumsq), operands.write(loss_out)
    call.is_positive = operands.read(is_positive, torch.bool)
    call.sample_weight = operands.read(sample_weight)
    call.threshold = operands.read(threshold)
    call.threshold_is_one = threshold is not None and threshold.dim() == 0
    call.threshold_pos, call.threshold_neg = threshold_pos, threshold_neg
    call.temperature, call.alpha, call.maximize = temperature, alpha, maximize
    call.skip_below = skip_below
    call.peer_mean, call.peer_strength, call.peer_momentum = operands.write(peer_mean), peer_strength, peer_momentum
    call.goodness, call.loss_kind = _GOODNESS.index(goodness), _LOSSES.index(loss)
    call.reduction, call.rule = _REDUCTIONS.index(reduction), _RULES[rule]
    _set_update(operands, call.weight_update, rule, weight_state, weight_hyper, weight_lr)
    if bias is not None:
        _set_update(operands, call.bias_update, rule, bias_state, bias_hyper, bias_lr)
    operands.run("ffk_linear_step", call)
    if weight_rounded is not None:
        weight_rounded.copy_(weight)


class _Operands:
    """The only source of addresses: of tensors in row-major order, or of copies of them.

    What an address belongs to lives as long as this object does, which is until the call is over. What is only read is
    never written.
    """

    def __init__(self) -> None:
        self.alive: list[Tensor] = []
        self.written: list[tuple[Tensor, Tensor]] = []

    def read(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        if tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
        return self._address(tensor)

    def rows(self, x: Tensor) -> tuple[int, int]:
        """Address and row stride of `x` `[rows, in]`."""
        if x.stride(1) != 1 and x.shape[1] > 1:
            x = x.contiguous()
        return self._address(x), x.stride(0)

    def write(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        # Of what is written only Adam's step count may come in another dtype.
        if tensor.dtype == dtype and tensor.is_contiguous():
            return self._address(tensor)
        copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.written.append((tensor, copy))
        return self._address(copy)

    def _address(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return tensor.data_ptr()

    def run(self, name: str, call: Call) -> None:
        library = load().library
        assert library is not None
        if getattr(library, name)(ctypes.byref(call)) != 0:
            raise MemoryError(f"no memory for a layer step of {call.out} x {call.in_} on {sum(call.rows)} rows")
        for tensor, copy in self.written:
            tensor.copy_(copy)


def _layer(
    operands: _Operands,
    x_pos: Tensor,
    x_neg: Tensor,
    input_sumsq: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    activation: str,
    compute_dtype: torch.dtype,
) -> Call:
    call = Call()
    for side, x in enumerate((x_pos, x_neg)):
        call.x[side], call.x_stride[side] = operands.rows(x)
        call.rows[side] = x.shape[0]
    call.input_sumsq = operands.read(input_sumsq)
    call.norm, call.eps_mode, call.eps = _NORMS.index(norm), _EPS_MODES.index(eps_mode), eps
    call.activation = _ACTIVATIONS.index(activation)
    call.x_bfloat16, call.bfloat16 = x_pos.dtype == torch.bfloat16, compute_dtype == torch.bfloat16
    call.threads = torch.get_num_threads()
    return call


def _set_update(
    operands: _Operands, update: Update, rule: str, state: list[Tensor], hyper: list[float], lr: Tensor | None
) -> None:
    """The fields of `optim.RULES`."""
    for i, tensor in enumerate(state):
        update.state[i] = operands.write(tensor)
    if rule == "grad":
        return
    update.lr = hyper[0] if lr is None else float(lr)
    if rule == "adam":
        _, update.beta1, update.beta2, update.eps, update.weight_decay, decoupled, maximize = hyper
    else:
        _, update.momentum, update.dampening, nesterov, update.weight_decay, maximize, first_step = hyper
        decoupled = rule == "sgdw"
        update.nesterov, update.first_step = int(nesterov), int(first_step)
    update.decoupled, update.maximize = int(decoupled), int(maximize)
