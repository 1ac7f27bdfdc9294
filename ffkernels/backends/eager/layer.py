"""The forward half: rows in, activities and their sums of squares out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...normalisation import row_scale, row_sumsq
from ...objective import silu_slope
from .products import Products

LEAKY_SLOPE = 0.01
_INV_SQRT_2 = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327


class Activation(NamedTuple):
    """`forward(z)` may overwrite `z`; `gated(y, z)` is `y act'(z)`, or `y` itself; `z` is there if `keeps_z`."""

    forward: Callable[[Tensor], Tensor]
    gated: Callable[[Tensor, Any], Tensor]
    keeps_z: bool


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * _INV_SQRT_2)) + z * torch.exp(-0.5 * z * z) * _INV_SQRT_2PI


ACTIVATIONS = {
    "relu": Activation(torch.relu_, lambda y, z: y, keeps_z=False),
    "identity": Activation(lambda z: z, lambda y, z: y, keeps_z=False),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu_(z, LEAKY_SLOPE), lambda y, z: F.leaky_relu(y, LEAKY_SLOPE), keeps_z=False
    ),
    "gelu": Activation(F.gelu, lambda y, z: y * _gelu_slope(z), keeps_z=True),
    "silu": Activation(F.silu, lambda y, z: y * silu_slope(z), keeps_z=True),
}


class Rows(NamedTuple):
    """A block of input rows as the products take it, and the row scale that their results still need (or None)."""

    operand: Tensor
    scale: Tensor | None


class Layer:
    """A layer with its operands made ready for one call."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        norm: str,
        eps: float,
        eps_mode: str,
        activation: str,
        compute_dtype: torch.dtype,
    ) -> None:
        self.products = Products(weight.device, weight.dtype, compute_dtype)
        self.weight = self.products.operand(weight).t()
        self.bias = bias
        self.normalisation = (norm, eps, eps_mode)
        self.activation = ACTIVATIONS[activation]
        self.width = weight.shape[0]
        self.dtype = weight.dtype

    def rows(self, x: Tensor, sumsq: Tensor | None) -> Rows:
        """`x` as an operand. `W (r x) = r (W x)`, so the scale waits for the product unless `x` is rounded anyway."""
        scale = None
        if self.normalisation[0] != "none":
            sumsq = row_sumsq(x, self.dtype) if sumsq is None else sumsq
            scale = row_scale(sumsq, x.shape[1], *self.normalisation)
            if self.products.rounds and x.dtype == self.dtype:
                x, scale = x * scale.unsqueeze(1), None
        return Rows(self.products.operand(x), scale)

    def forward(self, rows: Rows, out: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """`y = act(r W x + b)` `[rows, out]`, `z` where the activation's slope needs it, and `y`'s sums of squares.

        `out` (of the weight's dtype) receives `y` where the activation works in place.
        """
        z = self.weight.new_empty(len(rows.operand), self.width, dtype=self.dtype) if out is None else out
        self.products.into(z, rows.operand, self.weight)
        if rows.scale is not None and self.bias is not None:
            torch.addcmul(self.bias, z, rows.scale.unsqueeze(1), out=z)
        elif rows.scale is not None:
            z.mul_(rows.scale.unsqueeze(1))
        elif self.bias is not None:
            z.add_(self.bias)
        y = self.activation.forward(z)
        return y, z if self.activation.keeps_z else None, row_sumsq(y, self.dtype)
