"""The update kernel: coefficients, tile product over the batch, and the optimizer's rule on the tile in registers."""

import triton
import triton.language as tl

from .coefficient import positive_rows, row_terms
from .common import gated, grouped, joint_rows, operand, power_of_two_below, rows_of, slope_of
from .peers import bias_with_pull, with_pull
from .rules import apply_rule
from .slopes import basis_of, by_slopes, columns_of


@triton.jit
def update_kernel(
    rows, activities,  # `records.Batch`, `Kept`
    x_tiles, kept_tiles,  # rows and activities again as tensor descriptors, under TMA
    in_features, out_features,
    made,  # `Coefficients` of the rows in doubt or of every row; where there are none, either
    first, second, basis,  # `Slope`, `Slope`, `Basis`,
    terms,  # or `Terms`, by which coefficients are made on the fly
    written,  # `Written`, of an objective
    peers, weight, bias,  # `Pull`, `Parameter`, `Parameter`
    parts,  # `Parts` where the batch is split
    RULE: tl.constexpr, ACTIVATION: tl.constexpr,
    GOODNESS: tl.constexpr, LOSS: tl.constexpr, THRESHOLD_PER_ROW: tl.constexpr, PARTIALS: tl.constexpr,
    SCALE_X: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`dW = sum_i (c_i r_i y_i act'(z_i)) x_i^T` and `db = sum_i c_i y_i act'(z_i)`, straight into the rule.

    Programs (tile, split): the first ones have a tile of the weight each, the others a block of the bias each, and the
    first of those writes sums of squares and loss. The sum over rows has a fixed order.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    tiles_out, tiles_in = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    is_listed: tl.constexpr = made.listed is not None
    has_slopes: tl.constexpr = first.slope is not None or second.slope is not None
    is_gated: tl.constexpr = peers.pull is not None and peers.input_sums is None
    total = rows.total
    if is_listed:
        total = tl.load(made.n_listed)
    share = tl.cdiv(tl.cdiv(total, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = split * share
    last = tl.minimum(begin + share, total)
    if program < tiles_out * tiles_in:
        tile_out, tile_in = grouped(program, tiles_out, tiles_in, GROUP)
        j = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        k = tile_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
        first_at = columns_of(j, out_features, first)
        second_at = columns_of(j, out_features, second)
        basis_tile = basis_of(j, out_features, basis)
        acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start in range(begin, last, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            here = place < last
            i = place
            if is_listed:
                i = tl.load(made.listed + place, mask=here, other=0)
            if made.coefficient is not None:
                c = tl.load(made.coefficient + place, mask=here, other=0.0)
            elif has_slopes:
                c = tl.full([BLOCK_K], 1.0, tl.float32)
            else:
                _, c, _ = row_terms(
                    i, here, rows, terms, out_features, GOODNESS, LOSS, THRESHOLD_PER_ROW, PARTIALS
                )  # fmt: skip
            if TMA:
                x = x_tiles.load([start, tile_in * BLOCK_IN])  # [BLOCK_K, BLOCK_IN]
                values = kept_tiles.load([start, tile_out * BLOCK_OUT])  # [BLOCK_K, BLOCK_OUT]
            else:
                x_at = joint_rows(i, rows)[:, None] + k.to(tl.int64)[None, :] * rows.x_col
                x = tl.load(x_at, mask=here[:, None] & (k < in_features)[None, :], other=0.0)
                values = rows_of(activities, i, here, j, out_features)
            r = tl.full([BLOCK_K], 1.0, tl.float32)
            if activities.row_scale is not None:
                r = tl.load(activities.row_scale + i, mask=here, other=0.0)
                if SCALE_X:
                    x = x.to(tl.float32) * r[:, None]
                    r = tl.full([BLOCK_K], 1.0, tl.float32)
                c *= r
            if has_slopes:
                dz = by_slopes(
                    values, i, here, j, out_features, first, first_at, second, second_at, basis, basis_tile,
                    ACTIVATION,
                )  # fmt: skip
                dz *= c[:, None]
            else:
                dz = times_coefficient(values, c, ACTIVATION, COMPUTE)
            if is_gated:
                pulled = tl.where(positive_rows(i, here, rows), r, 0.0)
                dz += gated_pull(values, pulled, j, out_features, peers, ACTIVATION)
            if COMPUTE == tl.float16:  # noqa: SIM300
                # Coefficients carry 1 / (rows width) and a loss's slope: float16 needs them brought near one.
                power, inverse = power_of_two_below(tl.max(tl.max(tl.abs(dz), axis=1), axis=0))
                left = operand(tl.trans(dz * inverse), COMPUTE, WIDEN)
                acc += tl.dot(left, operand(x, COMPUTE, WIDEN), input_precision=PRECISION) * power
            else:
                left = operand(tl.trans(dz), COMPUTE, WIDEN)
                acc = tl.dot(left, operand(x, COMPUTE, WIDEN), acc, input_precision=PRECISION)
        finish_tile(
            acc, tile_in * BLOCK_IN, j, in_features, out_features, split, parts, peers, weight,
            RULE, BLOCK_OUT, BLOCK_IN, PARTS,
        )  # fmt: skip
    else:
        block = program - tiles_out * tiles_in
        j = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        first_at = columns_of(j, out_features, first)
        second_at = columns_of(j, out_features, second)
        basis_tile = basis_of(j, out_features, basis)
        bias_sum = tl.zeros([BLOCK_K, BLOCK_OUT], tl.float32)
        loss_sum = tl.zeros([BLOCK_K], tl.float32)
        for start in range(begin, last, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            here = place < last
            i = place
            if is_listed:
                i = tl.load(made.listed + place, mask=here, other=0)
            if made.coefficient is not None:
                c = tl.load(made.coefficient + place, mask=here, other=0.0)
            elif not has_slopes:
                q, c, losses = row_terms(
                    i, here, rows, terms, out_features, GOODNESS, LOSS, THRESHOLD_PER_ROW, PARTIALS
                )  # fmt: skip
                loss_sum += losses
                if block == 0:
                    tl.store(written.sumsq + i, q, mask=here)
            if bias.parameter is not None:
                values = rows_of(activities, i, here, j, out_features)
                if has_slopes:
                    bias_sum += by_slopes(
                        values, i, here, j, out_features, first, first_at, second, second_at, basis, basis_tile,
                        ACTIVATION,
                    )  # fmt: skip
                else:
                    bias_sum += times_coefficient(values, c, ACTIVATION, COMPUTE)
                if is_gated:
                    pulled = tl.where(positive_rows(i, here, rows), 1.0, 0.0)
                    bias_sum += gated_pull(values, pulled, j, out_features, peers, ACTIVATION)
        if made.coefficient is not None:
            if made.row_losses is not None:
                first_program = (block == 0) & (split == 0)
                tl.store(written.loss, sum_of(made.row_losses, made.n_row_losses), mask=first_program)
        elif not has_slopes:
            # Of a split batch each part has its share, for `finish_kernel` to add.
            at = written.loss + split
            if parts.weight is not None:
                at = parts.loss + split
            tl.store(at, tl.sum(loss_sum, axis=0), mask=block == 0)
        if bias.parameter is not None:
            gradient = tl.sum(bias_sum, axis=0)
            here = j < out_features
            if parts.weight is not None:
                tl.store(parts.bias + tl.cast(split, tl.int64) * out_features + j, gradient, mask=here)
            else:
                if peers.input_sums is not None:
                    gradient = bias_with_pull(gradient, j, peers, out_features)
                apply_rule(gradient, here, bias, j.to(tl.int64), 0, 1, RULE)


@triton.jit
def times_coefficient(values, c, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr):
    """`c y act'(z)` in float32, from what the forward has kept."""
    product = gated(values.to(tl.float32), ACTIVATION) * c[:, None]
    if COMPUTE == tl.float16:  # noqa: SIM300
        # An activity beyond float16 is infinite; in a row at rest it must not make NaN.
        product = tl.where(c[:, None] == 0, 0.0, product)
    return product


@triton.jit
def gated_pull(values, share, j, out_features, peers, ACTIVATION: tl.constexpr):
    """`share_i pull_j act'(z_ij)`."""
    p = tl.load(peers.pull + j, mask=j < out_features, other=0.0)
    return slope_of(values.to(tl.float32), ACTIVATION) * share[:, None] * p[None, :]


@triton.jit
def sum_of(parts, n_parts):
    """The sum of `parts` `[n_parts]`, in a fixed order."""
    total = tl.zeros([256], tl.float32)
    for start in range(0, n_parts, 256):
        part = start + tl.arange(0, 256)
        total += tl.load(parts + part, mask=part < n_parts, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def finish_tile(
    acc, first_column, j, in_features, out_features, split, parts, peers, weight,
    RULE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Applies the rule to a tile whose columns start at `first_column`, or stores it as one split's part.

    In PARTS slices of its columns, a power of two: the whole tile with its state would not fit in registers.
    """
    if PARTS > 1:
        half: tl.constexpr = BLOCK_IN // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_OUT, 2, half]), [0, 2, 1]))
        finish_tile(
            left, first_column, j, in_features, out_features, split, parts, peers, weight,
            RULE, BLOCK_OUT, half, PARTS // 2,
        )  # fmt: skip
        finish_tile(
            right, first_column + half, j, in_features, out_features, split, parts, peers, weight,
            RULE, BLOCK_OUT, half, PARTS // 2,
        )  # fmt: skip
    else:
        k = first_column + tl.arange(0, BLOCK_IN)
        here = (j < out_features)[:, None] & (k < in_features)[None, :]
        row, column = j.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
        if parts.weight is not None:
            at = (tl.cast(split, tl.int64) * out_features + row) * in_features + column
            tl.store(parts.weight + at, acc, mask=here)
        else:
            if peers.input_sums is not None:
                acc = with_pull(acc, j, k, peers, in_features, out_features)
            apply_rule(acc, here, weight, row, column, in_features, RULE)
