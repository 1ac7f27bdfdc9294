"""A step of convolutions one behind the other, of which the last alone has a loss: its gradient reaches all of them.

Each `Passed` is what a forward pass of one keeps. From the gradient `dz` in front of a layer's activation come its own
and that of what it took: with batch normalisation in front, `u = weight x + bias` of `x = (p - mean) / deviation` and
`du` the convolution's input gradient, `dp = weight / deviation (du - (dbias + x dweight) / n)` with the sums
`dbias = sum du`, `dweight = sum x du`. So one more convolution, a pass for the sums and the pass that the layer below
makes anyway reach it, without a graph: `dp` and `x` are never in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import interrupts, optim
from .. import validation as check
from ..autograd import without_autocast
from ..backends.eager import conv, rules
from ..backends.native import maps as native
from ..objectives import AnyObjective, Judged, move
from ..spec import Geometry, Layer, MapRows, Maps, MapSlopes, Rows
from . import in_front
from .conv import backend_of, judge_maps, read_maps
from .maps import ConvOptions, maps_of, rows_for


class Passed(NamedTuple):
    """What a forward pass of one layer keeps until a loss comes.

    Attributes:
        x: `[rows, in, H, W]` as it came.
        y: what the layer hands on, `[rows, out, h, w]`.
    """

    x: Tensor
    y: Tensor
    layer: Layer
    geometry: Geometry
    options: ConvOptions
    rows: MapRows
    maps: Maps
    standardising: in_front.Standardising | None
    is_compiled: bool

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """`[rows, out]` over the places of `y` and of its squares."""
        return self.maps.first, self.maps.spread

    def only(self, kept: Tensor) -> Passed:
        """What it keeps of these rows; the statistics stay those of all."""
        x, y = conv.take(self.x.detach(), kept), conv.take(self.y, kept)
        p, where, before = (conv.take(of, kept) if of.numel() else of for of in (self.maps.p, *self.maps[4:]))
        maps = self.maps._replace(p=p, where=where, before=before)
        return self._replace(x=x, y=y, rows=MapRows(conv.take(self.rows.x, kept), None), maps=maps)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Passed:
    """A forward pass of a convolution; in train mode the running statistics in front of it move.

    `sums`: `[rows, in]` over the places of `x` and of its squares, as `Passed.sums` has them of a layer that made it.

    Raises:
        ValueError, TypeError: for an argument that does not fit, and for rows that a norm scales.
    """
    layer, geometry = options.checked(weight, bias)
    if layer.norm != "none" or options.product_norm is not None:
        raise ValueError("norm or product_norm came to a chain of convolutions; accepted: input_norm, or none")
    norm = options.input_norm
    if norm is not None and not (isinstance(norm, nn.BatchNorm2d) and norm.affine):
        raise ValueError(f"input_norm is a {type(norm).__name__}; accepted in a chain: a BatchNorm2d with affine=True")
    if geometry.padding_mode != "zeros":
        raise ValueError(f"padding_mode={geometry.padding_mode!r} came to a chain of convolutions; accepted: 'zeros'")
    maps_of("x", x, weight, layer.compute_dtype, geometry)
    in_front.check_fits(norm, x, weight, layer.norm)
    in_front.check_enough(norm, x)
    chosen = backend_of(layer, geometry, None, options.backend)
    is_compiled = chosen == "native"
    with torch.no_grad(), without_autocast(weight.device):
        u, standardising = in_front.standardising(norm, x.detach(), weight.dtype, sums)
        rows = rows_for(u, layer, geometry, None)
        maps = (native if is_compiled else conv).conv2d_forward(rows, layer, geometry, False, None)
        if standardising is not None:
            move(standardising.module, standardising)
    return Passed(x, maps.p, layer, geometry, options, rows, maps, standardising, is_compiled)


def step_(
    chain: Sequence[Passed],
    n_pos: int,
    optimizer: Optimizer,
    objective: AnyObjective,
    learned: Mapping[str, Tensor] | None = None,
    skip_below: float = 0.0,
) -> Judged:
    """Updates the parameters of the layers of `chain`, first one first, by the loss of the last.

    Args:
        chain: of layers each of which took the `y` of the one before.
        n_pos: how many of the rows are positive, the first ones.
        optimizer: holds all their parameters; it may hold others, which stay as they are.
        objective: of positive and negative rows.
        learned: parameters by name that the first one's `x` hangs on, by a graph; they learn too.
        skip_below: as in `conv2d_step_`. An approximation more, on a CPU: no gradient that comes by the statistics of
            the batch reaches the rows left out, so that no product is of them.

    Raises:
        ValueError: for parameters that the optimizer does not hold, or cannot learn, and for one that two layers have,
            before anything is written.
    """
    first, last = chain[0], chain[-1]
    named = _parameters(chain) | dict(learned or {})
    for name, parameter in named.items():
        check.trainable(name, parameter)
        check.writable(name, parameter)
    weight = named.pop(f"{len(chain) - 1}.weight")
    check.apart(weight, None, None, first.x.detach(), None, None, named)
    update = optim.plan(optimizer, weight, None, named)
    check.writable_here(update.written())
    held = interrupts.hold()
    try:
        with torch.no_grad(), without_autocast(weight.device):
            read = read_maps(last.maps, None)
            x = last.x.detach()
            judged, _ = judge_maps(objective, read, Rows(x[:n_pos], x[n_pos:]), skip_below, None)
            slopes = MapSlopes(judged.first, judged.second)
            kept = _in_doubt(slopes) if skip_below and x.device.type == "cpu" else None
            chain = list(chain) if kept is None else [passed.only(kept) for passed in chain]
            if kept is not None:
                by_first, by_second = (None if of is None else of[kept] for of in (judged.first, judged.second))
                slopes = MapSlopes(by_first, by_second)
            gradients: dict[str, Tensor] = {}
            for i in reversed(range(len(chain))):
                wants = i > 0 or bool(learned)
                found, below = _gradients(chain[i], slopes, wants)
                gradients |= {f"{i}.{name}": gradient.clone() for name, gradient in found.items()}
                if below is None:
                    break
                slopes, line = below, chain[i].standardising
                mean = None if line is None else line.mean
                if i > 0 and mean is not None:
                    chain[i - 1] = chain[i - 1]._replace(maps=chain[i - 1].maps._replace(pivot=mean))
            if below is not None:
                by_x = conv.by_places(chain[0].x.detach(), slopes, mean)
                if kept is not None:
                    by_x = torch.zeros_like(first.x, dtype=by_x.dtype).index_copy_(0, kept, by_x)
        if learned:
            found_by = torch.autograd.grad(first.x, list(learned.values()), by_x, retain_graph=False)
            # Two of them may be one tensor, and a rule writes over it.
            gradients |= {name: gradient.clone() for name, gradient in zip(learned, found_by, strict=True)}
        with torch.no_grad():
            for name, part in zip((f"{len(chain) - 1}.weight", *named), update.parts, strict=True):
                rules.step(update.rule, part.parameter, gradients[name], part.slot)
            torch.autograd.graph.increment_version(update.written())
            update.finish(optimizer)
    finally:
        interrupts.release(held)
    return judged


def _in_doubt(slopes: MapSlopes) -> Tensor | None:
    """Indices of the rows that have a slope; None for all of them."""
    of_rows = [(slope != 0).flatten(1).any(1) for slope in (slopes.first, slopes.second) if slope is not None]
    kept = torch.stack(of_rows).any(0).nonzero().squeeze(1)
    return None if len(kept) == len(of_rows[0]) else kept


def _parameters(chain: Sequence[Passed]) -> dict[str, Tensor]:
    named: dict[str, Tensor | None] = {}
    for i, passed in enumerate(chain):
        named |= {f"{i}.weight": passed.layer.weight, f"{i}.bias": passed.layer.bias}
        norm = passed.options.input_norm
        if isinstance(norm, nn.BatchNorm2d):
            named |= {f"{i}.input_norm.weight": norm.weight, f"{i}.input_norm.bias": norm.bias}
    return {name: p for name, p in named.items() if p is not None}


def _gradients(of: Passed, slopes: MapSlopes, wants: bool) -> tuple[dict[str, Tensor], MapSlopes | None]:
    """A layer's gradients by name, and if `wants` the slopes of the `x` it took, about the mean of its line."""
    layer, geometry, line, rows = of.layer, of.geometry, of.standardising, of.rows
    # Without the input's gradient the line's weight and bias take theirs from the convolution's weight gradient.
    by_line = line is not None and not wants
    if line is not None and by_line:
        rows = rows_for(line.standardised(of.x.detach()), layer, geometry, None)
    if of.is_compiled:
        dz, by_bias, dw = native.in_front(rows, layer, geometry, of.maps, slopes, by_line)
    else:
        dz = conv.in_front(of.maps, slopes, layer.activation, geometry, conv.size_of(rows, layer, geometry))
        by_bias = dz.sum((0, 2, 3))
        dz = dz.to(layer.compute_dtype).contiguous(memory_format=torch.channels_last)
        dw = conv.by_weight(dz, rows.x, layer, geometry, by_line)
    found = {"weight": dw} if layer.bias is None else {"weight": dw, "bias": by_bias}
    if line is not None and by_line:
        by_place = conv.over_rows(dz, layer.weight.dtype)
        found |= in_front.through_line(line.module, dw, by_place, rows, layer, geometry)
    if not wants:
        return found, None
    du = conv.by_input(dz, rows.x, layer, geometry)
    if line is None:
        return found, MapSlopes(None, None, of_place=du)
    x = of.x.detach()
    sums, products = (native if of.is_compiled else conv).products(du, x, line.statistics[0])
    of_line, below = in_front.through_statistics(line, sums, products, du)
    return found | of_line, below
