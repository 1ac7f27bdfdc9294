"""The launches of a step: which kernels, in which form, on how large a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from ...spec import Layer, PeerPull, Rows, Slopes
from . import configs
from .coefficient import coefficient_kernel
from .device import descriptor, device_of, processors
from .finish import finish_kernel
from .forward import forward_kernel
from .operands import (
    NO_TERMS,
    Parameters,
    Terms,
    arithmetic,
    as_one,
    kind_of,
    mask,
    row_arguments,
    scales_first,
    total,
)
from .peers import peers_kernel
from .slopes import list_kernel, scale_kernel, units_kernel
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
UNITS_BLOCK = {False: {"BLOCK_M": 64, "BLOCK_N": 64}, True: {"BLOCK_M": 4, "BLOCK_N": 16}}
ROWS_BLOCK = {False: {"BLOCK_M": 16, "BLOCK_K": 128}, True: {"BLOCK_M": 16, "BLOCK_K": 16}}
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
    partials: Tensor | None = None


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
    sum_units: bool = False,
    sumsq: Tensor | None = None,
) -> Sums:
    """Launches the forward, which writes what it is given.

    Args:
        sum_units: whether the activities of positive rows are summed up.
        sumsq: `[rows]` for the squares, where one column block makes all of them.
    """
    weight = layer.weight
    if layer.compute_dtype != weight.dtype and total(rows) >= ROUND_WEIGHT_ROWS:
        weight = weight.to(layer.compute_dtype)
    out_features, in_features = weight.shape
    kind = kind_of(layer.compute_dtype, rows.x_pos, weight)
    config = configs.choose("forward", kind, (total(rows), in_features, out_features), weight.device)
    row_blocks, column_blocks = (
        triton.cdiv(size, config[block]) for size, block in ((total(rows), "BLOCK_M"), (out_features, "BLOCK_N"))
    )
    if sumsq is not None and column_blocks == 1:
        partials = sumsq.view(1, total(rows))
    else:
        partials = weight.new_empty(column_blocks, total(rows), dtype=torch.float32)
    units = weight.new_empty(row_blocks, out_features, dtype=torch.float32) if sum_units else None
    x_tiles = weight_tiles = None
    if config["TMA"] and rows.product is None:
        x_tiles = descriptor(as_one(rows), [config["BLOCK_M"], config["BLOCK_K"]])
        weight_tiles = descriptor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    bulk = x_tiles is not None and weight_tiles is not None
    programs = row_blocks * column_blocks
    if config["PERSISTENT"]:
        programs = min(programs, config["PERSISTENT"] * processors(weight.device))
    if programs:
        with device_of(weight):
            forward_kernel[(programs,)](
                **row_arguments(rows),
                input_sumsq=rows.input_sumsq if layer.norm != "none" else None,
                weight=weight,
                bias=layer.bias,
                x_tiles=x_tiles if bulk else None,
                weight_tiles=weight_tiles if bulk else None,
                product=rows.product,
                is_positive=mask(rows) if sum_units else None,
                y=y,
                kept=z,
                row_scale=row_scale,
                partials=partials,
                unit_sums=units,
                columns=in_features if rows.product is None else rows.label_field,
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
                SCALE_FIRST=scales_first(layer, rows) and rows.product is None,
                **arithmetic(layer),
                **{**config, "TMA": int(bulk), "PERSISTENT": int(config["PERSISTENT"] > 0)},
            )
    return Sums(partials, units)


def pull(
    rows: Rows,
    layer: Layer,
    units: Tensor,
    row_scale: Tensor | None,
    given: PeerPull,
) -> Pull:
    """Launches peer normalisation, which moves the mean; `units` from a forward with `sum_units`."""
    mean, strength, momentum, gated = given
    assert mean is not None
    out_features, in_features = layer.weight.shape
    block = PEERS_BLOCK[interpreted()]
    splits = max(1, min(INPUT_SPLITS, total(rows) // (8 * block["BLOCK_K"])))
    made = layer.weight.new_empty(2, out_features)
    sums = None if gated else layer.weight.new_empty(splits, in_features)
    with device_of(mean):
        peers_kernel[(1 if gated else 1 + splits * triton.cdiv(in_features, block["BLOCK_IN"]),)](
            **row_arguments(rows),
            unit_sums=units,
            row_blocks=units.shape[0],
            row_scale=row_scale,
            is_positive=mask(rows),
            # How many rows a mask marks is known on the device only, and stays there.
            n_positive=None if rows.is_positive is None else rows.is_positive.sum(),
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


@dataclass(frozen=True)
class Coefficients:
    """What a launch of its own has made of the rows; the update makes the rest on the fly."""

    row_losses: Tensor | None = None
    index: Tensor | None = None
    coefficient: Tensor | None = None
    count: Tensor | None = None


class Source(NamedTuple):
    """What the update makes `dLoss/dz` of: coefficients, slopes, or an objective on the sums of squares.

    Attributes:
        made: coefficients that are there, or None.
        sumsq, loss: what an objective's update writes.
    """

    made: Coefficients | None = None
    slopes: Slopes | None = None
    terms: Terms = NO_TERMS
    partials: Tensor | None = None
    sumsq: Tensor | None = None
    loss: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        made = self.made or Coefficients()
        return {
            "index": made.index,
            "coefficient": made.coefficient,
            "count": made.count,
            "row_losses": made.row_losses,
            "n_row_losses": 0 if made.row_losses is None else made.row_losses.shape[0],
            **slope_arguments(self.slopes),
            "partials": self.partials,
            "n_partials": 0 if self.partials is None else self.partials.shape[0],
            **self.terms.arguments,
            "sumsq": self.sumsq,
        }


def update(
    rows: Rows,
    layer: Layer,
    activities: Activities,
    terms: Terms,
    peers: Pull | None,
    parameters: Parameters,
    sumsq: Tensor,
    loss: Tensor,
) -> None:
    """Launches the update by an objective: after the coefficients where making them once pays."""
    partials = activities.partials
    assert partials is not None
    form = coefficient_form(
        total(rows),
        layer.weight.numel(),
        partials.shape[0],
        leave_out=terms.leaves_rows_out and not is_gated(peers),
    )
    made = None
    if form != "on the fly":
        with device_of(layer.weight):
            made = coefficients(rows, layer, partials, terms, form, sumsq, loss)
    launch_tiles(rows, layer, activities, Source(made, None, terms, partials, sumsq, loss), peers, parameters)


def update_given(
    rows: Rows, layer: Layer, slopes: Slopes, row_scale: Tensor | None, peers: Pull | None, parameters: Parameters
) -> None:
    """Launches the update by given slopes."""
    _, first, second = slopes
    source = Source(slopes=slopes)
    if first is None and (second is None or second.shape[1] == 1):
        column = layer.weight.new_zeros(total(rows)) if second is None else second[:, 0]
        large = coefficient_form(total(rows), layer.weight.numel(), 0, leave_out=not is_gated(peers))
        # What the loss is, nobody here knows: any may have rows at rest.
        source = Source(listed(column) if large == "listed" else Coefficients(coefficient=2 * column))
    launch_tiles(rows, layer, Activities(slopes.activity, row_scale), source, peers, parameters)


def launch_tiles(
    rows: Rows, layer: Layer, activities: Activities, source: Source, peers: Pull | None, parameters: Parameters
) -> None:
    """Launches the tile products and the rule, split where the tiles are too few."""
    weight, kept = layer.weight, activities.kept
    out_features, in_features = weight.shape
    kind = "float32" if layer.compute_dtype == torch.float32 else kind_of(layer.compute_dtype, rows.x_pos, kept)
    config = configs.choose("update", kind, (total(rows), in_features, out_features), weight.device)
    if source.slopes is not None:
        config = configs.beside_slopes(config)
    splits = count_splits(
        triton.cdiv(out_features, config["BLOCK_OUT"]) * triton.cdiv(in_features, config["BLOCK_IN"]),
        triton.cdiv(total(rows), config["BLOCK_K"]),
        processors(weight.device),
    )
    loss = source.loss
    partial_weight = partial_bias = partial_loss = None
    pulling = {
        "pull": None if peers is None else peers.pull,
        "input_sums": None if peers is None else peers.input_sums,
        "input_splits": 0 if peers is None or peers.input_sums is None else peers.input_sums.shape[0],
    }
    with device_of(weight):
        if splits > 1:
            partial_weight = weight.new_empty(splits, out_features, in_features)
            partial_bias = weight.new_empty(splits, out_features) if layer.bias is not None else None
            if loss is not None and source.made is None:
                partial_loss = weight.new_empty(splits)
        x_tiles = kept_tiles = None
        if config["TMA"] and (source.made is None or source.made.index is None) and kept.dtype == layer.compute_dtype:
            x_tiles = descriptor(as_one(rows), [config["BLOCK_K"], config["BLOCK_IN"]])
            kept_tiles = descriptor(kept, [config["BLOCK_K"], config["BLOCK_OUT"]])
        bulk = x_tiles is not None and kept_tiles is not None
        blocks_out = triton.cdiv(out_features, config["BLOCK_OUT"])
        # Without a bias one program more than there are tiles is enough: the one that sums up the loss.
        row_programs = blocks_out if layer.bias is not None else 1
        grid = (blocks_out * triton.cdiv(in_features, config["BLOCK_IN"]) + row_programs, splits)
        update_kernel[grid](
            **row_arguments(rows),
            is_positive=mask(rows),
            kept=kept,
            row_scale=activities.row_scale,
            x_tiles=x_tiles if bulk else None,
            kept_tiles=kept_tiles if bulk else None,
            in_features=in_features,
            out_features=out_features,
            kept_row=kept.stride(0),
            kept_col=kept.stride(1),
            **source.arguments(),
            loss=loss if partial_loss is None else partial_loss,
            **pulling,
            **parameters.arguments,
            partial_weight=partial_weight,
            partial_bias=partial_bias,
            RULE=parameters.rule,
            ACTIVATION=layer.activation,
            **source.terms.constants,
            PARTIALS=at_once(0 if source.partials is None else source.partials.shape[0]),
            PULL_GATED=is_gated(peers),
            HAS_BIAS=layer.bias is not None,
            SCALE_X=scales_first(layer, rows),
            **arithmetic(layer),
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
                **parameters.arguments,
                RULE=parameters.rule,
                HAS_BIAS=layer.bias is not None,
                **block,
            )


def coefficients(
    rows: Rows, layer: Layer, partials: Tensor, terms: Terms, form: str, sumsq: Tensor, loss: Tensor
) -> Coefficients:
    """Launches the coefficient kernel: "listed" by one program, "given" row by row by many."""
    weight, listed = layer.weight, form == "listed"
    at_a_time = at_once(partials.shape[0])
    block = min(COEFFICIENT_BLOCK[form], COEFFICIENT_NUMBERS // max(at_a_time, 1)) if not interpreted() else 16
    programs = 1 if listed else max(1, triton.cdiv(total(rows), block))
    made = Coefficients(
        row_losses=None if listed else weight.new_empty(programs),
        index=weight.new_empty(total(rows), dtype=torch.int32) if listed else None,
        coefficient=weight.new_empty(total(rows)),
        count=weight.new_empty((), dtype=torch.int32) if listed else None,
    )
    coefficient_kernel[(programs,)](
        **terms.arguments,
        partials=partials,
        n_partials=partials.shape[0],
        is_positive=mask(rows),
        n_pos=rows.x_pos.shape[0],
        rows=total(rows),
        width=layer.weight.shape[0],
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


def listed(second: Tensor) -> Coefficients:
    """Launches the list of the rows whose slope `second` `[rows]` is not exactly zero."""
    rows = second.shape[0]
    made = Coefficients(
        index=second.new_empty(rows, dtype=torch.int32),
        coefficient=second.new_empty(rows),
        count=second.new_empty((), dtype=torch.int32),
    )
    with device_of(second):
        list_kernel[(1,)](
            second=second,
            second_row=second.stride(0),
            rows=rows,
            index=made.index,
            coefficient=made.coefficient,
            count=made.count,
            BLOCK=16 if interpreted() else COEFFICIENT_BLOCK["listed"],
            num_warps=8,
        )
    return made


def slope_arguments(slopes: Slopes | None) -> dict[str, Any]:
    """The slopes as `slopes.by_slopes` takes them: where there is one a row, it is every unit's."""
    arguments: dict[str, Any] = {}
    for name in ("first", "second"):
        slope = None if slopes is None else getattr(slopes, name)
        groups = None
        if slopes is not None and slope is not None and slope.shape[1] != slopes.activity.shape[1]:
            groups = slope.shape[1] if slope.shape[1] > 1 else None
        row, column = (0, 0) if slope is None else slope.stride()
        if slope is not None and slope.shape[1] == 1:
            column = 0
        arguments |= {name: slope, f"{name}_row": row, f"{name}_col": column, f"{name}_groups": groups}
    return arguments


