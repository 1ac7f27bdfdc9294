"""The closed forms as autograd functions, for code whose one optimizer runs after one `backward()`.

Gradients reach a layer's own weight and bias and stop there, which is the algorithm: no layer learns through another.
Each function can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from . import validation as check
from .backends.eager.products import Products, binary_exponent
from .normalisation import row_scale, row_sumsq
from .spec import Activation, EpsMode, Layer, Norm, Precision, Rows

_aten = torch.ops.aten

# (dLoss/dy, y, z) -> dLoss/dz; those of `NEEDS_Z` read z, the others get along with y.
SLOPES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "relu": lambda g, y, z: _aten.threshold_backward(g, y, 0),
    "leaky_relu": lambda g, y, z: _aten.leaky_relu_backward(g, y, 0.01, True),
    "gelu": lambda g, y, z: _aten.gelu_backward(g, z),
    "silu": lambda g, y, z: _aten.silu_backward(g, z),
    "identity": lambda g, y, z: g,
}
NEEDS_Z = ("gelu", "silu")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda z: z,
}


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast has had its say in the compute dtype; where products run it would round again."""
    if check.autocast_is_on(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _only_once(name: str) -> None:
    # Autograd runs a backward with gradients on only if it is asked for a graph of it.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"ffkernels.{name} has a closed-form backward that cannot be differentiated again; accepted: "
            "backward() or torch.autograd.grad without create_graph=True"
        )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether one of them belongs to a transform of `torch.func` or has a forward-mode tangent.

    The operators and the functions below, which know backward mode alone, would lose what those carry.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        return any(t is not None and wrapped(t) for t in tensors)
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _carries_derivative(t: Tensor | None) -> bool:
    if t is None:
        return False
    return t.requires_grad or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None)


def in_plain_operations(x: Tensor, input_sumsq: Tensor | None, layer: Layer) -> tuple[Tensor, Tensor]:
    """What `linear_forward` returns, in operations that every transform of PyTorch knows; `x` is taken as detached."""
    weight, bias = layer.weight, layer.bias
    if _carries_derivative(x) and not _carries_derivative(weight) and not _carries_derivative(bias):
        raise ValueError(
            "x carries a derivative and weight and bias do not, but none goes through x; accepted: x.detach(), or "
            "derivatives by weight and bias"
        )
    x, dtype = x.detach(), weight.dtype
    norm, compute_dtype = layer.norm, layer.compute_dtype

    def rounded(values: Tensor) -> Tensor:
        return values.to(compute_dtype).to(dtype)

    with without_autocast(weight.device):
        scale = None
        if norm != "none":
            known = row_sumsq(x, dtype) if input_sumsq is None else input_sumsq.detach()
            scale = row_scale(known, x.shape[1], norm, layer.eps, layer.eps_mode).unsqueeze(1)
        if scale is not None and compute_dtype == torch.float16 and x.dtype == dtype:
            # Float16 has no room for rows of any length.
            x, scale = x * scale, None
        z = rounded(x) @ rounded(weight).t()
        z = z if scale is None else z * scale
        y = ACTIVATIONS[layer.activation](z if bias is None else z + bias)
        return y.to(compute_dtype), y.square().sum(1)


class LinearForward(torch.autograd.Function):
    """`y = act(r W x + b)` and its rows' sums of squares `q`; with `t = dLoss/dy + 2 dLoss/dq y`:

    `dW = sum_i r_i t_i act'(z_i) x_i^T`, `db = sum_i t_i act'(z_i)`. Kept for that: `x` as it came, the row scale and
    `y`; never the normalised input. `z`, where the slope needs it, is computed again, so that `y` and `q` are the same
    numbers with and without a gradient, in every compute dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        input_sumsq: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        norm: Norm,
        eps: float,
        eps_mode: EpsMode,
        activation: Activation,
        compute_dtype: torch.dtype,
        precision: Precision,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """The arguments are those of the operator, for one side."""
        if input_sumsq is None and norm != "none":
            input_sumsq = row_sumsq(x, weight.dtype)
        ctx.options = (norm, eps, eps_mode, activation, compute_dtype, precision, backend)
        ctx.dtype = weight.dtype
        ctx.set_materialize_grads(False)
        with without_autocast(weight.device):
            rows = Rows(x, x[:0], input_sumsq=input_sumsq)
            y, sumsq = ops.linear_forward(rows, Layer(weight, bias, *ctx.options[:-1]), True, backend)
        # Without a z to compute again the weight may change before the backward, as it may under plain autograd.
        ctx.save_for_backward(x, input_sumsq, y, *((weight, bias) if activation in NEEDS_Z else ()))
        return y, sumsq

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to weight and bias."""
        _only_once("linear_forward")
        grad_y, grad_sumsq = grads
        x, input_sumsq, y, *layer = ctx.saved_tensors
        norm, eps, eps_mode, activation, compute_dtype, precision, backend = ctx.options
        nothing: tuple[Tensor | None, ...] = (None,) * 7
        if grad_y is None and grad_sumsq is None:
            return None, None, None, None, *nothing
        with without_autocast(x.device):
            z, wide = None, y.to(ctx.dtype)
            if layer:
                linear = Layer(layer[0], layer[1], norm, eps, eps_mode, "identity", compute_dtype, precision)
                z, _ = ops.linear_forward(Rows(x, x[:0], input_sumsq=input_sumsq), linear, True, backend)
                z = z.to(ctx.dtype)
            t = torch.zeros_like(wide) if grad_y is None else grad_y.to(ctx.dtype)
            if grad_sumsq is not None:
                t = torch.addcmul(t, wide, grad_sumsq.unsqueeze(1), value=2)
            dz = SLOPES[activation](t, wide, z)
            grad_weight = grad_bias = None
            if ctx.needs_input_grad[3]:
                grad_bias = dz.sum(0)
            if ctx.needs_input_grad[2]:
                if norm != "none":
                    dz = dz * row_scale(input_sumsq, x.shape[1], norm, eps, eps_mode).unsqueeze(1)
                grad_weight = _weight_gradient(dz, x, compute_dtype)
        return None, None, grad_weight, grad_bias, *nothing


def _weight_gradient(dz: Tensor, x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """`dz^T x` `[out, in]`, operands in the compute dtype, sums in that of `dz`."""
    products = Products(dz.device, dz.dtype, compute_dtype)
    out = dz.new_empty(dz.shape[1], x.shape[1])
    if compute_dtype != torch.float16 or not dz.numel():
        return products.into(out, products.operand(dz).t(), products.operand(x))
    # float16 has a narrow range: each operand is brought near one by a power of two, and the product back.
    of_dz, of_x = (binary_exponent(v) for v in (dz, x))
    left, right = (products.operand(torch.ldexp(v, -e)) for v, e in ((dz, of_dz), (x.to(dz.dtype), of_x)))
    return torch.ldexp(products.into(out, left.t(), right), of_dz + of_x)


class GivenSlope(torch.autograd.Function):
    """A loss whose slope by the goodness of each row is known already: `[rows]` goodness in, the 0-dim `loss` out."""

    @staticmethod
    def forward(ctx: Any, goodness: Tensor, slope: Tensor, loss: Tensor) -> Tensor:
        """`slope` `[rows]`: dLoss/dgoodness."""
        ctx.save_for_backward(slope)
        ctx.dtype = goodness.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient to the goodness."""
        _only_once("goodness_loss")
        (slope,) = ctx.saved_tensors
        return (slope * grads[0]).to(ctx.dtype), None, None
