"""The update kernel: coefficients, tile product over the batch, and the optimizer's rule on the tile in registers."""

import triton
import triton.language as tl

from .coefficient import positive_rows, row_terms
from .common import gated, grouped, joint_rows, operand, power_of_two_below, slope_of
from .peers import with_pull
from .rules import apply_rule
from .slopes import by_slopes, column_of


@triton.jit
def update_kernel(
    x_pos, x_neg, kept, row_scale,  # [n_pos, in], [rows - n_pos, in], [rows, out], [rows] or None
    x_tiles, kept_tiles,  # rows and activities again as tensor descriptors, under TMA
    n_pos, rows, in_features, out_features,
    x_pos_row, x_neg_row, x_col, kept_row, kept_col,
    index, coefficient, count,  # from `coefficient_kernel`: the rows in doubt, or with coefficients alone every row
    first, first_row, first_col, first_groups, second, second_row, second_col, second_groups,  # `by_slopes`, or None
    partials, n_partials, is_positive, n_positive, sample_weight, threshold,  # without either: they are made on the fly
    threshold_pos, threshold_neg, logit_scale, share_pos, share_neg, skip_below,
    sumsq, row_losses, n_row_losses, loss,  # written: [rows], on the fly; [] from [n_row_losses] where these are there
    pull, input_sums, input_splits,  # from `peers_kernel`, or None
    weight, weight_row, weight_col, weight_state0, weight_state0_row, weight_state0_col,
    weight_state1, weight_state1_row, weight_state1_col, weight_rounded,
    bias, bias_stride, bias_state0, bias_state0_stride, bias_state1, bias_state1_stride,
    weight_lr, weight_lr_pointer, weight_step_pointer,
    weight_h0, weight_h1, weight_h2, weight_h3, weight_h4, weight_h5, weight_h6, weight_h7, weight_h8,
    bias_lr, bias_lr_pointer, bias_step_pointer,
    bias_h0, bias_h1, bias_h2, bias_h3, bias_h4, bias_h5, bias_h6, bias_h7, bias_h8,
    partial_weight, partial_bias,  # [splits, out, in], [splits, out] where the batch is split, else None
    RULE: tl.constexpr, ACTIVATION: tl.constexpr,
    GOODNESS: tl.constexpr, LOSS: tl.constexpr, THRESHOLD_PER_ROW: tl.constexpr, PARTIALS: tl.constexpr,
    PULL_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE_X: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`dW = sum_i (c_i r_i y_i act'(z_i)) x_i^T` and `db = sum_i c_i y_i act'(z_i)`, straight into the rule.

    Programs (tile, split): the first ones have a tile of the weight each, the others a block of the bias each, and the
    first of those writes sums of squares and loss. The sum over rows has a fixed order.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    tiles_out, tiles_in = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    total = rows
    if index is not None:
        total = tl.load(count)
    share = tl.cdiv(tl.cdiv(total, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = split * share
    last = tl.minimum(begin + share, total)
    has_slopes: tl.constexpr = first is not None or second is not None
    if program < tiles_out * tiles_in:
        tile_out, tile_in = grouped(program, tiles_out, tiles_in, GROUP)
        j = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        k = tile_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
        first_at, second_at = slope_columns(j, out_features, first_col, first_groups, second_col, second_groups)
        acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start in range(begin, last, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            here = place < last
            i = place
            if index is not None:
                i = tl.load(index + place, mask=here, other=0)
            if coefficient is not None:
                c = tl.load(coefficient + place, mask=here, other=0.0)
            elif has_slopes:
                c = tl.full([BLOCK_K], 1.0, tl.float32)
            else:
                _, c, _ = row_terms(
                    i, here, partials, n_partials, is_positive, n_positive, sample_weight, threshold, n_pos, rows,
                    out_features, threshold_pos, threshold_neg, logit_scale, share_pos, share_neg, skip_below,
                    GOODNESS, LOSS, THRESHOLD_PER_ROW, PARTIALS,
                )  # fmt: skip
            if TMA:
                x = x_tiles.load([start, tile_in * BLOCK_IN])  # [BLOCK_K, BLOCK_IN]
                values = kept_tiles.load([start, tile_out * BLOCK_OUT])  # [BLOCK_K, BLOCK_OUT]
            else:
                x_row = joint_rows(i, x_pos, x_neg, n_pos, x_pos_row, x_neg_row)
                x_at = x_row[:, None] + k.to(tl.int64)[None, :] * x_col
                x = tl.load(x_at, mask=here[:, None] & (k < in_features)[None, :], other=0.0)
                values = rows_of(kept, i, here, j, out_features, kept_row, kept_col)
            r = tl.full([BLOCK_K], 1.0, tl.float32)
            if row_scale is not None:
                r = tl.load(row_scale + i, mask=here, other=0.0)
                if SCALE_X:
                    x = x.to(tl.float32) * r[:, None]
                    r = tl.full([BLOCK_K], 1.0, tl.float32)
                c *= r
            if has_slopes:
                inside = here[:, None] & (j < out_features)[None, :]
                dz = by_slopes(values, i, inside, first, first_row, first_at, second, second_row, second_at, ACTIVATION)
                dz *= c[:, None]
            else:
                dz = times_coefficient(values, c, ACTIVATION, COMPUTE)
            if PULL_GATED:
                dz += gated_pull(values, tl.where(positive_rows(i, here, is_positive, n_pos), r, 0.0), j, out_features,
                                 pull, ACTIVATION)  # fmt: skip
            if COMPUTE == tl.float16:  # noqa: SIM300
                # Coefficients carry 1 / (rows width) and a loss's slope: float16 needs them brought near one.
                power, inverse = power_of_two_below(tl.max(tl.max(tl.abs(dz), axis=1), axis=0))
                left = operand(tl.trans(dz * inverse), COMPUTE, WIDEN)
                acc += tl.dot(left, operand(x, COMPUTE, WIDEN), input_precision=PRECISION) * power
            else:
                left = operand(tl.trans(dz), COMPUTE, WIDEN)
                acc = tl.dot(left, operand(x, COMPUTE, WIDEN), acc, input_precision=PRECISION)
        finish_tile(
            acc, tile_in * BLOCK_IN, j, in_features, out_features, split, partial_weight, pull, input_sums,
            input_splits, weight, weight_row, weight_col, weight_state0, weight_state0_row, weight_state0_col,
            weight_state1, weight_state1_row, weight_state1_col, weight_rounded,
            weight_lr, weight_lr_pointer, weight_step_pointer,
            weight_h0, weight_h1, weight_h2, weight_h3, weight_h4, weight_h5, weight_h6, weight_h7, weight_h8,
            RULE, BLOCK_OUT, BLOCK_IN, PARTS,
        )  # fmt: skip
    else:
        block = program - tiles_out * tiles_in
        j = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        first_at, second_at = slope_columns(j, out_features, first_col, first_groups, second_col, second_groups)
        bias_sum = tl.zeros([BLOCK_K, BLOCK_OUT], tl.float32)
        loss_sum = tl.zeros([BLOCK_K], tl.float32)
        for start in range(begin, last, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            here = place < last
            i = place
            if index is not None:
                i = tl.load(index + place, mask=here, other=0)
            if coefficient is not None:
                c = tl.load(coefficient + place, mask=here, other=0.0)
            elif not has_slopes:
                q, c, losses = row_terms(
                    i, here, partials, n_partials, is_positive, n_positive, sample_weight, threshold, n_pos, rows,
                    out_features, threshold_pos, threshold_neg, logit_scale, share_pos, share_neg, skip_below,
                    GOODNESS, LOSS, THRESHOLD_PER_ROW, PARTIALS,
                )  # fmt: skip
                loss_sum += losses
                if block == 0:
                    tl.store(sumsq + i, q, mask=here)
            if HAS_BIAS:
                values = rows_of(kept, i, here, j, out_features, kept_row, kept_col)
                if has_slopes:
                    inside = here[:, None] & (j < out_features)[None, :]
                    bias_sum += by_slopes(
                        values, i, inside, first, first_row, first_at, second, second_row, second_at, ACTIVATION
                    )  # fmt: skip
                else:
                    bias_sum += times_coefficient(values, c, ACTIVATION, COMPUTE)
                if PULL_GATED:
                    positive = positive_rows(i, here, is_positive, n_pos)
                    bias_sum += gated_pull(values, tl.where(positive, 1.0, 0.0), j, out_features, pull, ACTIVATION)
        if coefficient is None and not has_slopes:
            tl.store(loss + split, tl.sum(loss_sum, axis=0), mask=block == 0)
        elif row_losses is not None:
            tl.store(loss, sum_of(row_losses, n_row_losses), mask=(block == 0) & (split == 0))
        if HAS_BIAS:
            gradient = tl.sum(bias_sum, axis=0)
            here = j < out_features
            if partial_bias is not None:
                tl.store(partial_bias + tl.cast(split, tl.int64) * out_features + j, gradient, mask=here)
            else:
                at = j.to(tl.int64)
                if input_sums is not None:
                    gradient += tl.load(pull + out_features + j, mask=here, other=0.0)
                apply_rule(
                    gradient, here, bias, at * bias_stride, bias_state0, at * bias_state0_stride,
                    bias_state1, at * bias_state1_stride, None, at, bias_lr, bias_lr_pointer, bias_step_pointer,
                    bias_h0, bias_h1, bias_h2, bias_h3, bias_h4, bias_h5, bias_h6, bias_h7, bias_h8, RULE,
                )  # fmt: skip


@triton.jit
def slope_columns(j, out_features, first_col, first_groups, second_col, second_groups):
    """Offsets of the columns in which the slopes of units `j` stand."""
    return column_of(j, out_features, first_groups) * first_col, column_of(j, out_features, second_groups) * second_col


@triton.jit
def rows_of(kept, i, here, j, out_features, kept_row, kept_col):
    """`[len(i), len(j)]` what the forward has kept of rows `i` and units `j`."""
    at = kept + i.to(tl.int64)[:, None] * kept_row + j.to(tl.int64)[None, :] * kept_col
    return tl.load(at, mask=here[:, None] & (j < out_features)[None, :], other=0.0)


@triton.jit
def times_coefficient(values, c, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr):
    """`c y act'(z)` in float32, from what the forward has kept."""
    product = gated(values.to(tl.float32), ACTIVATION) * c[:, None]
    if COMPUTE == tl.float16:  # noqa: SIM300
        # An activity beyond float16 is infinite; in a row at rest it must not make NaN.
        product = tl.where(c[:, None] == 0, 0.0, product)
    return product


@triton.jit
def gated_pull(values, share, j, out_features, pull, ACTIVATION: tl.constexpr):
    """`share_i pull_j act'(z_ij)`."""
    p = tl.load(pull + j, mask=j < out_features, other=0.0)
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
    acc, first_column, j, in_features, out_features, split, partial_weight, pull, input_sums, input_splits,
    weight, weight_row, weight_col, state0, state0_row, state0_col, state1, state1_row, state1_col, rounded,
    lr, lr_pointer, step_pointer, h0, h1, h2, h3, h4, h5, h6, h7, h8,
    RULE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Applies the rule to a tile whose columns start at `first_column`, or stores it as one split's part.

    In PARTS slices of its columns, a power of two: the whole tile with its state would not fit in registers.
    """
    if PARTS > 1:
        half: tl.constexpr = BLOCK_IN // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_OUT, 2, half]), [0, 2, 1]))
        finish_tile(
            left, first_column, j, in_features, out_features, split, partial_weight, pull, input_sums, input_splits,
            weight, weight_row, weight_col, state0, state0_row, state0_col, state1, state1_row, state1_col, rounded,
            lr, lr_pointer, step_pointer, h0, h1, h2, h3, h4, h5, h6, h7, h8, RULE, BLOCK_OUT, half, PARTS // 2,
        )  # fmt: skip
        finish_tile(
            right, first_column + half, j, in_features, out_features, split, partial_weight, pull, input_sums,
            input_splits, weight, weight_row, weight_col, state0, state0_row, state0_col, state1, state1_row,
            state1_col, rounded,
            lr, lr_pointer, step_pointer, h0, h1, h2, h3, h4, h5, h6, h7, h8, RULE, BLOCK_OUT, half, PARTS // 2,
        )  # fmt: skip
    else:
        k = first_column + tl.arange(0, BLOCK_IN)
        here = (j < out_features)[:, None] & (k < in_features)[None, :]
        row, column = j.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
        if partial_weight is not None:
            at = (tl.cast(split, tl.int64) * out_features + row) * in_features + column
            tl.store(partial_weight + at, acc, mask=here)
        else:
            if input_sums is not None:
                acc = with_pull(acc, j, k, pull, input_sums, input_splits, in_features, out_features)
            apply_rule(
                acc, here, weight, row * weight_row + column * weight_col,
                state0, row * state0_row + column * state0_col, state1, row * state1_row + column * state1_col,
                rounded, row * in_features + column,
                lr, lr_pointer, step_pointer, h0, h1, h2, h3, h4, h5, h6, h7, h8, RULE,
            )  # fmt: skip
