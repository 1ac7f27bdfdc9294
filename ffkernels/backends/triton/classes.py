"""Sums over class groups, as the forward leaves them for each of its tiles, and the kernel that adds them up."""

import triton
import triton.language as tl

from .common import borders_of, group_of


@triton.jit
def store_class_sums(
    activity, i, j, here, tile_n, rows, units, classes,
    SQUARES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile of units `j` adds to the sums of the groups that it touches, the first of them in the first slot."""
    group = group_of(tile_n * BLOCK_N, units, classes.groups)
    at = classes.sums + tl.cast(tile_n * SLOTS, tl.int64) * rows + i
    for _slot in tl.static_range(SLOTS):
        # By their borders: a division for each unit would cost more than the sums.
        begin, end = borders_of(group, units, classes.groups)
        values = tl.where(((j >= begin) & (j < end))[None, :], activity, 0.0)
        if SQUARES:
            values *= values
        tl.store(at, tl.sum(values, axis=1), mask=here)
        group += 1
        at += rows


@triton.jit
def class_sums_kernel(
    classes, total, units,  # `records.ClassSums`
    out, out_row, out_col,  # written: [rows, classes]
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of each group in the order of their tiles; programs (block of rows, block of classes)."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = borders_of(k, units, classes.groups)
    tile, last = begin // BLOCK_N, (end - 1) // BLOCK_N
    here = (i < total)[:, None] & (k < classes.groups)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range((units // classes.groups + BLOCK_N - 1) // BLOCK_N + 1):
        slot = k - group_of(tile * BLOCK_N, units, classes.groups)
        at = classes.sums + (tile * SLOTS + slot).to(tl.int64)[None, :] * total + i[:, None]
        sums += tl.load(at, mask=here & (tile <= last)[None, :], other=0.0)
        tile += 1
    at = out + i.to(tl.int64)[:, None] * out_row + k.to(tl.int64)[None, :] * out_col
    tl.store(at, sums, mask=here)
