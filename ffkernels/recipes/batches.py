"""Minibatches from uint8 images, made where they live: no Python loop over samples, no wait for the device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..negatives import overlay_label
from .data import SIDE


def shifted(images: Tensor, by: int, generator: torch.Generator | None = None) -> Tensor:
    """Images `[rows, 784]`, each moved by up to `by` pixels in both directions, drawn uniformly; zeros come in."""
    size = SIDE + 2 * by
    padded = F.pad(images.view(-1, SIDE, SIDE), (by, by, by, by)).flatten(1)
    down, right = torch.randint(2 * by + 1, (2, len(images), 1), generator=generator, device=images.device)
    place = torch.arange(SIDE, device=images.device)
    pixels = (size * place[:, None] + place).flatten()
    return padded.gather(1, pixels + size * down + right)


def as_input(images: Tensor, mean: float = 0.0, std: float = 1.0, columns: int = 0) -> Tensor:
    """Rows of float32 from uint8 images: 0..1 (or standardised), behind `columns` zeros for a label."""
    x = images.float().div_(255)
    if (mean, std) != (0, 1):
        x.sub_(mean).div_(std)
    return F.pad(x, (columns, 0)) if columns else x


def dropped(x: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """`x` with each number set to 0 with probability `share` and else divided by `1 - share`."""
    kept = torch.empty_like(x).uniform_(generator=generator).ge_(share)
    return kept.mul_(x).div_(1 - share)


def labelled_sides(
    x: Tensor, labels: Tensor, wrong: Tensor, num_classes: int, value: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`x` under its labels and under wrong ones, one behind the other in memory."""
    both = overlay_label(x.repeat(2, 1), torch.cat([labels, wrong]), num_classes, value)
    return both[: len(x)], both[len(x) :]


def hard_label(logits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each row a wrong label drawn from softmax(logits) with the right one left out; `[rows]`.

    The largest of `logit + Gumbel noise` is such a draw, whatever the logits' range.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
    return (logits + noise).scatter_(1, labels[:, None], -math.inf).argmax(1)
