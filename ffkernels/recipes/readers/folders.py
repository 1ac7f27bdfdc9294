"""Images in class folders, train/CLASS/*.png and test/CLASS/*.png or .jpg, which pillow reads (`ffkernels[images]`)."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import Dataset, dataset
from .files import unreadable, what_is_in

SIDES = ("train", "test")
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_FORMATS = ("PNG", "JPEG")
_CHANNELS = {"L": 1, "RGB": 3}  # by pillow's name of a mode


def find(folder: Path) -> dict[Path, str]:
    return {folder: folder.resolve().name} if any(_classes(folder / side) for side in SIDES) else {}


def read(folder: Path, name: str) -> Dataset:
    """Classes are numbered in the order of their names in train.

    Images alternate between classes: the first thousands, all that some recipes train on, are of every class.
    """
    for side in SIDES:
        if not _classes(folder / side):
            raise FileNotFoundError(
                f"{folder / side}: no folder of images for each class; {folder} must hold both train and test; "
                f"{what_is_in(folder)}"
            )
    classes = [path.name for path in _classes(folder / "train")]
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'}: one class, {classes[0]}; at least 2 are needed")
    files = {side: _files(folder / side, classes) for side in SIDES}
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ModuleNotFoundError(
            f'{folder}: images are read by pillow, which is not installed: pip install "ffkernels[images]"', name="PIL"
        ) from error
    first = files["train"][0][0]
    channels, height, width = _pixels(first, pillow).shape
    shape = (channels, height, width)
    tensors = {}
    for side in SIDES:
        images = torch.empty(len(files[side]), *shape, dtype=torch.uint8)
        for image, (path, _) in zip(images, files[side], strict=True):
            image.copy_(_pixels(path, pillow, (first, shape)))
        tensors[f"{side}_images"] = images
        tensors[f"{side}_labels"] = torch.tensor([label for _, label in files[side]])
    return dataset(tensors, dict.fromkeys(tensors, folder), name, str(folder), len(classes), shape)


def _classes(side: Path) -> list[Path]:
    """The class folders in the order of their names; hidden ones are none."""
    if not side.is_dir():
        return []
    return sorted(path for path in side.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(side: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The images with their labels: the first of each class, then the second; other files are left out."""
    of_classes = []
    for folder in _classes(side):
        if folder.name not in classes:
            raise ValueError(f"{folder}: a class that {side.parent / 'train'} does not have: {', '.join(classes)}")
        paths = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
        if not paths:
            raise ValueError(f"{folder}: no images ({', '.join(sorted(_SUFFIXES))}); {what_is_in(folder)}")
        of_classes.append([(path, classes.index(folder.name)) for path in sorted(paths)])
    return [file for turn in itertools.zip_longest(*of_classes) for file in turn if file is not None]


def _pixels(path: Path, pillow: Any, like: tuple[Path, tuple[int, int, int]] | None = None) -> Tensor:
    """uint8 [channels, height, width], which must be those of `like`; nothing is decoded before they are."""
    try:
        with pillow.open(path, formats=_FORMATS) as image:
            if image.mode not in _CHANNELS:
                raise ValueError(f"an image of mode {image.mode}; grey ones (L) and RGB are read")
            shape = (_CHANNELS[image.mode], image.height, image.width)
            if like is not None and shape != like[1]:
                raise ValueError(f"{_words(shape)}, but {like[0]} is {_words(like[1])}")
            content = bytearray(image.tobytes())
    except Exception as error:  # pillow raises nearly anything for a damaged file
        raise unreadable(path, error) from error
    return torch.frombuffer(content, dtype=torch.uint8).view(*shape[1:], shape[0]).permute(2, 0, 1)


def _words(shape: tuple[int, int, int]) -> str:
    return f"{'grey' if shape[0] == 1 else 'RGB'}, {shape[2]} x {shape[1]} pixels"
