"""The forward half: rows in, activities and their sums of squares out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import spec
from ...normalisation import row_scale, row_sumsq
from ...objectives import silu_slope
from .batch import joined, label_field, sumsq_of_copies
from .products import Products

LEAKY_SLOPE = 0.01
_INV_SQRT_2 = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327


class Activation(NamedTuple):
    """`forward(z)` may overwrite `z`; `gated(y, z)` is `y act'(z)`, or `y` itself; `z` is there if `keeps_z`.

    `slope(y, z)` is `act'(z)`, a tensor of its own.
    """

    forward: Callable[[Tensor], Tensor]
    gated: Callable[[Tensor, Any], Tensor]
    slope: Callable[[Tensor, Any], Tensor]
    keeps_z: bool


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * _INV_SQRT_2)) + z * torch.exp(-0.5 * z * z) * _INV_SQRT_2PI


ACTIVATIONS = {
    "relu": Activation(torch.relu_, lambda y, z: y, lambda y, z: (y > 0).to(y.dtype), keeps_z=False),
    "identity": Activation(lambda z: z, lambda y, z: y, lambda y, z: torch.ones_like(y), keeps_z=False),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu_(z, LEAKY_SLOPE),
        lambda y, z: F.leaky_relu(y, LEAKY_SLOPE),
        lambda y, z: torch.full_like(y, LEAKY_SLOPE).masked_fill_(y > 0, 1),
        keeps_z=False,
    ),
    "gelu": Activation(F.gelu, lambda y, z: y * _gelu_slope(z), lambda y, z: _gelu_slope(z), keeps_z=True),
    "silu": Activation(F.silu, lambda y, z: y * silu_slope(z), lambda y, z: silu_slope(z), keeps_z=True),
}


class LabelField(NamedTuple):
    """A range of columns, the only ones where the rows of a pair differ, and what each row has there `[rows, columns]`.

    What the rows share is a sum without these columns: were it one with them, taken from one row and corrected for the
    other, a large number there would have swallowed the rest.
    """

    columns: slice
    numbers: Tensor


class Operands(NamedTuple):
    """A block of input rows as the products take it.

    Attributes:
        operand: `[rows, in]`; for copies under other labels, `[pairs, in]`: the positive ones.
        scale: `[rows]`, what the products' results are still to be multiplied by, or None.
        field: the label field of rows that share the product of the other columns, or None.
        product: that product `[rows or pairs, out]` where it is known, or None.
    """

    operand: Tensor
    scale: Tensor | None
    field: LabelField | None
    product: Tensor | None = None

    @property
    def total(self) -> int:
        return len(self.operand if self.field is None else self.field.numbers)

    @property
    def has_copies(self) -> bool:
        return self.total > len(self.operand)


class ReadyLayer:
    """A layer with its operands made ready for one call."""

    def __init__(self, layer: spec.Layer) -> None:
        weight = layer.weight
        self.products = Products(weight.device, weight.dtype, layer.compute_dtype)
        self.weight = self.products.operand(weight).t()
        self.bias = layer.bias
        self.normalisation = (layer.norm, layer.eps, layer.eps_mode)
        self.activation = ACTIVATIONS[layer.activation]
        self.width = weight.shape[0]
        self.dtype = weight.dtype

    def rows(
        self, parts: list[Tensor], sumsq: Tensor | None, known_field: int = 0, product: Tensor | None = None
    ) -> Operands:
        """The rows of one or both sides as operands. `W (r x) = r (W x)`, so the row scale waits for the product.

        `known_field`, `product`: `label_field` and `product` of `spec.Rows`.
        """
        columns = None
        # Float16 has no room for rows of any length: they are scaled before they are rounded.
        scale_first = self.products.compute_dtype == torch.float16 and parts[0].dtype == self.dtype and product is None
        if len(parts) == 2 and not scale_first:
            columns = slice(0, known_field) if known_field and len(parts[0]) else label_field(*parts)
        x = joined(parts) if columns is None else parts[0]
        scale = None
        if self.normalisation[0] != "none":
            if sumsq is None:
                sumsq = row_sumsq(x, self.dtype) if columns is None else sumsq_of_copies(parts, columns, self.dtype)
            scale = row_scale(sumsq, x.shape[1], *self.normalisation)
            if scale_first:
                x, scale = x * scale.unsqueeze(1), None
        if columns is None and product is not None:
            columns, parts = slice(0, known_field), [x]
        field = None
        if columns is not None:
            field = LabelField(columns, self.products.operand(joined([part[:, columns] for part in parts])))
        return Operands(self.products.operand(x), scale, field, product)

    def forward(self, rows: Operands, out: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """`y = act(r W x + b)` `[rows, out]`, `z` where the activation's slope needs it, and `y`'s sums of squares.

        `out` (of the weight's dtype) receives `y` where the activation works in place.
        """
        if out is None:
            out = self.weight.new_empty(rows.total, self.width, dtype=self.dtype)
        z = out
        if rows.field is None:
            self.products.into(z, rows.operand, self.weight)
        else:
            columns, numbers = rows.field
            pairs = len(rows.operand)
            self._product_outside(columns, rows, z[:pairs])
            if rows.has_copies:
                z[pairs:] = z[:pairs]
            self.products.into(z, numbers, self.weight[columns], accumulate=True)
        if rows.scale is not None and self.bias is not None:
            torch.addcmul(self.bias, z, rows.scale.unsqueeze(1), out=z)
        elif rows.scale is not None:
            z.mul_(rows.scale.unsqueeze(1))
        elif self.bias is not None:
            z.add_(self.bias)
        y = self.activation.forward(z)
        return y, z if self.activation.keeps_z else None, row_sumsq(y, self.dtype)

    def _product_outside(self, columns: slice, rows: Operands, out: Tensor) -> None:
        """Writes the product of all columns but these."""
        if rows.product is not None:
            out.copy_(rows.product)
            return
        before, after = slice(0, columns.start), slice(columns.stop, None)
        self.products.into(out, rows.operand[:, after], self.weight[after])
        if columns.start:
            self.products.into(out, rows.operand[:, before], self.weight[before], accumulate=True)
