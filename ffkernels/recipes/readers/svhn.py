"""SVHN's cropped digits: train_32x32.mat and test_32x32.mat, files of MATLAB 5, which scipy reads (`ffkernels[svhn]`).

Each holds X, uint8 [height, width, channel, N], and y, [N, 1], in which 10 means the digit 0.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import Dataset, check_range, dataset
from .files import unreadable, what_is_in

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
SHAPE = (3, 32, 32)
_MOST_PACKED = 1032  # bytes that deflate makes one of, at most


def find(folder: Path) -> dict[Path, str]:
    return {folder: "svhn"} if any((folder / file).is_file() for file in FILES.values()) else {}


def read(folder: Path, name: str) -> Dataset:
    missing = [file for file in FILES.values() if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} of SVHN missing; {what_is_in(folder)}")
    try:
        matlab = importlib.import_module("scipy.io")
    except ImportError as error:
        raise ModuleNotFoundError(
            f'{folder}: SVHN is read by scipy, which is not installed: pip install "ffkernels[svhn]"', name="scipy"
        ) from error
    tensors = {}
    for side, file in FILES.items():
        tensors[f"{side}_images"], tensors[f"{side}_labels"] = _read(folder / file, matlab)
    return dataset(tensors, dict.fromkeys(tensors, folder), name, str(folder), shape=SHAPE)


def _read(path: Path, matlab: Any) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3072] and labels int64 [N]."""
    try:
        # What the headers announce, before any memory is taken for it.
        about = {variable: (shape, kind) for variable, shape, kind in matlab.whosmat(str(path))}
        _check(about, path.stat().st_size)
        held = matlab.loadmat(str(path), variable_names=list(about))
        images = torch.from_numpy(held["X"].transpose(3, 2, 0, 1)).contiguous().flatten(1)
        numbers = torch.from_numpy(held["y"]).flatten()
    except Exception as error:  # scipy raises nearly anything for a damaged file
        raise unreadable(path, error) from error
    labels = numbers.long()
    if not torch.equal(labels.to(numbers.dtype), numbers):
        raise ValueError(f"{path}: labels that are no whole numbers")
    check_range(labels, "labels", 11, path, start=1)
    return images, labels % 10


def _check(about: dict[str, tuple[tuple[int, ...], str]], size: int) -> None:
    """ValueError unless a file of `size` bytes holds X and y of the right shapes and types, and can."""
    missing = {"X", "y"} - set(about)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))} in it, but {', '.join(sorted(about)) or 'nothing'}")
    (shape, kind), (labels, number) = about["X"], about["y"]
    if len(shape) != 4 or shape[:3] != (32, 32, 3) or kind != "uint8" or not shape[3]:
        raise ValueError(f"X is {kind} {list(shape)}, not uint8 [32, 32, 3, N]")
    if labels != (shape[3], 1) or number not in ("uint8", "double"):
        raise ValueError(f"y is {number} {list(labels)}, but X holds {shape[3]} images")
    if 32 * 32 * 3 * shape[3] > _MOST_PACKED * size:
        raise ValueError(f"its header announces {shape[3]} images, which {size} bytes cannot hold")
