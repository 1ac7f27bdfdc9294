"""Convolutions with class groups of channels, on CIFAR-10: `python examples/cifar.py [FOLDER OR ARCHIVE]`.

Without an argument it trains on small images made here, of which each class has a colour and a place.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import ffkernels as ff
from ffkernels.recipes import load

SIDE = 32
Images = tuple[torch.Tensor, torch.Tensor]  # and their labels


def made(count: int) -> Images:
    """Images `[count, 3, 32, 32]` of 0..1 and their labels."""
    labels = torch.randint(10, (count,))
    images = 0.5 * torch.rand(count, 3, SIDE, SIDE)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label % 3, 3 * label : 3 * label + 5, 4:28] += 0.5
    return images, labels


def from_folder(path: str) -> list[Images]:
    """CIFAR-10's training and test images, and their labels."""
    data = load(path)
    sides = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    return [(images.view(-1, 3, SIDE, SIDE) / 255, labels) for images, labels in sides]


def network(classes: int = 10) -> ff.FFNetwork:
    """Three convolutions and a linear layer, each of which learns which class its units stand for."""
    objective = ff.Objective(loss="cross_entropy", classes=classes)
    options = {"padding": 1, "objective": objective, "batch_norm": "behind"}
    return ff.FFNetwork(
        [
            ff.FFConv2d(3, 20, 3, pool=2, **options),
            ff.FFConv2d(20, 40, 3, pool=2, **options),
            ff.FFConv2d(40, 80, 3, pool=2, **options),
            nn.Flatten(),
            ff.FFLinear(80 * 4 * 4, 100, norm="rms", objective=objective, outputs="pre"),
        ]
    )


def train(training: Images, test: Images, epochs: int = 3, batch: int = 64) -> float:
    """The test error, by the class whose goodness is largest."""
    images = training[0].contiguous(memory_format=torch.channels_last)  # else it is copied so at every step
    net, error = network(), 1.0
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for epoch in range(epochs):
        net.train()
        for rows in torch.randperm(len(images)).split(batch):
            net.step(images[rows], None, optimizer, labels=training[1][rows])
        net.eval()
        guesses = torch.cat([net.predict(part) for part in test[0].split(256)])
        error = float((guesses != test[1]).float().mean())
        print(f"epoch {epoch + 1}: test error {error:.2%}")
    return error


if __name__ == "__main__":
    torch.manual_seed(0)
    train(*(from_folder(sys.argv[1]) if len(sys.argv) > 1 else [made(1000), made(200)]))
