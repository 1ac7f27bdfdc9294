"""A data set that is learnt in seconds: each class is a bright patch in a place of its own, on noise."""

import struct
from pathlib import Path

import torch
from torch import Tensor

from ffkernels.recipes.data import Dataset, load

SIDE = 28


def toy_data(train: int = 600, test: int = 200, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    parts = [part for count in (train, test) for part in _images(count, generator)]
    return Dataset(*parts, name="toy", source="made by tests/toy_data.py")


def mnist_or_toy() -> Dataset:
    """MNIST where a copy is on this machine, else enough toy data for fifty minibatches of 64."""
    try:
        return load("mnist")
    except FileNotFoundError:
        return toy_data(64 * 50, 10)


def _images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.randint(0, 120, (count, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 6 + 10 * (label // 5), 1 + 5 * (label % 5)
        image[top : top + 6, left : left + 5] += 100
    return images.flatten(1), labels


def write_idx(folder: Path, data: Dataset) -> Path:
    """The four IDX files of `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, prefix in (("train", "train"), ("test", "t10k")):
        images = getattr(data, f"{side}_images").view(-1, SIDE, SIDE)
        _write(folder / f"{prefix}-images-idx3-ubyte", images)
        _write(folder / f"{prefix}-labels-idx1-ubyte", getattr(data, f"{side}_labels").to(torch.uint8))
    return folder


def _write(path: Path, tensor: Tensor) -> None:
    header = struct.pack(f">4B{tensor.dim()}I", 0, 0, 8, tensor.dim(), *tensor.shape)
    path.write_bytes(header + bytes(tensor.flatten().tolist()))
