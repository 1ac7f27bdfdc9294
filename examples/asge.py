"""Goodness of channels and places, scored by a fixed random matrix: ASGE on MNIST, `python examples/asge.py`.

After Gong, Staszewski and Xu, "Adaptive Spatial Goodness Encoding", arXiv 2509.12394: each layer's maps are cut into
cells, the energies of all channels' cells times a random matrix that nobody trains are the logits of the classes, and
their cross-entropy trains the layer; root-mean-square pooling and a layer normalisation hand the maps on. Assumed here:
four by four cells whose energy is the mean square, a normal matrix, a prediction by the sum of all layers' logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ffkernels as ff
from ffkernels.recipes import Dataset, load

CELLS = 4


class SpatialGoodness(nn.Module):
    """Maps `[rows, channels, h, w]` to their loss; `logits` are `[rows, classes]`."""

    def __init__(self, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(channels * CELLS**2, classes))

    def logits(self, maps: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(maps.square(), CELLS).flatten(1) @ self.matrix

    def forward(self, maps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(maps), labels)


def network(goodness: list[SpatialGoodness], channels: tuple[int, ...], side: int = 28) -> ff.FFNetwork:
    modules: list[nn.Module] = []
    for of, inputs, outputs in zip(goodness, channels, channels[1:], strict=False):
        if modules:
            side //= 2
            # A norm over windows is their root mean square but for a factor, which the normalisation takes out.
            modules += [nn.LPPool2d(2, 2), nn.LayerNorm([inputs, side, side], elementwise_affine=False)]
        objective = ff.GivenLoss(of, reads="activities", classes=10)
        modules.append(ff.FFConv2d(inputs, outputs, 3, padding=1, objective=objective))
    return ff.FFNetwork(modules)


def train(data: Dataset, epochs: int = 2, batch: int = 100) -> float:
    """The test error."""
    images, test_images = (x.view(-1, 1, 28, 28) / 255 for x in (data.train_images, data.test_images))
    channels = (1, 16, 32)
    goodness = [SpatialGoodness(outputs) for outputs in channels[1:]]
    net, error = network(goodness, channels), 1.0
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            net.step(images[rows], None, optimizer, labels=data.train_labels[rows])
        guesses = []
        with torch.no_grad():
            for part in test_images.split(500):
                logits = [of.logits(y) for of, y in zip(goodness, net.activities(part), strict=True)]
                guesses.append(torch.stack(logits).sum(0).argmax(1))
        error = float((torch.cat(guesses) != data.test_labels).float().mean())
        print(f"epoch {epoch + 1}: test error {error:.2%}")
    return error


if __name__ == "__main__":
    torch.manual_seed(0)
    train(load("mnist"))