def row_scale(rows: Rows, layer: Layer) -> Tensor | None:
    """Launches what normalises the rows; None without a norm."""
    if layer.norm == "none":
        return None
    made = layer.weight.new_empty(total(rows))
    block = ROWS_BLOCK[interpreted()]
    if total(rows):
        with device_of(made):
            scale_kernel[(triton.cdiv(total(rows), block["BLOCK_M"]),)](
                **row_arguments(rows),
                input_sumsq=rows.input_sumsq,
                in_features=layer.weight.shape[1],
                eps=layer.eps,
                row_scale=made,
                NORM=layer.norm,
                EPS_MODE=layer.eps_mode,
                **block,
            )
    return made


def unit_sums(rows: Rows, layer: Layer, kept: Tensor) -> Tensor:
    """Launches the sums of the positive rows' activities, `Sums.units`, where no forward has made them."""
    out_features = layer.weight.shape[0]
    block = UNITS_BLOCK[interpreted()]
    splits = max(1, min(INPUT_SPLITS, total(rows) // (8 * block["BLOCK_M"])))
    made = layer.weight.new_empty(splits, out_features)
    with device_of(made):
        units_kernel[(triton.cdiv(out_features, block["BLOCK_N"]), splits)](
            kept=kept,
            kept_row=kept.stride(0),
            kept_col=kept.stride(1),
            is_positive=mask(rows),
            n_pos=rows.x_pos.shape[0],
            rows=total(rows),
            out_features=out_features,
            unit_sums=made,
            ACTIVATION=layer.activation,
            **block,
        )
    return made


def is_gated(peers: Pull | None) -> bool:
    """Whether the pull joins the rows' own product, at rows at rest as well."""
    return peers is not None and peers.input_sums is None


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
