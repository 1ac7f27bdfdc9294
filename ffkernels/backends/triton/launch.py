"""The launches of a step: which kernels, in which form, on how large a grid."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from ...spec import Goal, Layer, PeerPull, Rows, Slopes
from . import configs, operands
from .classes import class_sums_kernel
from .coefficient import coefficient_kernel
from .device import descriptor, device_of, processors
from .finish import finish_kernel
from .forward import forward_kernel
from .operands import arithmetic, as_one, batch, kind_of, scales_first, total
from .peers import peers_kernel
from .records import (
    Basis,
    ClassSums,
    Coefficients,
    Forwarded,
    Kept,
    Linear,
    Parameter,
    Parts,
    Pull,
    Shared,
    Slope,
    Terms,
    Written,
)
from .slopes import RANK, list_kernel, scale_kernel, units_kernel
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
CLASSES_BLOCK = {False: {"BLOCK_M": 64, "BLOCK_C": 16}, True: {"BLOCK_M": 16, "BLOCK_C": 4}}
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
    partials: Tensor


class Parameters(NamedTuple):
    """What the rule, in one of its compiled forms, is applied to."""

    rule: str
    weight: Parameter
    bias: Parameter


def forward(
    rows: Rows,
    layer: Layer,
    y: Tensor | None,
    z: Tensor | None = None,
    row_scale: Tensor | None = None,
    sum_units: bool = False,
    sumsq: Tensor | None = None,
    class_sums: Tensor | None = None,
    squares: bool = True,
) -> Sums:
    """Launches the forward, which writes what it is given.

    Args:
        sum_units: whether the activities of positive rows are summed up.
        sumsq: `[rows]` for the squares, where one column block makes all of them.
        class_sums: `[rows, classes]` for sums of squares over groups of units; without `squares`, of activities.
    """
    weight = layer.weight
    if layer.compute_dtype != weight.dtype and total(rows) >= ROUND_WEIGHT_ROWS:
        weight = weight.to(layer.compute_dtype)
    out_features, in_features = weight.shape
    kind = kind_of(layer.compute_dtype, rows.x_pos, weight)
    config = configs.choose("forward", kind, (total(rows), in_features, out_features), weight.device)
    if class_sums is not None:
        config = configs.beside_class_sums(config)
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
    classes, slots = ClassSums(), 0
    if class_sums is not None:
        slots = class_slots(out_features, class_sums.shape[1], config["BLOCK_N"])
        parts = weight.new_empty(column_blocks, slots, total(rows), dtype=torch.float32)
        classes = ClassSums(parts, class_sums.shape[1])
    programs = row_blocks * column_blocks
    if config["PERSISTENT"]:
        programs = min(programs, config["PERSISTENT"] * processors(weight.device))
    if programs:
        y_row, y_col = (0, 0) if y is None else y.stride()
        bias_stride = 0 if layer.bias is None else layer.bias.stride(0)
        with device_of(weight):
            forward_kernel[(programs,)](
                rows=batch(rows if sum_units else rows._replace(is_positive=None)),
                in_features=in_features,
                out_features=out_features,
                input_sumsq=rows.input_sumsq if layer.norm != "none" else None,
                layer=Linear(weight, weight.stride(0), weight.stride(1), layer.eps, layer.bias, bias_stride),
                x_tiles=x_tiles if bulk else None,
                weight_tiles=weight_tiles if bulk else None,
                shared=Shared() if rows.product is None else Shared(rows.product, rows.label_field),
                written=Forwarded(y, y_row, y_col, z, row_scale, partials, units),
                classes=classes,
                NORM=layer.norm,
                EPS_MODE=layer.eps_mode,
                ACTIVATION=layer.activation,
                SCALE_FIRST=scales_first(layer, rows) and rows.product is None,
                **arithmetic(layer),
                **{**config, "TMA": int(bulk), "PERSISTENT": int(config["PERSISTENT"] > 0)},
                SQUARES=squares,
                SLOTS=slots,
            )
        if class_sums is not None:
            add_class_sums(classes, slots, config["BLOCK_N"], out_features, class_sums)
    return Sums(partials, units)


def class_slots(units: int, classes: int, block: int) -> int:
    """How many groups a block of units touches at most."""
    return min(classes, (block - 2) // (units // classes) + 2)


def add_class_sums(parts: ClassSums, slots: int, block: int, units: int, made: Tensor) -> None:
    """Launches the sums `made` `[rows, classes]` of what the forward's tiles, of so many units, have left."""
    rows, classes = made.shape
    blocks = CLASSES_BLOCK[interpreted()]
    with device_of(made):
        class_sums_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(classes, blocks["BLOCK_C"]))](
            classes=parts,
            total=rows,
            units=units,
            out=made,
            out_row=made.stride(0),
            out_col=made.stride(1),
            SLOTS=slots,
            BLOCK_N=block,
            **blocks,
        )


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
            rows=batch(rows),
            row_scale=row_scale,
            unit_sums=units,
            row_blocks=units.shape[0],
            n_positive=operands.count_positive(rows),
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
    return Pull(made, sums, splits)


