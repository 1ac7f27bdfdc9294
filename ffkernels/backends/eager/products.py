"""Matrix products whose operands are rounded to the compute dtype and whose sums are kept in the weights' own."""

from __future__ import annotations

import torch
from torch import Tensor


def multiplies_natively(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype have a unit of their own and do not overflow while they are summed."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def binary_exponent(values: Tensor) -> Tensor:
    """`e` (0-dim, int32) with the largest of `|values|` about `2^e`: what `frexp` says, which not every device has."""
    largest = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
    return largest.log2().ceil().to(torch.int32)


class Products:
    """Products of operands in `compute_dtype`, written to tensors of `dtype`.

    Where the machine has no unit for the compute dtype, the rounded operands are widened again: the same numbers as
    a unit that sums in float32 gives, at float32's speed.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.rounds = compute_dtype != dtype
        self.native = self.rounds and multiplies_natively(device, compute_dtype)

    def operand(self, values: Tensor) -> Tensor:
        """`values` as a product takes them."""
        rounded = values.to(self.compute_dtype)
        return rounded if self.native else rounded.to(self.dtype)

    def into(self, out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> Tensor:
        """`out (+)= left @ right`, for operands made by `operand`."""
        if not self.native:
            return torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
        if left.device.type == "cuda":
            product = torch.mm(left, right, out_dtype=self.dtype)
        else:
            product = torch.mm(left, right)
        return out.add_(product) if accumulate else out.copy_(product)
