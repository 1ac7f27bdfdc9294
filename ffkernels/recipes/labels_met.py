"""Hard negatives without a pass of their own: of the wrong labels that an image has had, the one it took best."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Of the negatives; the others are drawn, so that labels not met yet are.
SHARE = 0.5


class LabelsMet(nn.Module):
    """For each training image and label what the goodness under that lacked to the goodness under the right one.

    Args:
        images: how many there are.
        classes: how many labels.
        device: where the images are.
    """

    lacked: Tensor

    def __init__(self, images: int, classes: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("lacked", torch.full((images, classes), math.inf, device=device))

    def hardest(self, images: Tensor, drawn: Tensor, generator: torch.Generator) -> Tensor:
        """`drawn` wrong labels `[rows]`, a half of them replaced by those that lacked least when last met.

        Args:
            images: which of them these rows are.
        """
        lacked, label = self.lacked[images].min(1)
        replaced = torch.rand(len(images), generator=generator, device=images.device) < SHARE
        return torch.where(replaced & lacked.isfinite(), label, drawn)

    def add(self, images: Tensor, wrong: Tensor, goodness_pos: Tensor, goodness_neg: Tensor) -> None:
        """Keeps what a step has found, each `[rows]`."""
        self.lacked[images, wrong] = (goodness_pos - goodness_neg).float()
