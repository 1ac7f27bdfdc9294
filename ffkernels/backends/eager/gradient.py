"""The backward half: activities and coefficients in, the parameters' gradients out, straight into the update rule."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rules
from .layer import Layer, Rows

# Elements of the weight gradient (4 MB of float32) that are there at once: the update rule reads them from cache.
PANEL_ELEMENTS = 1 << 20
# Rows whose coefficient is exactly zero are left out where at least this share of a block's rows is.
LEAVE_OUT_SHARE = 0.2


class Gradient:
    """`dW = sum_i c_i r_i (y_i act'(z_i)) x_i^T` and `db = sum_i c_i y_i act'(z_i)`, block by block.

    The last block's part is not formed until `apply`, panel by panel; a batch of one block never has a whole gradient.
    """

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        self.layer = layer
        self.weight, self.bias = weight, bias
        self.scale = scale
        self.weight_sum: Tensor | None = None
        self.bias_sum = None if bias is None else torch.zeros_like(bias)
        self.pending: tuple[Tensor, Tensor] | None = None

    def add(self, rows: Rows, y: Tensor, z: Tensor | None, coefficient: Tensor) -> None:
        """Adds a block's rows. May overwrite `y`."""
        if self.pending is not None:
            self._sum_pending()
        x, r = rows
        kept = _rows_in_doubt(coefficient)
        if kept is not None:
            x, y, coefficient = x[kept], y[kept], coefficient[kept]
            z = None if z is None else z[kept]
            r = None if r is None else r[kept]
        gated = self.layer.activation.gated(y, z)
        if self.bias_sum is not None:
            self.bias_sum.addmv_(gated.t(), coefficient)
        coefficient = coefficient * self.scale if self.scale != 1 else coefficient
        dz = gated.mul_((coefficient if r is None else coefficient * r).unsqueeze(1))
        self.pending = self.layer.products.operand(dz), x

    def apply(
        self,
        rule: str,
        weight_state: list[Tensor],
        weight_hyper: list[float],
        weight_lr: float | Tensor,
        bias_state: list[Tensor],
        bias_hyper: list[float],
        bias_lr: float | Tensor,
    ) -> None:
        """Updates the parameters by `rule`, or writes their gradients to the states under the rule "grad"."""
        if rule == "grad":
            self._panel(slice(None), out=weight_state[0])
            if self.bias_sum is not None:
                bias_state[0].copy_(self.bias_sum)
            return
        update = rules.RULES[rule]
        out_features, in_features = self.weight.shape
        panel = min(out_features, max(1, PANEL_ELEMENTS // in_features))
        scratch = self.weight.new_empty(panel, in_features) if self.weight_sum is None else None
        # The first panel is made before anything is written: what can fail has failed by then.
        ready = self._panel(slice(0, panel), scratch)
        rules.start(rule, weight_state)
        for start in range(0, out_features, panel):
            rows = slice(start, min(start + panel, out_features))
            gradient = ready if start == 0 else self._panel(rows, scratch)
            update(self.weight[rows], gradient, rules.rows_of(rule, weight_state, rows), weight_hyper, weight_lr)
        if self.bias is not None and self.bias_sum is not None:
            rules.start(rule, bias_state)
            update(self.bias, self.bias_sum, bias_state, bias_hyper, bias_lr)

    def _sum_pending(self) -> None:
        assert self.pending is not None
        dz, x = self.pending
        first = self.weight_sum is None
        if self.weight_sum is None:
            self.weight_sum = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        self.layer.products.into(self.weight_sum, dz.t(), x, accumulate=not first)
        self.pending = None

    def _panel(self, rows: slice, out: Tensor | None) -> Tensor:
        """The finished gradient of some rows of the weight, in `out` or in place of the sum over earlier blocks."""
        assert self.pending is not None
        dz, x = self.pending
        if self.weight_sum is None:
            assert out is not None
            target = out[: dz[:, rows].shape[1]]
        else:
            target = self.weight_sum[rows]
        self.layer.products.into(target, dz[:, rows].t(), x, accumulate=self.weight_sum is not None)
        if self.scale != 1:
            target.mul_(1 / self.scale)
        if out is not None and target.data_ptr() != out.data_ptr():
            out.copy_(target)
        return target


def _rows_in_doubt(coefficient: Tensor) -> Tensor | None:
    """Indices of the rows with a coefficient other than zero, or None where leaving the rest out does not pay.

    On a device the count would have to come back to the host, so there every row stays.
    """
    if coefficient.device.type != "cpu":
        return None
    kept = coefficient.nonzero().squeeze(1)
    return kept if len(kept) <= (1 - LEAVE_OUT_SHARE) * len(coefficient) else None
