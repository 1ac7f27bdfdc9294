"""Channels that learn which class they stand for, on MNIST: `python examples/channel_assignment.py`.

After "learnable channel-to-class assignment" (arXiv 2606.09928): a channel's goodness counts for the classes by a row
of a learned matrix under a softmax, with one term for decided rows and one for classes that share no channels. Assumed
here: the goodness is the mean square behind batch normalisation, as in CwC; the terms are the rows' mean entropy and
the mean square of the cosines between two columns, each weighed by 0.1; prediction is by the sum over layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ffkernels as ff
from ffkernels.recipes import Dataset, load


class Assignment(nn.Module):
    """Moments of `places` numbers of each channel to the loss; `logits` are `[rows, classes]`."""

    def __init__(self, channels: int, places: int, classes: int = 10) -> None:
        super().__init__()
        self.places = places
        self.matrix = nn.Parameter(torch.randn(channels, classes))

    def logits(self, second: torch.Tensor) -> torch.Tensor:
        return (second / self.places) @ self.matrix.softmax(1)

    def forward(self, moments: ff.Moments, labels: torch.Tensor) -> torch.Tensor:
        share = self.matrix.softmax(1)
        entropy = torch.special.entr(share).sum(1).mean()
        column = F.normalize(share, dim=0)
        shared = (column.t() @ column).fill_diagonal_(0).square().mean()
        return F.cross_entropy(self.logits(moments.second), labels) + 0.1 * entropy + 0.1 * shared


def train(data: Dataset, epochs: int = 2, batch: int = 100) -> tuple[float, list[torch.Tensor]]:
    """The test error, and the classes' shares in the channels of each layer."""
    images, test_images = (x.view(-1, 1, 28, 28) / 255 for x in (data.train_images, data.test_images))
    assignments = [Assignment(20, 14 * 14), Assignment(40, 7 * 7)]
    layers = [
        ff.FFConv2d(
            inputs, outputs, 3, padding=1, pool=2, batch_norm="behind",
            objective=ff.GivenLoss(of, reads="moments", classes=10),
        )
        for inputs, outputs, of in zip((1, 20), (20, 40), assignments, strict=True)
    ]  # fmt: skip
    net, error = ff.FFNetwork(layers), 1.0
    of_layers = torch.optim.Adam(net.parameters(), lr=0.01)
    of_assignments = torch.optim.Adam([of.matrix for of in assignments], lr=0.03)
    for epoch in range(epochs):
        net.train()
        for rows in torch.randperm(len(images)).split(batch):
            net.step(images[rows], None, of_layers, labels=data.train_labels[rows])  # and fills the matrices' .grad
            of_assignments.step()
            of_assignments.zero_grad()
        net.eval()
        guesses = []
        with torch.no_grad():
            for part in test_images.split(500):
                seconds = [y.square().sum((2, 3)) for y in net.activities(part)]
                logits = [of.logits(second) for of, second in zip(assignments, seconds, strict=True)]
                guesses.append(torch.stack(logits).sum(0).argmax(1))
        error = float((torch.cat(guesses) != data.test_labels).float().mean())
        print(f"epoch {epoch + 1}: test error {error:.2%}")
    return error, [of.matrix.detach().softmax(1) for of in assignments]


if __name__ == "__main__":
    torch.manual_seed(0)
    train(load("mnist"))
