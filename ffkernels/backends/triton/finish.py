"""The split form's second launch: adds what each part of the batch gave, in order, and applies the rule once."""

import triton
import triton.language as tl

from .peers import bias_with_pull, with_pull
from .rules import apply_rule


@triton.jit
def finish_kernel(
    parts, loss, splits, peers, in_features, out_features, weight, bias,  # `records`; loss [] or None
    RULE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
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
        part = parts.weight + row * in_features + column
        weight_gradient = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for _ in range(splits):
            weight_gradient += tl.load(part, mask=inside, other=0.0)
            part += tl.cast(out_features, tl.int64) * in_features
        if peers.input_sums is not None:
            weight_gradient = with_pull(weight_gradient, j, k, peers, in_features, out_features)
        apply_rule(weight_gradient, inside, weight, row, column, in_features, RULE)
    else:
        if parts.loss is not None:
            total = 0.0
            for split in range(splits):
                total += tl.load(parts.loss + split)
            tl.store(loss, total, mask=program == tiles)
        if bias.parameter is not None:
            j = (program - tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            here = j < out_features
            bias_gradient = tl.zeros([BLOCK_OUT], tl.float32)
            for split in range(splits):
                part_of_bias = parts.bias + tl.cast(split, tl.int64) * out_features + j
                bias_gradient += tl.load(part_of_bias, mask=here, other=0.0)
            if peers.input_sums is not None:
                bias_gradient = bias_with_pull(bias_gradient, j, peers, out_features)
            apply_rule(bias_gradient, here, bias, j.to(tl.int64), 0, 1, RULE)
