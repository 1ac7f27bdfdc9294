"""A loss of your own in a network, with something in it that learns: `python examples/own_loss.py`."""

from __future__ import annotations

import torch

import ffkernels as ff
from ffkernels.recipes import Dataset, load


class LearnedThreshold(torch.nn.Module):
    """A pair's difference in goodness counts, and a threshold that each layer finds for itself holds both in place."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor(start))

    def forward(self, goodness: torch.Tensor, is_positive: torch.Tensor) -> torch.Tensor:
        pos, neg = goodness[is_positive], goodness[~is_positive]
        difference = 6.0 * (neg - pos)
        pairs = difference * torch.sigmoid(difference)
        sides = torch.nn.functional.softplus(torch.cat([self.threshold - pos, neg - self.threshold]))
        return pairs.mean() + 0.1 * sides.mean()


def train(data: Dataset, epochs: int = 2, batch: int = 100) -> tuple[float, list[float]]:
    """The test error by goodness, and where the thresholds have come to."""
    images, test_images = data.train_images / 255, data.test_images / 255
    losses = [LearnedThreshold(0.5) for _ in range(2)]
    widths = (images.shape[1], 500, 500)
    net = ff.FFNetwork(
        [
            ff.FFLinear(inputs, units, norm="rms", objective=loss, outputs="pre")
            for inputs, units, loss in zip(widths, widths[1:], losses, strict=False)
        ]
    )
    of_layers = torch.optim.Adam([p for layer in net for p in (layer.weight, layer.bias)], lr=0.003)
    of_thresholds = torch.optim.Adam([loss.threshold for loss in losses], lr=0.003)
    error, thresholds = 1.0, [0.5, 0.5]
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            x, labels = images[rows], data.train_labels[rows]
            x_pos, x_neg = ff.overlay_label(x, labels), ff.overlay_label(x, ff.wrong_label(labels))
            net.step(x_pos, x_neg, of_layers)  # moves the layers, and fills the thresholds' .grad
            of_thresholds.step()
            of_thresholds.zero_grad()
        error = float((net.predict(test_images) != data.test_labels).float().mean())
        thresholds = [loss.threshold.item() for loss in losses]
        print(f"epoch {epoch + 1}: test error {error:.2%}, thresholds", *(f"{t:.3f}" for t in thresholds))
    return error, thresholds


if __name__ == "__main__":
    torch.manual_seed(0)
    train(load("mnist"))
