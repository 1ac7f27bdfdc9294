"""Goodness as nearness to the centroid of a class, on MNIST: `python examples/distance_forward.py`.

After Wu et al., "Distance-Forward Learning", arXiv 2408.14925: a layer brings the activities of a row near the centroid
of its class and, by a margin, away from those of the others, under an N-pair loss of goodness. Assumed here: the
goodness of a class is minus the squared distance of directions, times ten; centroids are running means, without a
gradient; the loss is `log(1 + sum over the others of exp(g_other - g_own + margin))`. Each layer learns alone: the
paper's updates of two layers at once are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ffkernels as ff
from ffkernels.recipes import Dataset, load


class Centroids(nn.Module):
    """Activities `[rows, units]` to their loss; `goodness` is `[rows, classes]`."""

    def __init__(self, units: int, classes: int = 10, margin: float = 1.0, momentum: float = 0.1) -> None:
        super().__init__()
        self.margin, self.momentum = margin, momentum
        self.register_buffer("centroids", torch.zeros(classes, units))

    def goodness(self, y: torch.Tensor) -> torch.Tensor:
        return -10 * (F.normalize(y, dim=1)[:, None] - self.centroids).square().sum(2)

    def forward(self, y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = F.one_hot(labels, len(self.centroids)).to(y.dtype)
        with torch.no_grad():
            count = own.sum(0)[:, None]
            mean = own.t() @ F.normalize(y, dim=1) / count.clamp(min=1)
            self.centroids += self.momentum * (count > 0) * (mean - self.centroids)
        goodness = self.goodness(y)
        apart = goodness - goodness.gather(1, labels[:, None]) + self.margin * (1 - own)
        return torch.logsumexp(apart, 1).mean()  # the own class adds exp(0)


def train(data: Dataset, epochs: int = 2, batch: int = 100) -> float:
    """The test error, by the sum of all layers' goodness."""
    images, test_images = data.train_images / 255, data.test_images / 255
    widths = (images.shape[1], 500, 500)
    losses = [Centroids(units) for units in widths[1:]]
    net = ff.FFNetwork(
        [
            ff.FFLinear(
                inputs, units, norm="rms", outputs="pre", objective=ff.GivenLoss(of, reads="activities", classes=10)
            )
            for inputs, units, of in zip(widths, widths[1:], losses, strict=False)
        ]
    )
    optimizer, error = torch.optim.Adam(net.parameters(), lr=0.001), 1.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            net.step(images[rows], None, optimizer, labels=data.train_labels[rows])
        with torch.no_grad():
            goodness = [of.goodness(y) for of, y in zip(losses, net.activities(test_images), strict=True)]
        error = float((torch.stack(goodness).sum(0).argmax(1) != data.test_labels).float().mean())
        print(f"epoch {epoch + 1}: test error {error:.2%}")
    return error


if __name__ == "__main__":
    torch.manual_seed(0)
    train(load("mnist"))
