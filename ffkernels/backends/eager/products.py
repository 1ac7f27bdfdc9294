"""Matrix products whose operands are rounded to the compute dtype and whose sums are kept in the weights' own."""

from __future__ import annotations

import torch
from torch import Tensor


def binary_exponent(values: Tensor) -> Tensor:
    """`e` (0-dim, int32) with the largest of `|values|` about `2^e`: what `frexp` says, which not every device has."""
    largest = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
    return largest.log2().ceil().to(torch.int32)


class Products:
    """Products of operands in `compute_dtype`, written to tensors of `dtype`.

    On a GPU, operands stay in the compute dtype and its units sum in `dtype`. Elsewhere PyTorch gives a product in its
    operands' own dtype alone, which rounds the sums, so rounded operands are widened again and multiplied in `dtype`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.narrow = compute_dtype != dtype and device.type == "cuda"

    def operand(self, values: Tensor) -> Tensor:
        """`values` as a product takes them."""
        rounded = values.to(self.compute_dtype)
        return rounded if self.narrow else rounded.to(self.dtype)

    def into(self, out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> Tensor:
        """`out (+)= left @ right`, for operands made by `operand`."""
        if not self.narrow:
            return torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
        product = torch.mm(left, right, out_dtype=self.dtype)
        return out.add_(product) if accumulate else out.copy_(product)
