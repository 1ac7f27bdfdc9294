"""Minibatches from uint8 images, made where they live: no Python loop over samples, no wait for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .readers.dataset import SIDE


@dataclass(frozen=True)
class Minibatch:
    """What a recipe trains on at once, on the trainer's device: of several processes, this one's rows.

    Attributes:
        rows: how many images all processes have.
        x_pos: positive rows `[rows, inputs]`; labels stand in them as the recipe says.
        x_neg: negative rows likewise; a loss of classes has none: None.
        labels: the right ones, `[rows]`.
        features: the classifier's, where the negatives are drawn from its softmax.
        logits: what it makes of them.
        shared: what these left of the first layer's product, for the step.
        wrong: the negative rows' labels.
        index: which of the whole run it is, from 0.
        images: which of the training images these rows are, where labels that they have met are kept.
    """

    rows: int
    x_pos: Tensor
    x_neg: Tensor | None
    labels: Tensor
    features: Tensor | None = None
    logits: Tensor | None = None
    shared: Shared | None = None
    wrong: Tensor | None = None
    index: int = 0
    images: Tensor | None = None


class Shared(NamedTuple):
    """`FFNetwork.shared_product` of some rows, and the version of the weight that it is of."""

    product: Tensor
    version: int


def shifted(
    images: Tensor,
    by: int,
    generator: torch.Generator | None = None,
    shape: tuple[int, int, int] = (1, SIDE, SIDE),
) -> Tensor:
    """Images `[rows, channels * height * width]` of a `shape`, each moved by up to `by` pixels: `random_crops`."""
    return random_crops(images.view(-1, *shape), by, generator).flatten(1)


def random_crops(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Images `[rows, channels, height, width]` of any dtype, with `pad` zeros around them, each cut to its old size.

    Where, is drawn uniformly for each row, the same for its channels: each is moved by up to `pad` pixels in both
    directions.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (pad, pad, pad, pad))
    down, right = torch.randint(2 * pad + 1, (2, len(images), 1), generator=generator, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    return padded.unfold(2, height, 1).unfold(3, width, 1)[rows, :, down[:, 0], right[:, 0]]


def views(x: Tensor, by: int, blank: float) -> list[Tensor]:
    """Images `[rows, channels, height, width]`, and unless `by` is 0 those moved by so many pixels up, down, left and
    right, with `blank` where nothing is left."""
    moves = [(0, 0, -by, by), (0, 0, by, -by), (-by, by, 0, 0), (by, -by, 0, 0)] if by else []
    return [x, *(F.pad(x, move, value=blank) for move in moves)]


def random_flips(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Images `[rows, channels, height, width]` of any dtype; a half of them, drawn for each row, left to right."""
    turned = torch.randint(2, (len(images), 1, 1, 1), generator=generator, device=images.device).bool()
    return torch.where(turned, images.flip(3), images)


def random_turns(images: Tensor, degrees: float, zoom: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Images `[rows, channels, height, width]` of any dtype, each turned about its middle and made larger or smaller.

    The angle is drawn uniformly from `-degrees` to `degrees`, the size from `1 - zoom` to `1 + zoom`, for each row.
    Pixels are interpolated linearly, between zeros outside; those of integer dtypes are rounded.
    """
    height, width = images.shape[2:]
    angle, size = torch.rand(2, len(images), generator=generator, device=images.device).mul_(2).sub_(1)
    angle, size = angle * math.radians(degrees), 1 + size * zoom
    cos, sin, none = angle.cos() / size, angle.sin() / size, torch.zeros_like(angle)
    # Where a pixel comes from, both in halves of a side.
    numbers = [cos, -sin * (height / width), none, sin * (width / height), cos, none]
    grid = F.affine_grid(torch.stack(numbers, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, align_corners=False)
    return (turned if images.is_floating_point() else turned.round_()).to(images.dtype)


def turned(
    images: Tensor, degrees: float, zoom: float, generator: torch.Generator | None, shape: tuple[int, int, int]
) -> Tensor:
    """Images `[rows, channels * height * width]` of a `shape`, turned and zoomed: `random_turns`."""
    return random_turns(images.view(-1, *shape), degrees, zoom, generator).flatten(1)


def flipped(images: Tensor, generator: torch.Generator | None, shape: tuple[int, int, int]) -> Tensor:
    """Images `[rows, channels * height * width]` of a `shape`, half of them turned: `random_flips`."""
    return random_flips(images.view(-1, *shape), generator).flatten(1)


def as_input(images: Tensor, mean: float = 0.0, std: float = 1.0, columns: int = 0) -> Tensor:
    """Rows of float32 from uint8 images: 0..1 (or standardised), behind `columns` zeros for a label."""
    x = images.float().div_(255)
    if (mean, std) != (0, 1):
        x.sub_(mean).div_(std)
    return F.pad(x, (columns, 0)) if columns else x


def dropped(x: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """`x` with each number set to 0 with probability `share` and else divided by `1 - share`.

    A draw of 64 bits decides four numbers: `share` is rounded to a multiple of 2^-16.
    """
    of_all = 1 << 16
    left_out = round(share * of_all)
    if left_out == of_all:
        return torch.zeros_like(x)
    draws = x.new_empty(-(-x.numel() // 4), dtype=torch.int64)
    draws.random_(-(1 << 63), (1 << 63) - 1, generator=generator)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape).ge(left_out - of_all // 2)
    return x * kept.to(x.dtype).mul_(of_all / (of_all - left_out))


def labelled_sides(
    x: Tensor, labels: Tensor, wrong: Tensor, num_classes: int, value: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`x` under its labels and under wrong ones, both in 0..num_classes-1, one behind the other in memory."""
    both = torch.cat([x, x])
    both[:, :num_classes].zero_().scatter_(1, torch.cat([labels, wrong])[:, None], value)
    return both[: len(x)], both[len(x) :]


def hard_label(
    logits: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    rows: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """For each row a wrong label drawn from softmax(logits) with the right one left out; `[rows]`.

    The largest of `logit + Gumbel noise` is such a draw, whatever the logits' range.

    `rows`, `own`: how many rows the noise is drawn for, and which of them these are; None: for these alone.
    """
    drawn = logits.new_empty(len(logits) if rows is None else rows, logits.shape[1])
    noise = drawn.exponential_(generator=generator)[own].log_().neg_()
    return (logits + noise).scatter_(1, labels[:, None], -math.inf).argmax(1)