class Source(NamedTuple):
    """What an update makes `dLoss/dz` of: coefficients that are there, slopes, or an objective.

    Attributes:
        constants: the objective's.
        written: what the update leaves of an objective, where there is one.
    """

    constants: dict[str, Any]
    made: Coefficients = Coefficients()
    first: Slope = Slope()
    second: Slope = Slope()
    basis: Basis = Basis()
    terms: Terms | None = None
    written: Written | None = None


# Where there is no objective, no kernel reads them.
NO_OBJECTIVE = {"GOODNESS": "sum", "LOSS": "logistic", "THRESHOLD_PER_ROW": False, "PARTIALS": 0}


def update(
    rows: Rows,
    layer: Layer,
    activities: Activities,
    goal: Goal,
    peers: Pull,
    parameters: Parameters,
    written: Written,
) -> None:
    """Launches the update by an objective: after the coefficients where making them once pays."""
    terms, constants = operands.objective(rows, activities.partials, goal)
    constants["PARTIALS"] = at_once(terms.n_partials)
    leave_out = operands.leaves_rows_out(goal) and not is_gated(peers)
    form = coefficient_form(total(rows), layer.weight.numel(), terms.n_partials, leave_out)
    made = Coefficients()
    if form != "on the fly":
        made = coefficients(rows, layer, terms, constants, form, written)
    kept = operands.kept(activities.kept, activities.row_scale)
    launch_tiles(rows, layer, kept, Source(constants, made, terms=terms, written=written), peers, parameters)


def update_given(
    rows: Rows, layer: Layer, slopes: Slopes, row_scale: Tensor | None, peers: Pull, parameters: Parameters
) -> None:
    """Launches the update by given slopes."""
    activity, first, second, basis = slopes
    if first is not None and basis is not None and basis.shape[0] > RANK.value:
        first, basis = first @ basis, None
    if first is None and (second is None or second.shape[1] == 1):
        column = layer.weight.new_zeros(total(rows)) if second is None else second[:, 0]
        # What the loss is, nobody here knows: any may have rows at rest.
        form = coefficient_form(total(rows), layer.weight.numel(), 0, leave_out=not is_gated(peers))
        source = Source(NO_OBJECTIVE, listed(column) if form == "listed" else Coefficients(2 * column))
    else:
        units = activity.shape[1]
        by_first, by_second = operands.slope_of(first, units), operands.slope_of(second, units)
        source = Source(NO_OBJECTIVE, Coefficients(), by_first, by_second)
        if first is not None and basis is not None:
            given = Slope(first, first.stride(0), first.stride(1))
            source = source._replace(first=given, basis=Basis(basis, basis.stride(0), basis.stride(1), basis.shape[0]))
    kept = operands.kept(activity, row_scale)
    launch_tiles(rows, layer, kept, source, peers, parameters)


