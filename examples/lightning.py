"""A Lightning module that trains by Forward-Forward: `python examples/lightning.py`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import ffkernels as ff
from ffkernels.recipes import Dataset, load


class ForwardForward(LightningModule):
    """Manual optimization: each layer updates itself, so there is no `backward`."""

    def __init__(self, widths: tuple[int, ...] = (784, 500, 500), lr: float = 0.002) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        objective = ff.Objective(loss="swish", alpha=6.0)
        self.net = ff.FFNetwork([ff.FFLinear(*sizes, norm="rms", objective=objective) for sizes in pairwise(widths)])

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        x, labels = batch
        x_pos, x_neg = ff.overlay_label(x, labels), ff.overlay_label(x, ff.wrong_label(labels))
        optimizer: Any = self.optimizers()
        results = self.net.step(x_pos, x_neg, optimizer.optimizer)
        # Everything is updated by now. This finds no gradients, and lets Lightning count the step.
        optimizer.zero_grad()
        optimizer.step()
        self.log_dict({f"loss of layer {i}": result.loss for i, result in enumerate(results)})

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        x, labels = batch
        self.log("error", (self.net.predict(x) != labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def train(data: Dataset, **options: Any) -> float:
    """The test error; `options` are those of Lightning's trainer."""
    module = ForwardForward((data.train_images.shape[1], 500, 500))
    training = TensorDataset(data.train_images / 255, data.train_labels)
    test = DataLoader(TensorDataset(data.test_images / 255, data.test_labels), batch_size=1000)
    trainer = Trainer(accelerator="cpu", **options)
    trainer.fit(module, DataLoader(training, batch_size=100, shuffle=True), test)
    return float(trainer.validate(module, test)[0]["error"])


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"test error {train(load('mnist'), max_epochs=1):.2%}")
