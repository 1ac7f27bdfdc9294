"""The split form's second launch: adds what each part of the batch gave, in order, and applies the rule once."""

import triton
import triton.language as tl

from .peers import with_pull
from .rules import apply_rule


@triton.jit
def finish_kernel(
    partial_weight, partial_bias, partial_loss, loss, splits,  # [splits, out, in], [splits, out], [splits] or None, []
    pull, input_sums, input_splits,  # from `peers_kernel`, or None
    in_features, out_features,
    weight, weight_row, weight_col, weight_state0, weight_state0_row, weight_state0_col,
    weight_state1, weight_state1_row, weight_state1_col, weight_rounded,
    bias, bias_stride, bias_state0, bias_state0_stride, bias_state1, bias_state1_stride,
    weight_lr, weight_lr_pointer, weight_step_pointer,
    weight_h0, weight_h1, weight_h2, weight_h3, weight_h4, weight_h5, weight_h6, weight_h7, weight_h8,
    bias_lr, bias_lr_pointer, bias_step_pointer,
    bias_h0, bias_h1, bias_h2, bias_h3, bias_h4, bias_h5, bias_h6, bias_h7, bias_h8,
    RULE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Programs: one for each tile of the weight, and after them one for each block of the bias."""
    program = tl.program_id(0)
    tiles_in = tl.cdiv(in_features, BLOCK_IN)
    tiles = tl.cdiv(out_features, BLOCK_OUT) * tiles_in
    if program < tiles:
        j = (program // tiles_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        k = (program % tiles_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        inside = (j < out_features)[:, None] & (k < in_features)[None, :]
        row, column = j.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
        part = partial_weight + row * in_features + column
        weight_gradient = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for _ in range(splits):
            weight_gradient += tl.load(part, mask=inside, other=0.0)
            part += tl.cast(out_features, tl.int64) * in_features
        if input_sums is not None:
            weight_gradient = with_pull(
                weight_gradient, j, k, pull, input_sums, input_splits, in_features, out_features
            )  # fmt: skip
        apply_rule(
            weight_gradient, inside, weight, row * weight_row + column * weight_col,
            weight_state0, row * weight_state0_row + column * weight_state0_col,
            weight_state1, row * weight_state1_row + column * weight_state1_col,
            weight_rounded, row * in_features + column,
            weight_lr, weight_lr_pointer, weight_step_pointer,
            weight_h0, weight_h1, weight_h2, weight_h3, weight_h4, weight_h5, weight_h6, weight_h7, weight_h8, RULE,
        )  # fmt: skip
    else:
        if partial_loss is not None:
            total = 0.0
            for split in range(splits):
                total += tl.load(partial_loss + split)
            tl.store(loss, total, mask=program == tiles)
        if HAS_BIAS:
            j = (program - tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            here = j < out_features
            at = j.to(tl.int64)
            bias_gradient = tl.zeros([BLOCK_OUT], tl.float32)
            for split in range(splits):
                part_of_bias = partial_bias + tl.cast(split, tl.int64) * out_features + j
                bias_gradient += tl.load(part_of_bias, mask=here, other=0.0)
            if input_sums is not None:
                bias_gradient += tl.load(pull + out_features + j, mask=here, other=0.0)
            apply_rule(
                bias_gradient, here, bias, at * bias_stride, bias_state0, at * bias_state0_stride,
                bias_state1, at * bias_state1_stride, None, at, bias_lr, bias_lr_pointer, bias_step_pointer,
                bias_h0, bias_h1, bias_h2, bias_h3, bias_h4, bias_h5, bias_h6, bias_h7, bias_h8, RULE,
            )  # fmt: skip
