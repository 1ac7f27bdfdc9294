"""The joint batch: positive rows, then negative ones, worked through in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...normalisation import row_sumsq

# Sides whose rows differ in at most this share of the columns share the product over the others.
SHARED_FIELD = 1 / 8
PROBED_ROWS = 64


class Block(NamedTuple):
    """Some rows of a joint batch: one or two ranges of it, in order."""

    ranges: tuple[slice, ...]

    def take(self, values: Tensor | None) -> Tensor | None:
        """These rows of `values` `[rows, ...]`."""
        if values is None:
            return None
        parts = [values[r] for r in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def first_half(self, values: Tensor | None) -> Tensor | None:
        """The entries of `values` `[pairs]` for a block of whole pairs."""
        if values is None:
            return None
        rows = self.ranges[0]
        return values[rows] if len(self.ranges) == 2 else values[: rows.stop // 2]

    def put(self, values: Tensor, into: Tensor) -> None:
        """Writes these rows of `into`."""
        start = 0
        for r in self.ranges:
            into[r] = values[start : start + r.stop - r.start]
            start += r.stop - r.start


def blocks(n_pos: int, n_neg: int, block_rows: int, paired: bool) -> Iterator[Block]:
    """Blocks of about `block_rows` rows that cover the batch; each holds whole pairs where the loss compares pairs."""
    n = n_pos + n_neg
    if n <= block_rows:
        yield Block((slice(0, n),))
    elif paired:
        half = max(1, block_rows // 2)
        for start in range(0, n_pos, half):
            stop = min(start + half, n_pos)
            yield Block((slice(start, stop), slice(n_pos + start, n_pos + stop)))
    else:
        for first, last in ((0, n_pos), (n_pos, n)):
            for start in range(first, last, block_rows):
                yield Block((slice(start, min(start + block_rows, last)),))


def input_parts(block: Block, x_pos: Tensor, x_neg: Tensor) -> list[Tensor]:
    """The block's input rows: those of the positive side, those of the negative side, or both."""
    n_pos = x_pos.shape[0]
    parts = []
    for r in block.ranges:
        if r.start < n_pos:
            parts.append(x_pos[r.start : r.stop])
        if r.stop > n_pos:
            parts.append(x_neg[max(0, r.start - n_pos) : r.stop - n_pos])
    return parts or [x_pos]


def joined(parts: list[Tensor]) -> Tensor:
    """The parts as one; a view where they lie together in memory."""
    if len(parts) == 1:
        return parts[0]
    a, b = parts
    follows = (
        a.dtype == b.dtype
        and a.stride() == b.stride()
        and a.data_ptr() + a.shape[0] * a.stride(0) * a.element_size() == b.data_ptr()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )
    if follows:
        return a.as_strided((a.shape[0] + b.shape[0], a.shape[1]), a.stride())
    return torch.cat(parts)


def may_share(x_pos: Tensor, x_neg: Tensor) -> bool:
    """Whether the first rows of both sides differ in so few columns that the sides may share their products.

    To find out, values must be on the host, so a device never shares.
    """
    if x_pos.device.type != "cpu" or x_pos.shape != x_neg.shape or not len(x_pos):
        return False
    return int((x_pos[0] != x_neg[0]).sum()) <= x_pos.shape[1] * SHARED_FIELD


def label_field(x_pos: Tensor, x_neg: Tensor) -> slice | None:
    """The columns outside which both sides hold the same numbers, or None where those are too many to gain from it."""
    if not may_share(x_pos, x_neg):
        return None
    # Some rows tell where the field is; outside it every row must agree, or nothing is shared.
    some = slice(None, None, max(1, len(x_pos) // PROBED_ROWS))
    columns = (x_pos[some] != x_neg[some]).any(0).nonzero()
    field = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)
    if field.stop - field.start > x_pos.shape[1] * SHARED_FIELD:
        return None
    outside = (slice(None, field.start), slice(field.stop, None))
    return field if all(torch.equal(x_pos[:, part], x_neg[:, part]) for part in outside) else None


def sumsq_of_copies(sides: list[Tensor], field: slice, dtype: torch.dtype) -> Tensor:
    """`[2 pairs]` sums of squares of rows and their copies, which agree outside `field`."""
    common = row_sumsq(sides[0][:, : field.start], dtype) + row_sumsq(sides[0][:, field.stop :], dtype)
    return torch.cat([common + row_sumsq(x[:, field], dtype) for x in sides])
