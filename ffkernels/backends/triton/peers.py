"""Peer normalisation between the two halves of a step: the running mean moves, each unit's pull follows from it."""

import triton
import triton.language as tl

from .coefficient import positive_rows
from .common import joint_rows


@triton.jit
def peers_kernel(
    rows, row_scale, unit_sums, row_blocks,  # `records.Batch`, [rows] or None, [row blocks, out] from the forward
    n_positive,  # [] how many rows a mask marks; None: the first n_pos
    in_features, out_features,
    mean, mean_stride, strength, momentum,  # [out], moved
    pull, input_sums, splits,  # written: [2, out] a row's pull, and that of all; [splits, in] sums of r x
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`peer.moved_mean` and `peer.pull_of` in the first program; in the others, which straight through has (block of
    inputs, split of the rows), what the pull is multiplied by."""
    if tl.program_id(0) == 0:
        count = tl.cast(rows.n_pos, tl.float32)
        if n_positive is not None:
            count = tl.load(n_positive).to(tl.float32)
        move_mean(unit_sums, row_blocks, count, out_features, mean, mean_stride, strength, momentum, pull, BLOCK_OUT)
    else:
        block, split = (tl.program_id(0) - 1) // splits, (tl.program_id(0) - 1) % splits
        k = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
        sums = tl.zeros([BLOCK_K, BLOCK_IN], tl.float32)
        for start in range(split * BLOCK_K, rows.total, splits * BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            positive = positive_rows(i, i < rows.total, rows)
            x_at = joint_rows(i, rows)[:, None] + k.to(tl.int64)[None, :] * rows.x_col
            x = tl.load(x_at, mask=positive[:, None] & (k < in_features)[None, :], other=0.0).to(tl.float32)
            if row_scale is not None:
                x *= tl.load(row_scale + i, mask=positive, other=0.0)[:, None]
            sums += x
        at = input_sums + tl.cast(split, tl.int64) * in_features + k
        tl.store(at, tl.sum(sums, axis=0), mask=k < in_features)


@triton.jit
def move_mean(
    unit_sums, row_blocks, count, out_features, mean, mean_stride, strength, momentum, pull, BLOCK: tl.constexpr
):  # fmt: skip
    """Moves the running mean by `count` positive rows, and stores what follows for each unit."""
    divisor = tl.maximum(count, 1.0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, out_features, BLOCK):
        j = start + tl.arange(0, BLOCK)
        here = j < out_features
        activity = tl.zeros([BLOCK], tl.float32)
        for block in range(row_blocks):
            activity += tl.load(unit_sums + tl.cast(block, tl.int64) * out_features + j, mask=here, other=0.0)
        at = mean + j.to(tl.int64) * mean_stride
        before = tl.load(at, mask=here, other=0.0)
        moved = tl.where(count > 0, momentum * before + (1.0 - momentum) * (activity / divisor), before)
        tl.store(at, moved, mask=here)
        total += tl.where(here, moved, 0.0)
    average = tl.sum(total, axis=0) / out_features
    # What is read again below, threads of this program have written.
    tl.debug_barrier()
    for start in range(0, out_features, BLOCK):
        j = start + tl.arange(0, BLOCK)
        here = j < out_features
        moved = tl.load(mean + j.to(tl.int64) * mean_stride, mask=here, other=0.0)
        of_all = tl.where(count > 0, (moved - average) * strength, 0.0)
        tl.store(pull + j, of_all / divisor, mask=here)
        tl.store(pull + out_features + j, of_all, mask=here)


@triton.jit
def with_pull(gradient, j, k, peers, in_features, out_features):
    """A tile of the weight's gradient with `pull_j sum_i r_i x_ik` over positive rows on top, straight through."""
    x = tl.zeros(k.shape, tl.float32)
    for split in range(peers.input_splits):
        at = peers.input_sums + tl.cast(split, tl.int64) * in_features + k
        x += tl.load(at, mask=k < in_features, other=0.0)
    p = tl.load(peers.pull + j, mask=j < out_features, other=0.0)
    return gradient + p[:, None] * x[None, :]


@triton.jit
def bias_with_pull(gradient, j, peers, out_features):
    """The same of the bias's gradient."""
    return gradient + tl.load(peers.pull + out_features + j, mask=j < out_features, other=0.0)
