"""The launches of a step: which kernels, in which form, on how large a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from ...spec import PeerPull
from . import configs
from .coefficient import coefficient_kernel
from .device import descriptor, device_of, processors
from .finish import finish_kernel
from .forward import forward_kernel
from .operands import Layer, Rows, Terms, kind_of
from .peers import peers_kernel
from .support import interpreted
from .update import update_kernel

# From this many rows on, rounding the weight once costs less than rounding its tiles for every block of rows.
ROUND_WEIGHT_ROWS = 512
# From this size on, a launch that makes the coefficients once costs less than making them again for every tile.
COEFFICIENT_ROWS = 512
COEFFICIENT_ELEMENTS = 1 << 20
# Up to this many column blocks are added up at once, and where they are few, in every program of the update.
PARTIALS_AT_ONCE = 64
# Rows that a program of the coefficient kernel takes at a time, with or without a list, and numbers in its registers.
COEFFICIENT_BLOCK = {"listed": 1024, "given": 128}
COEFFICIENT_NUMBERS = 16384
PEERS_BLOCK = {
    False: {"BLOCK_OUT": 1024, "BLOCK_IN": 64, "BLOCK_K": 64},
    True: {"BLOCK_OUT": 16, "BLOCK_IN": 16, "BLOCK_K": 4},
}
# Of how many parts the sum of the positive rows is put together at most.
INPUT_SPLITS = 16
FINISH_BLOCK = {False: {"BLOCK_OUT": 16, "BLOCK_IN": 128}, True: {"BLOCK_OUT": 16, "BLOCK_IN": 16}}
# A split of the batch has at least this many blocks of rows.
MIN_BLOCKS_PER_SPLIT = 4


class Sums(NamedTuple):
    """What the forward has summed up: squares `[column blocks, rows]`, positive rows `[row blocks, out]` if wanted."""

    partials: Tensor
    units: Tensor | None


class Activities(NamedTuple):
    """What a forward leaves for the update; `kept` is `y`, or `z` where the slope needs it."""

    kept: Tensor
    row_scale: Tensor | None
    partials: Tensor


class Pull(NamedTuple):
    """Peer normalisation's part: `[2, out]` each row's pull and that of all, `[splits, in]` what it is multiplied by.

    Gated, there are no sums: the pull joins the rows' own product.
    """

    pull: Tensor
    input_sums: Tensor | None


def forward(
    rows: Rows,
    layer: Layer,
    y: Tensor | None,
    z: Tensor | None = None,
    row_scale: Tensor | None = None,
    shared: tuple[Tensor, int] | None = None,
    sum_units: bool = False,
    is_positive: Tensor | None = None,
    sumsq: Tensor | None = None,
) -> Sums:
    """Launches the forward, which writes what it is given.

    Args:
        shared: `product` and `label_field` of `spec.Rows`.
        sum_units: whether the activities of positive rows are summed up.
        is_positive: which those are; None for the first side.
        sumsq: `[rows]` for the squares, where one column block makes all of them.
    """
    weight = layer.weight
    if layer.compute_dtype != weight.dtype and rows.total >= ROUND_WEIGHT_ROWS:
        weight = weight.to(layer.compute_dtype)
    out_features, in_features = weight.shape
    kind = kind_of(layer.compute_dtype, rows.x_pos, weight)
    config = configs.choose("forward", kind, (rows.total, in_features, out_features), weight.device)
    row_blocks, column_blocks = (
        triton.cdiv(size, config[block]) for size, block in ((rows.total, "BLOCK_M"), (out_features, "BLOCK_N"))
    )
    if sumsq is not None and column_blocks == 1:
        partials = sumsq.view(1, rows.total)
    else:
        partials = weight.new_empty(column_blocks, rows.total, dtype=torch.float32)
    units = weight.new_empty(row_blocks, out_features, dtype=torch.float32) if sum_units else None
    x_tiles = weight_tiles = None
    if config["TMA"] and shared is None:
        x_tiles = descriptor(rows.as_one, [config["BLOCK_M"], config["BLOCK_K"]])
        weight_tiles = descriptor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    bulk = x_tiles is not None and weight_tiles is not None
    programs = row_blocks * column_blocks
    if config["PERSISTENT"]:
        programs = min(programs, config["PERSISTENT"] * processors(weight.device))
    product, columns = (None, in_features) if shared is None else (shared[0].contiguous(), shared[1])
    if programs:
        with device_of(weight):
            forward_kernel[(programs,)](
                **rows.arguments(),
                input_sumsq=rows.sumsq if layer.norm != "none" else None,
                weight=weight,
                bias=layer.bias,
                x_tiles=x_tiles if bulk else None,
                weight_tiles=weight_tiles if bulk else None,
                product=product,
                is_positive=None if is_positive is None else is_positive.view(torch.uint8),
                y=y,
                kept=z,
                row_scale=row_scale,
                partials=partials,
                unit_sums=units,
                columns=columns,
                in_features=in_features,
                out_features=out_features,
                weight_row=weight.stride(0),
                weight_col=weight.stride(1),
                bias_stride=layer.bias.stride(0) if layer.bias is not None else 0,
                y_row=y.stride(0) if y is not None else 0,
                y_col=y.stride(1) if y is not None else 0,
                eps=layer.eps,
                NORM=layer.norm,
                EPS_MODE=layer.eps_mode,
                ACTIVATION=layer.activation,
                SCALE_FIRST=layer.scales_first(rows) and shared is None,
                **layer.arithmetic(),
                **{**config, "TMA": int(bulk), "PERSISTENT": int(config["PERSISTENT"] > 0)},
            )
    return Sums(partials, units)


def pull(
    rows: Rows,
    layer: Layer,
    units: Tensor,
    row_scale: Tensor | None,
    is_positive: Tensor | None,
    given: PeerPull,
) -> Pull:
    """Launches peer normalisation, which moves the mean; `units` from a forward with `sum_units`."""
    mean, strength, momentum, gated = given
    assert mean is not None
    out_features, in_features = layer.weight.shape
    block = PEERS_BLOCK[interpreted()]
    splits = max(1, min(INPUT_SPLITS, rows.total // (8 * block["BLOCK_K"])))
    made = layer.weight.new_empty(2, out_features)
    sums = None if gated else layer.weight.new_empty(splits, in_features)
    with device_of(mean):
        peers_kernel[(1 if gated else 1 + splits * triton.cdiv(in_features, block["BLOCK_IN"]),)](
            **rows.arguments(),
            unit_sums=units,
            row_blocks=units.shape[0],
            row_scale=row_scale,
            is_positive=None if is_positive is None else is_positive.view(torch.uint8),
            # How many rows a mask marks is known on the device only, and stays there.
            n_positive=None if is_positive is None else is_positive.sum(),
            in_features=in_features,
            out_features=out_features,
            mean=mean,
            mean_stride=mean.stride(0),
            strength=strength,
            momentum=momentum,
            pull=made,
            input_sums=sums,
            splits=splits,
            **block,
        )
    return Pull(made, sums)


def update(
    rows: Rows,
    layer: Layer,
    activities: Activities,
    terms: Terms,
    peers: Pull | None,
    rule: str,
    parameters: dict[str, Any],
    sumsq: Tensor,
    loss: Tensor,
) -> None:
    """Launches the update: after the coefficients where making them once pays, split where its tiles are too few."""
    weight, kept = layer.weight, activities.kept
    out_features, in_features = weight.shape
    kind = "float32" if layer.compute_dtype == torch.float32 else kind_of(layer.compute_dtype, rows.x_pos)
    config = configs.choose("update", kind, (rows.total, in_features, out_features), weight.device)
    n_partials = activities.partials.shape[0]
    splits = count_splits(
        triton.cdiv(out_features, config["BLOCK_OUT"]) * triton.cdiv(in_features, config["BLOCK_IN"]),
        triton.cdiv(rows.total, config["BLOCK_K"]),
        processors(weight.device),
    )
    gated = peers is not None and peers.input_sums is None
    form = coefficient_form(
        rows.total, in_features * out_features, n_partials, leave_out=terms.leaves_rows_out and not gated
    )
    made = Coefficients()
    partial_weight = partial_bias = partial_loss = None
    pulling = {
        "pull": None if peers is None else peers.pull,
        "input_sums": None if peers is None else peers.input_sums,
        "input_splits": 0 if peers is None or peers.input_sums is None else peers.input_sums.shape[0],
    }
    with device_of(weight):
        if form != "on the fly":
            made = coefficients(rows, layer, activities.partials, terms, form, sumsq, loss)
        if splits > 1:
            partial_weight = weight.new_empty(splits, out_features, in_features)
            partial_bias = weight.new_empty(splits, out_features) if layer.bias is not None else None
            if form == "on the fly":
                partial_loss = weight.new_empty(splits)
        x_tiles = kept_tiles = None
        if config["TMA"] and form != "listed":
            x_tiles = descriptor(rows.as_one, [config["BLOCK_K"], config["BLOCK_IN"]])
            kept_tiles = descriptor(kept, [config["BLOCK_K"], config["BLOCK_OUT"]])
        bulk = x_tiles is not None and kept_tiles is not None
        blocks_out = triton.cdiv(out_features, config["BLOCK_OUT"])
        # Without a bias one program more than there are tiles is enough: the one that sums up the loss.
        row_programs = blocks_out if layer.bias is not None else 1
        grid = (blocks_out * triton.cdiv(in_features, config["BLOCK_IN"]) + row_programs, splits)
        update_kernel[grid](
            **rows.arguments(),
            kept=kept,
            row_scale=activities.row_scale,
            x_tiles=x_tiles if bulk else None,
            kept_tiles=kept_tiles if bulk else None,
            in_features=in_features,
            out_features=out_features,
            kept_row=kept.stride(0),
            kept_col=kept.stride(1),
            index=made.index,
            coefficient=made.coefficient,
            count=made.count,
            partials=activities.partials,
            n_partials=n_partials,
            **terms.arguments,
            sumsq=sumsq,
            row_losses=made.row_losses,
            n_row_losses=0 if made.row_losses is None else made.row_losses.shape[0],
            loss=loss if partial_loss is None else partial_loss,
            **pulling,
            **parameters,
            partial_weight=partial_weight,
            partial_bias=partial_bias,
            RULE=rule,
            ACTIVATION=layer.activation,
            **terms.constants,
            PARTIALS=at_once(n_partials),
            PULL_GATED=gated,
            HAS_BIAS=layer.bias is not None,
            SCALE_X=layer.scales_first(rows),
            **layer.arithmetic(),
            **{**config, "TMA": int(bulk)},
        )
        if splits > 1:
            block = FINISH_BLOCK[interpreted()]
            tiles = triton.cdiv(out_features, block["BLOCK_OUT"]) * triton.cdiv(in_features, block["BLOCK_IN"])
            finish_kernel[(tiles + triton.cdiv(out_features, block["BLOCK_OUT"]),)](
                partial_weight=partial_weight,
                partial_bias=partial_bias,
                partial_loss=partial_loss,
                loss=loss,
                splits=splits,
                in_features=in_features,
                out_features=out_features,
                **pulling,
                **parameters,
                RULE=rule,
                HAS_BIAS=layer.bias is not None,
                **block,
            )


@dataclass(frozen=True)
class Coefficients:
    """What a launch of its own has made of the rows; the update makes the rest on the fly."""

    row_losses: Tensor | None = None
    index: Tensor | None = None
    coefficient: Tensor | None = None
    count: Tensor | None = None


def coefficients(
    rows: Rows, layer: Layer, partials: Tensor, terms: Terms, form: str, sumsq: Tensor, loss: Tensor
) -> Coefficients:
    """Launches the coefficient kernel: "listed" by one program, "given" row by row by many."""
    weight, listed = layer.weight, form == "listed"
    at_a_time = at_once(partials.shape[0])
    block = min(COEFFICIENT_BLOCK[form], COEFFICIENT_NUMBERS // max(at_a_time, 1)) if not interpreted() else 16
    programs = 1 if listed else max(1, triton.cdiv(rows.total, block))
    made = Coefficients(
        row_losses=None if listed else weight.new_empty(programs),
        index=weight.new_empty(rows.total, dtype=torch.int32) if listed else None,
        coefficient=weight.new_empty(rows.total),
        count=weight.new_empty((), dtype=torch.int32) if listed else None,
    )
    coefficient_kernel[(programs,)](
        **terms.arguments,
        partials=partials,
        n_partials=partials.shape[0],
        n_pos=rows.x_pos.shape[0],
        rows=rows.total,
        width=layer.out_features,
        sumsq=sumsq,
        loss=loss if listed else made.row_losses,
        index=made.index,
        coefficient=made.coefficient,
        count=made.count,
        **terms.constants,
        PARTIALS=at_a_time,
        BLOCK=block,
        num_warps=8 if listed else 4,
    )
    return made


def coefficient_form(
    rows: int, elements: int, n_partials: int, leave_out: bool
) -> Literal["on the fly", "given", "listed"]:
    """How the update comes by its coefficients: made in every program, by a launch of their own, or listed by it."""
    large = rows >= COEFFICIENT_ROWS and elements >= COEFFICIENT_ELEMENTS
    if large and leave_out:
        return "listed"
    return "given" if large or n_partials > PARTIALS_AT_ONCE else "on the fly"


def at_once(n_partials: int) -> int:
    """PARTIALS of `coefficient.sum_of_partials`."""
    return triton.next_power_of_2(n_partials) if n_partials <= PARTIALS_AT_ONCE else 0


def count_splits(tiles: int, row_blocks: int, programs: int) -> int:
    """In how many parts the batch goes through the update so that `programs` programs can run at a time."""
    return max(1, min(programs // tiles, row_blocks // MIN_BLOCKS_PER_SPLIT))