def launch_tiles(
    rows: Rows, layer: Layer, activities: Kept, source: Source, peers: Pull, parameters: Parameters
) -> None:
    """Launches the tile products and the rule, split where the tiles are too few."""
    weight, kept, made = layer.weight, activities.kept, source.made
    out_features, in_features = weight.shape
    kind = "float32" if layer.compute_dtype == torch.float32 else kind_of(layer.compute_dtype, rows.x_pos, kept)
    config = configs.choose("update", kind, (total(rows), in_features, out_features), weight.device)
    if source.first.slope is not None or source.second.slope is not None:
        config = configs.beside_slopes(config)
    blocks_out = triton.cdiv(out_features, config["BLOCK_OUT"])
    tiles = blocks_out * triton.cdiv(in_features, config["BLOCK_IN"])
    splits = count_splits(tiles, triton.cdiv(total(rows), config["BLOCK_K"]), processors(weight.device))
    parts = Parts()
    if splits > 1:
        on_the_fly = source.terms is not None and made.coefficient is None
        parts = Parts(
            weight.new_empty(splits, out_features, in_features),
            None if layer.bias is None else weight.new_empty(splits, out_features),
            weight.new_empty(splits) if on_the_fly else None,
        )
    x_tiles = kept_tiles = None
    if config["TMA"] and made.listed is None and kept.dtype == layer.compute_dtype:
        x_tiles = descriptor(as_one(rows), [config["BLOCK_K"], config["BLOCK_IN"]])
        kept_tiles = descriptor(kept, [config["BLOCK_K"], config["BLOCK_OUT"]])
    bulk = x_tiles is not None and kept_tiles is not None
    # Without a bias one program more than there are tiles is enough: the one that sums up the loss.
    row_programs = blocks_out if layer.bias is not None else 1
    with device_of(weight):
        update_kernel[(tiles + row_programs, splits)](
            rows=batch(rows),
            activities=activities,
            x_tiles=x_tiles if bulk else None,
            kept_tiles=kept_tiles if bulk else None,
            in_features=in_features,
            out_features=out_features,
            made=made,
            first=source.first,
            second=source.second,
            basis=source.basis,
            terms=source.terms if made.coefficient is None else None,
            written=source.written,
            peers=peers,
            weight=parameters.weight,
            bias=parameters.bias,
            parts=parts,
            RULE=parameters.rule,
            ACTIVATION=layer.activation,
            **source.constants,
            SCALE_X=scales_first(layer, rows),
            **arithmetic(layer),
            **{**config, "TMA": int(bulk)},
        )
        if splits > 1:
            block = FINISH_BLOCK[interpreted()]
            blocks_out = triton.cdiv(out_features, block["BLOCK_OUT"])
            finish_kernel[(blocks_out * triton.cdiv(in_features, block["BLOCK_IN"]) + blocks_out,)](
                parts=parts,
                loss=None if source.written is None else source.written.loss,
                splits=splits,
                peers=peers,
                in_features=in_features,
                out_features=out_features,
                weight=parameters.weight,
                bias=parameters.bias,
                RULE=parameters.rule,
                **block,
            )


def coefficients(
    rows: Rows, layer: Layer, terms: Terms, constants: dict[str, Any], form: str, written: Written
) -> Coefficients:
    """Launches the coefficient kernel: "listed" by one program, "given" row by row by many."""
    new, is_listed = layer.weight.new_empty, form == "listed"
    block = COEFFICIENT_BLOCK[form], COEFFICIENT_NUMBERS // max(constants["PARTIALS"], 1)
    programs = 1 if is_listed else max(1, triton.cdiv(total(rows), min(block) if not interpreted() else 16))
    made = Coefficients(new(total(rows)), row_losses=None if is_listed else new(programs), n_row_losses=programs)
    if is_listed:
        made = made._replace(listed=new(total(rows), dtype=torch.int32), n_listed=new((), dtype=torch.int32))
    with device_of(layer.weight):
        coefficient_kernel[(programs,)](
            rows=batch(rows),
            terms=terms,
            width=layer.weight.shape[0],
            written=written if made.row_losses is None else written._replace(loss=made.row_losses),
            made=made,
            **constants,
            BLOCK=min(block) if not interpreted() else 16,
            num_warps=8 if is_listed else 4,
        )
    return made


def listed(second: Tensor) -> Coefficients:
    """Launches the list of the rows whose slope `second` `[rows]` is not exactly zero."""
    rows = second.shape[0]
    new = second.new_empty
    made = Coefficients(new(rows), new(rows, dtype=torch.int32), new((), dtype=torch.int32))
    with device_of(second):
        list_kernel[(1,)](
            slopes=second,
            stride=second.stride(0),
            total=rows,
            made=made,
            BLOCK=16 if interpreted() else COEFFICIENT_BLOCK["listed"],
            num_warps=8,
        )
    return made


def row_scale(rows: Rows, layer: Layer) -> Tensor | None:
    """Launches what normalises the rows; None without a norm."""
    if layer.norm == "none":
        return None
    made = layer.weight.new_empty(total(rows))
    block = ROWS_BLOCK[interpreted()]
    if total(rows):
        with device_of(made):
            scale_kernel[(triton.cdiv(total(rows), block["BLOCK_M"]),)](
                rows=batch(rows),
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
            rows=batch(rows),
            activities=operands.kept(kept, None),
            out_features=out_features,
            unit_sums=made,
            ACTIVATION=layer.activation,
            **block,
        )
    return made


def is_gated(peers: Pull) -> bool:
    """Whether the pull joins the rows' own product, at rows at rest as well."""
    return peers.pull is not None and peers.input_sums is None


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
