"""Row normalisation, which needs nothing but a row's sum of squares: `normalise(x) = row_scale(|x|^2) x`."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sumsq(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows]` sums of squares of the rows of `x` `[rows, ...]`, summed in `dtype`."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype).square_()


def row_scale(sumsq: Tensor, width: int, norm: str, eps: float, eps_mode: str) -> Tensor:
    """`[rows]` factors `r` that normalise rows with these sums of squares; 0 for a row of zeros, whatever eps is.

    With `n = sqrt(sumsq)` ("l2") or `sqrt(sumsq / width)` ("rms"): `1 / (n + eps)` ("add"), `1 / max(n, eps)`
    ("clamp"), `1 / sqrt(n^2 + eps)` ("inside").
    """
    square = sumsq / width if norm == "rms" else sumsq
    if eps_mode == "inside":
        scale = (square + eps).rsqrt()
    elif eps_mode == "clamp":
        scale = square.sqrt().clamp_min_(eps).reciprocal_()
    else:
        scale = square.sqrt().add_(eps).reciprocal_()
    return scale.masked_fill_(sumsq == 0, 0)
