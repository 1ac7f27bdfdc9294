"""Trifecta's blocks as a trainer wants them: a step on labelled images, goodness and prediction under labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import StepResult
from ..integrations.trifecta import Block, should_detach
from .batches import views
from .catalogue import Recipe
from .data import Dataset

# Rows, of images times labels, that a prediction works on at once.
PREDICTION_ROWS = 1280


class OverlappedNetwork(nn.Module):
    """Blocks on images with one channel more, a learned map for each label; every other one has a loss in a step.

    Args:
        recipe: its convolutions are the blocks, its layers' rule an Adam for each of them.
        data: whose images it will see.
        compute_dtype: as in `ffkernels.conv2d_step_`.
    """

    def __init__(self, recipe: Recipe, data: Dataset, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        channels, height, width = data.shape
        self.embedding = nn.Embedding(data.num_classes, height * width)
        below: nn.Module = self.embedding
        blocks, channels = [], channels + 1
        for index, of in enumerate(recipe.convolutions):
            below = Block(
                channels, of.channels, index, below, height, recipe.layers.lr, 1, recipe.alpha, 0.0, True, True,
                of.pool > 1, compute_dtype=compute_dtype,
            )  # fmt: skip
            blocks.append(below)
            channels, height = of.channels, height // of.pool
        self.layers = nn.ModuleList(blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(cast("Sequence[Block]", self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def optimizers(self) -> list[Optimizer]:
        """One for each block, of its parameters and of those below it."""
        return [block.optimizer for block in self]

    def step(
        self, x: Tensor, labels: Tensor, wrong: Tensor, iteration: int, skip_below: float = 0.0
    ) -> list[StepResult | None]:
        """The `iteration`-th step, from 0, on images `[rows, channels, H, W]` under their labels and under wrong ones.

        Returns:
            For each block what `ffkernels.conv2d_step_` gives, but for `y`; None without a loss.
        """
        x = self._labelled(torch.cat([x, x]), torch.cat([labels, wrong]))
        results: list[StepResult | None] = []
        for block in self:
            has_loss = should_detach(True, block.index, iteration)
            if not has_loss and block.index == len(self) - 1:
                block.observe(x)
                results.append(None)
                break
            block.skip_below = skip_below
            x, judged = block.advance(x, has_loss)
            if judged is None:
                results.append(None)
                continue
            goodness = judged.goodness
            assert goodness is not None
            results.append(StepResult(None, goodness * x[0].numel(), goodness, judged.loss, len(labels), None))
        return results

    @torch.no_grad()
    def observe(self, x: Tensor, labels: Tensor, wrong: Tensor) -> None:
        """Moves the running statistics, and nothing else, by images as `step` takes them."""
        x = self._labelled(torch.cat([x, x]), torch.cat([labels, wrong]))
        for block in self:
            x, _ = block.advance(x, False)

    def _labelled(self, x: Tensor, labels: Tensor) -> Tensor:
        maps = self.embedding(labels).view(-1, 1, *x.shape[2:])
        return torch.cat([x, maps], 1).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def goodness(self, x: Tensor, labels: Tensor) -> Tensor:
        """Goodness `[rows, blocks]` of images under labels, by running statistics."""
        x = self._labelled(x, labels)
        found = []
        for block in self:
            x, goodness, *_ = block(x, None)
            found.append(goodness)
        return torch.stack(found, 1)

    def predict(
        self, x: Tensor, num_classes: int, layers: tuple[int, ...] | None = None, shift: int = 0, blank: float = 0.0
    ) -> Tensor:
        """For each image the label of the highest `scores`, summed over its `views`; `[rows]`."""
        of_views = [self.scores(view, num_classes, layers) for view in views(x, shift, blank)]
        return torch.stack(of_views).sum(0).argmax(1)

    @torch.no_grad()
    def scores(self, x: Tensor, num_classes: int, layers: tuple[int, ...] | None = None) -> Tensor:
        """`[rows, labels]`: each label's share of the goodness under all of them, summed over these blocks."""
        found = []
        for images in x.split(max(1, PREDICTION_ROWS // num_classes)):
            labels = torch.arange(num_classes, device=x.device).repeat(len(images))
            goodness = self.goodness(images.repeat_interleave(num_classes, 0), labels).view(-1, num_classes, len(self))
            chosen = goodness if layers is None else goodness[..., list(layers)]
            # A block that no label stirs tells them not apart.
            found.append((chosen / chosen.sum(1, keepdim=True).clamp_min(1e-30)).sum(2))
        return torch.cat(found)
