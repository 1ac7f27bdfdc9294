"""The backward half: activities and coefficients in, the parameters' gradients out, straight into the update rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...objectives import by_unit
from ...spec import Numbers, Update
from . import rules
from .layer import LabelField, Operands, ReadyLayer
from .peers import Peers
from .products import binary_exponent

# Elements of the weight gradient (4 MB of float32) that are there at once: the update rule reads them from cache.
PANEL_ELEMENTS = 1 << 20
# Operands whose coefficient is exactly zero are left out where at least this share of a block's rows is.
LEAVE_OUT_SHARE = 0.2


class Pending(NamedTuple):
    """A block's gradient before it is formed: `dz^T x`, but in the columns of a label field `own^T numbers`.

    `exponent`: the power of two that `dz` and `own` were divided by, or None.
    """

    dz: Tensor
    x: Tensor
    exponent: Tensor | None
    own: Tensor | None
    field: LabelField | None


class Gradient:
    """`dW = sum_i c_i r_i (y_i act'(z_i)) x_i^T` and `db = sum_i c_i y_i act'(z_i)`, block by block.

    The last block's part is not formed until `apply`, panel by panel; a batch of one block never has a whole gradient.
    """

    def __init__(self, layer: ReadyLayer, weight: Tensor, bias: Tensor | None, peers: Peers | None = None) -> None:
        self.layer, self.peers = layer, peers
        self.pull: Tensor | None = None
        self.weight, self.bias = weight, bias
        self.weight_sum: Tensor | None = None
        self.bias_sum = None if bias is None else torch.zeros_like(bias)
        self.pending: Pending | None = None

    def add_given(
        self,
        rows: Operands,
        y: Tensor,
        z: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        is_positive: Tensor,
    ) -> None:
        """Adds a block's rows by the slopes of `spec.Slopes`. May overwrite `y`."""
        if first is None and second is not None and second.shape[1] == 1:
            return self.add(rows, y, z, 2 * second[:, 0], is_positive)
        dz, takes_part = torch.zeros_like(y), torch.zeros(len(y), dtype=torch.bool, device=y.device)
        for slope, times in ((second, 2 * y), (first, 1)):
            if slope is not None:
                dz.add_(by_unit(slope, y.shape[1]) * times)
                takes_part |= (slope != 0).any(1)
        dz.mul_(self.layer.activation.slope(y, z))
        self.add(rows, y, z, takes_part.to(y.dtype), is_positive, dz)

    def add(
        self,
        rows: Operands,
        y: Tensor,
        z: Tensor | None,
        coefficient: Tensor,
        is_positive: Tensor,
        dz: Tensor | None = None,
    ) -> None:
        """Adds a block's rows, on the sides `is_positive` `[rows]`. May overwrite `y`.

        `dz`: `[rows, out]` dLoss/dz where it is there already; rows whose coefficient is zero have none.
        """
        if self.pending is not None:
            self._sum_pending()
        x, r, field = rows.operand, rows.scale, rows.field if rows.has_copies else None
        kept = pulled = None
        if self.peers is not None:
            self.peers.see(rows, y, is_positive)
        if self.peers is not None and self.peers.gated:
            pulled = self.peers.gated_part(y, z, is_positive)
        else:
            kept = unsaturated_rows(coefficient if field is None else coefficient.view(2, -1).any(0))
        if kept is not None:
            x = x[kept]
            if field is not None:
                kept = torch.cat([kept, kept + len(rows.operand)])
                field = LabelField(field.columns, field.numbers[kept])
            y, coefficient = y[kept], coefficient[kept]
            z, r, dz = (None if t is None else t[kept] for t in (z, r, dz))
        if dz is None:
            dz = self.layer.activation.gated(y, z).mul_(coefficient.unsqueeze(1))
        if pulled is not None:
            dz.add_(pulled)
        elif field is not None:
            # A row that stays for the sake of its copy has no part in the sums, whatever it holds.
            saturated = (coefficient == 0).unsqueeze(1)
            dz, field = (
                dz.masked_fill_(saturated, 0),
                LabelField(field.columns, field.numbers.masked_fill(saturated, 0)),
            )
        if self.bias_sum is not None:
            self.bias_sum.add_(dz.sum(0))
        if r is not None:
            dz.mul_(r.unsqueeze(1))
        exponent = own = None
        if self.layer.products.compute_dtype == torch.float16 and dz.numel():
            # Coefficients carry 1 / (rows width) and a loss's slope: float16 needs them brought near one.
            exponent = binary_exponent(dz)
            dz = torch.ldexp(dz, -exponent)
        operand = self.layer.products.operand
        if field is not None:
            # The two sides' products with what they have in common are one.
            own, dz = operand(dz), dz[: len(x)] + dz[len(x) :]
        self.pending = Pending(operand(dz), x, exponent, own, field)

    def apply(self, update: Update) -> None:
        """Updates the parameters, or writes their gradients to the states under the rule "grad"."""
        rule, of_weight, of_bias = update
        if self.peers is not None and not self.peers.gated:
            self.pull = self.peers.pull()
            if self.bias_sum is not None:
                self.bias_sum.add_(self.pull * self.peers.count)
        if rule == "grad":
            whole = self._panel(slice(None), of_weight.state[0])
            if self.weight_sum is not None:
                of_weight.state[0].copy_(whole)
            if self.bias_sum is not None:
                of_bias.state[0].copy_(self.bias_sum)
            return
        apply = rules.RULES[rule]
        numbers, lr = of_weight.numbers, rules.rate(of_weight, self.weight.dtype)
        assert isinstance(numbers, Numbers)
        out_features, in_features = self.weight.shape
        panel = min(out_features, max(1, PANEL_ELEMENTS // in_features))
        scratch = self.weight.new_empty(panel, in_features) if self.weight_sum is None else None
        # The first panel is made before anything is written: what can fail has failed by then.
        ready = self._panel(slice(0, panel), scratch)
        rules.start(rule, of_weight.state)
        for start in range(0, out_features, panel):
            rows = slice(start, min(start + panel, out_features))
            gradient = ready if start == 0 else self._panel(rows, scratch)
            apply(self.weight[rows], gradient, rules.rows_of(rule, of_weight.state, rows), numbers, lr)
        if self.bias is not None and self.bias_sum is not None:
            rules.step(rule, self.bias, self.bias_sum, of_bias)

    def _sum_pending(self) -> None:
        first = self.weight_sum is None
        if self.weight_sum is None:
            self.weight_sum = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        self._form(slice(None), self.weight_sum, accumulate=not first)
        self.pending = None

    def _panel(self, rows: slice, scratch: Tensor | None) -> Tensor:
        """The finished gradient of some rows of the weight: in `scratch`, or in the sum over earlier blocks."""
        if self.weight_sum is not None:
            out = self._form(rows, self.weight_sum[rows], accumulate=True)
        else:
            assert scratch is not None
            out = self._form(rows, scratch[: len(range(*rows.indices(len(self.weight))))], accumulate=False)
        if self.pull is not None and self.peers is not None:
            out.addr_(self.pull[rows], self.peers.input)
        return out

    def _form(self, rows: slice, out: Tensor, accumulate: bool) -> Tensor:
        assert self.pending is not None
        dz, x, exponent, own, field = self.pending
        if field is None or own is None:
            return self._add(out, dz[:, rows], x, exponent, accumulate)
        in_field = out[:, field.columns]
        before = in_field.clone()
        self._add(out, dz[:, rows], x, exponent, accumulate)
        in_field.copy_(before)
        self._add(in_field, own[:, rows], field.numbers, exponent, accumulate)
        return out

    def _add(self, out: Tensor, dz: Tensor, x: Tensor, exponent: Tensor | None, accumulate: bool) -> Tensor:
        """`out (+)= 2^exponent dz^T x`."""
        products = self.layer.products
        if exponent is None:
            return products.into(out, dz.t(), x, accumulate)
        product = torch.ldexp(products.into(torch.empty_like(out), dz.t(), x), exponent)
        return out.copy_(product.add_(out) if accumulate else product)


def unsaturated_rows(coefficient: Tensor) -> Tensor | None:
    """Indices of the rows with a coefficient other than zero, or None where leaving the rest out does not pay.

    On a device the count would have to come back to the host, so there every row stays.
    """
    if coefficient.device.type != "cpu":
        return None
    kept = coefficient.nonzero().squeeze(1)
    return kept if len(kept) <= (1 - LEAVE_OUT_SHARE) * len(coefficient) else None
