"""The record that every reader gives, and what holds for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_CLASSES = 10
SIDE = 28  # pixels, MNIST's


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, channels * height * width] with values 0..255, labels int64 [N] in 0..num_classes-1; on the CPU.

    `images.view(-1, *shape)` are the images as a convolution takes them.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str
    source: str  # the folder or archive it was read from
    num_classes: int = NUM_CLASSES
    shape: tuple[int, int, int] = (1, SIDE, SIDE)  # channels, height, width


def dataset(
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, object],
    name: str,
    source: str,
    num_classes: int = NUM_CLASSES,
    shape: tuple[int, int, int] = (1, SIDE, SIDE),
) -> Dataset:
    """The four tensors as a Dataset, once pixels and labels are in their range; ValueError names what is wrong."""
    for part, tensor in tensors.items():
        what, end = ("labels", num_classes) if part.endswith("labels") else ("pixels", 256)
        check_range(tensor, what, end, sources[part])
    return Dataset(
        tensors["train_images"].to(torch.uint8).flatten(1),
        tensors["train_labels"].long(),
        tensors["test_images"].to(torch.uint8).flatten(1),
        tensors["test_labels"].long(),
        name,
        source,
        num_classes,
        shape,
    )


def check_range(tensor: Tensor, what: str, end: int, source: object, start: int = 0) -> None:
    """ValueError unless all values, of which there is at least one, lie in start..end-1."""
    low, high = (bound.item() for bound in tensor.aminmax())
    if low < start or high >= end:
        raise ValueError(f"{source}: {what} must lie in {start}..{end - 1}; found {low if low < start else high}")
