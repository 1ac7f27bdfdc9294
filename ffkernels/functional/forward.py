"""The forward pass alone, and what rows share of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .. import validation as check
from ..autograd import LinearForward, in_plain_operations, is_transformed, without_autocast
from ..backends import select
from ..backends.eager.products import Products
from ..spec import Activation, EpsMode, Layer, Norm, Rows


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm = "l2",
    eps: float = 1e-4,
    eps_mode: EpsMode = "add",
    activation: Activation = "relu",
    compute_dtype: torch.dtype | None = None,
    input_sumsq: Tensor | None = None,
    label_field: int | None = None,
    product: Tensor | None = None,
    copies: int = 1,
    keep: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = act(r W x + b)` `[rows, out]` in the compute dtype, and the sums of squares of its rows `[rows]`.

    The arguments are those of `linear_step_`, but weight and bias need be no leaves and may be frozen. Where they
    require a gradient, `y` and the sums carry one to weight and bias, by a closed-form backward that cannot be
    differentiated again and takes `y` as it is handed out, in the compute dtype. None reaches `x`, which is taken as
    detached: that no gradient flows to the layer below is the algorithm. With `product` there is no gradient: `x` is
    multiplied in its label field alone.
    Forward-mode tangents of weight and bias, and the transforms of `torch.func`, go through PyTorch's own operations.

    `copies`: `x` holds the same rows so many times, one copy below the other, under different labels. Where no gradient
    is asked for, the compiled CPU backend makes sure of that and multiplies what they share once; for others it is
    nothing. Without `keep` only the sums are wanted: `y` is `[0, out]`, and is written nowhere.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        RuntimeError: in a backward with `create_graph=True`.
    """
    check.layer_options(norm, eps, eps_mode, activation)
    check.layer_tensors(weight, bias)
    compute = check.compute_dtype_of(compute_dtype, weight)
    check.rows_of("x", x, weight, compute)
    if input_sumsq is not None:
        check.vector("input_sumsq", input_sumsq, x.shape[0], weight.dtype, weight.device)
    field = check.label_field(label_field, weight, x, None)
    check.shared_product(product, field, x.shape[0], weight)
    check.copies(copies, x.shape[0])
    check.boolean("keep", keep)
    request = select.Request(weight.device, weight.dtype, compute, activation, shares=product is not None)
    chosen = select.choose(request, backend)
    layer = Layer(weight, bias, norm, float(eps), eps_mode, activation, compute, check.precision_of(compute))
    if not torch.compiler.is_compiling() and is_transformed(x, weight, bias):
        check.without_product(product)
        y, sumsq = in_plain_operations(x, input_sumsq, layer)
        return y if keep else y[:0], sumsq
    if (
        product is None
        and torch.is_grad_enabled()
        and (weight.requires_grad or (bias is not None and bias.requires_grad))
    ):
        known = None if input_sumsq is None else input_sumsq.detach()
        y, sumsq = LinearForward.apply(x.detach(), known, *layer, chosen)
        return y if keep else y[:0], sumsq
    with torch.no_grad(), without_autocast(weight.device):
        once = x.shape[0] // copies
        sides = (x[:once], x[once:]) if chosen in select.FINDS_COPIES and copies > 1 else (x, x[:0])
        rows = Rows(*sides, input_sumsq=input_sumsq, product=product, label_field=field)
        return ops.linear_forward(rows, layer, keep, chosen)


@torch.no_grad()
def shared_product(
    x: Tensor, weight: Tensor, label_field: int = 10, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """`W x` `[rows, out]` without the first `label_field` columns: what rows that differ in their label have in common.

    Under any label `l` in that field, `W x_l = product + W_field l`. It belongs to the weight as it is now: a step that
    changes the weight makes it stale. In the weight's dtype; `x` `[rows, in]` is not normalised.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    check.layer_tensors(weight, None)
    compute = check.compute_dtype_of(compute_dtype, weight)
    check.rows_of("x", x, weight, compute)
    field = check.label_field(label_field, weight, x, None)
    products = Products(weight.device, weight.dtype, compute)
    with without_autocast(weight.device):
        rows, matrix = (products.operand(values[:, field:]) for values in (x, weight.detach()))
        return products.into(weight.new_empty(len(x), len(weight)), rows, matrix.t())


def finds_copies(weight: Tensor, compute_dtype: torch.dtype, activation: Activation, backend: str | None) -> bool:
    """Whether a forward pass runs on a backend that finds out by itself what `copies` of rows share."""
    request = select.Request(weight.device, weight.dtype, compute_dtype, activation)
    return select.choose(request, backend) in select.FINDS_COPIES
