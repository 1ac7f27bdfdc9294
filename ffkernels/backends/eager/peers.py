"""Peer normalisation's part of the gradient: sums over the positive rows of all blocks, then a pull per unit."""

from __future__ import annotations

import torch
from torch import Tensor

from ...peer import moved_mean, pull_of
from ...spec import PeerPull
from .layer import Operands, ReadyLayer


class Peers:
    """With `p [out]` the pull on each unit: `dW += p (sum_pos r_i x_i)^T`, `db += n_pos p`, a rank-one addition.

    Gated, `p act'(z_i)` joins the `dz` of positive rows, and all of them must be in one block: `p` hangs on them all.
    """

    def __init__(self, pull: PeerPull, layer: ReadyLayer, count: float | Tensor) -> None:
        mean = pull.mean
        assert mean is not None
        self.mean, self.strength, self.momentum, self.gated = mean, pull.strength, pull.momentum, pull.gated
        self.layer, self.count = layer, count
        self.activity = torch.zeros_like(mean)
        self.input = mean.new_zeros(layer.weight.shape[0])
        self.new_mean: Tensor | None = None

    def see(self, rows: Operands, y: Tensor, is_positive: Tensor) -> None:
        """Adds a block's rows: its activities `y` `[rows, out]`, its operands, and its side `[rows]`."""
        weights = is_positive.to(y.dtype)
        self.activity.add_(y.t().mv(weights))
        if self.gated:
            return
        # Copies under negative labels have the weight 0.
        x = rows.operand.to(y.dtype)
        scaled = weights if rows.scale is None else weights * rows.scale
        self.input.add_(x.t().mv(scaled[: len(x)]))

    def pull(self) -> Tensor:
        """`[out]` the pull, once every row has been seen."""
        self.new_mean = moved_mean(self.mean, self.activity, self.count, self.momentum)
        return pull_of(self.new_mean, self.strength, self.count)

    def gated_part(self, y: Tensor, z: Tensor | None, is_positive: Tensor) -> Tensor:
        """`[rows, out]` what the gated pull adds to the `dz` of the only block."""
        return self.layer.activation.slope(y, z).mul_(is_positive.to(y.dtype).unsqueeze(1)).mul_(self.pull())

    def finish(self) -> None:
        """Publishes the running mean."""
        assert self.new_mean is not None
        self.mean.copy_(self.new_mean)
