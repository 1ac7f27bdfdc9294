"""A Forward-Forward network on MNIST, with hard negatives: `python examples/mnist.py [EPOCHS]`."""

from __future__ import annotations

import sys

import torch

import ffkernels as ff
from ffkernels.recipes import Dataset, load


def train(data: Dataset, epochs: int = 3, batch: int = 100) -> float:
    """The test error by goodness after so many epochs."""
    images, test_images = data.train_images / 255, data.test_images / 255
    pixels, classes = images.shape[1], data.num_classes
    objective = ff.Objective(loss="swish", alpha=6.0)
    options = {"norm": "rms", "objective": objective, "outputs": "pre"}
    net = ff.FFNetwork([ff.FFLinear(pixels, 500, **options), ff.FFLinear(500, 500, **options)])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    # What it falls for is the network's hardest negative; a linear classifier on its features says which label that is.
    classifier = torch.nn.Linear(500, classes, bias=False)
    of_classifier = torch.optim.Adam(classifier.parameters(), lr=0.001)

    error = 1.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            x, labels = images[rows], data.train_labels[rows]
            logits = classifier(net.features(x, num_classes=classes))
            wrong = hard_labels(logits.detach(), labels)
            x_pos, x_neg = ff.overlay_label(x, labels, classes), ff.overlay_label(x, wrong, classes)
            net.step(x_pos, x_neg, optimizer)
            of_classifier.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            of_classifier.step()
        error = float((net.predict(test_images, num_classes=classes) != data.test_labels).float().mean())
        print(f"epoch {epoch + 1}: test error {error:.2%}")
    return error


def hard_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A wrong label for each row, drawn by how much the classifier believes it."""
    shares = logits.softmax(1) + 1e-9
    return torch.multinomial(shares.scatter(1, labels[:, None], 0.0), 1).flatten()


if __name__ == "__main__":
    torch.manual_seed(0)
    train(load("mnist"), int(sys.argv[1]) if len(sys.argv) > 1 else 3)
