"""CIFAR-10 and CIFAR-100: the "python" and "binary" archives, packed or unpacked.

A record of the binary files is the label (CIFAR-100: the coarse one, the fine one) and 3072 pixels: red, green, blue.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from . import pickles
from .dataset import Dataset, check_range, dataset
from .files import CHUNK, holds, opened, read_up_to, unreadable, what_is_in

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
_MOST = 1 << 28  # bytes; the largest file of any, the 50,000 images of CIFAR-100, has 155 million
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_COARSE, _FINE = ("coarse_labels", 20), ("fine_labels", 100)


@dataclass(frozen=True)
class _Layout:
    name: str
    archive: str
    train: tuple[str, ...]
    test: str
    labels: tuple[tuple[str, int], ...]  # of an image, in their order: key in a pickle, number of classes
    about: str | None = None  # a pickle that says how many images a file holds

    @property
    def pickled(self) -> bool:
        return "python" in self.archive

    @property
    def files(self) -> tuple[str, ...]:
        return *self.train, self.test


_LAYOUTS = {  # by the name of the folder in the archive
    "cifar-10-batches-py": _Layout(
        "cifar-10",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        (("labels", 10),),
        "batches.meta",
    ),
    "cifar-10-batches-bin": _Layout(
        "cifar-10",
        "cifar-10-binary.tar.gz",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        (("labels", 10),),
    ),
    "cifar-100-python": _Layout("cifar-100", "cifar-100-python.tar.gz", ("train",), "test", (_COARSE, _FINE)),
    "cifar-100-binary": _Layout("cifar-100", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", (_COARSE, _FINE)),
}

Batch = tuple[Tensor, list[Tensor]]  # images uint8 [N, 3072], labels int64 [N] of each kind


def find(folder: Path) -> dict[Path, str]:
    """The folder itself, or what is in it under the name that the archive gives; an archive only if it is packed."""
    if (layout := _layout_of(folder)) is not None:
        return {folder: layout.name}
    found = {}
    for name, layout in _LAYOUTS.items():
        if _layout_of(folder / name) is not None:
            found[folder / name] = layout.name
        elif (folder / layout.archive).is_file():
            found[folder / layout.archive] = layout.name
    return found


def is_archive(path: Path) -> bool:
    return path.name.endswith(_ARCHIVES) or tarfile.is_tarfile(path)


def read(place: Path, name: str, coarse: bool = False) -> Dataset:
    """The data set in a folder or in an archive, with CIFAR-100's fine labels or its 20 coarse ones."""
    layout, batches = _read_archive(place) if place.is_file() else _read_folder(place)
    if coarse and len(layout.labels) == 1:
        raise ValueError(f"{place}: {layout.name} has no coarse labels, CIFAR-100 has")
    kind = 0 if coarse else -1
    tensors = {}
    for side, files in (("train", layout.train), ("test", (layout.test,))):
        tensors[f"{side}_images"] = torch.cat([batches[file][0] for file in files])
        tensors[f"{side}_labels"] = torch.cat([batches[file][1][kind] for file in files])
    called = layout.name + "-coarse" * coarse
    return dataset(tensors, dict.fromkeys(tensors, place), called, str(place), layout.labels[kind][1], SHAPE)


def _layout_of(folder: Path) -> _Layout | None:
    """By the folder's name, or by the names of the files where it was given another."""
    named = [layout for name, layout in _LAYOUTS.items() if name == folder.name]
    for layout in [*named, *_LAYOUTS.values()]:
        if any((folder / file).is_file() for file in layout.files):
            return layout
    return None


def _read_folder(folder: Path) -> tuple[_Layout, dict[str, Batch]]:
    layout = _layout_of(folder)
    assert layout is not None
    missing = [file for file in layout.files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} of {layout.name} missing; {what_is_in(folder)}")
    batches, count = {}, None
    for file in (*layout.files, layout.about):
        if file is None or not (folder / file).is_file():
            continue
        path = folder / file
        with path.open("rb") as opened_file:
            content = _content(opened_file, path.stat().st_size, path)
        if file == layout.about:
            count = _images_in_a_file(content, path)
        else:
            batches[file] = _batch(content, layout, path)
    _check_counts({folder / file: batches[file] for file in layout.files}, count, layout)
    return layout, batches


def _read_archive(path: Path) -> tuple[_Layout, dict[str, Batch]]:
    """All in one pass, in the order of the archive: unpacking it is most of the work."""
    layout, batches, count, seen = None, {}, None, []
    with _members(path) as members:
        for name, size, file in members:
            seen.append(name)
            inside = PurePosixPath(name)
            place = f"{path}, {name}"
            if (found := _LAYOUTS.get(inside.parent.name)) is None or inside.name not in (*found.files, found.about):
                continue
            if layout not in (None, found):
                raise ValueError(f"{place}: a second data set; CIFAR's archives hold one")
            layout = found
            content = _content(file, size, place)
            if inside.name == layout.about:
                count = _images_in_a_file(content, place)
            else:
                batches[inside.name] = _batch(content, layout, place)
    if layout is None:
        folders = ", ".join(_LAYOUTS)
        raise ValueError(f"{path}: no folder {folders} with CIFAR's files in it; {holds(seen)}")
    missing = [file for file in layout.files if file not in batches]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing in the archive, which may be cut short; {holds(seen)}")
    _check_counts({f"{path}, {file}": batches[file] for file in layout.files}, count, layout)
    return layout, batches


@contextmanager
def _members(path: Path) -> Iterator[Iterator[tuple[str, int, Any]]]:
    """Name, size and content of the files in an archive; ValueError for one that is damaged where it is read."""
    with opened(path) as (content, _):
        try:
            with tarfile.open(fileobj=content, mode="r|") as archive:
                yield ((member.name, member.size, archive.extractfile(member)) for member in archive if member.isfile())
        except tarfile.TarError as error:
            raise ValueError(f"{path}: no whole tar archive ({error})") from error
        # The end also meets the checksum of a packed archive.
        if len(read_up_to(content, CHUNK)) == CHUNK:
            raise ValueError(f"{path}: more follows behind the end of the archive")


def _content(file: Any, size: int, source: object) -> bytearray:
    """The bytes of a file that announces its size."""
    if size > _MOST:
        raise ValueError(f"{source}: {size} bytes, more than any file of CIFAR has")
    content = read_up_to(file, size)
    if len(content) < size:
        raise ValueError(f"{source}: {size} bytes are announced, but {len(content)} follow")
    if not content:
        raise ValueError(f"{source}: is empty")
    return content


def _batch(content: bytearray, layout: _Layout, source: object) -> Batch:
    images, labels = (_pickled if layout.pickled else _binary)(content, layout, source)
    for of_kind, (what, classes) in zip(labels, layout.labels, strict=True):
        check_range(of_kind, what.replace("_", " "), classes, source)
    return images, labels


def _binary(content: bytearray, layout: _Layout, source: object) -> Batch:
    kinds = len(layout.labels)
    record = kinds + PIXELS
    if len(content) % record:
        raise ValueError(f"{source}: {len(content)} bytes, no whole number of images of {record}")
    rows = torch.frombuffer(content, dtype=torch.uint8).view(-1, record)
    return rows[:, kinds:].contiguous(), [rows[:, kind].long() for kind in range(kinds)]


def _pickled(content: bytearray, layout: _Layout, source: object) -> Batch:
    held = _dictionary(content, source)
    try:
        images = held["data"].tensor()
        labels = [_whole_numbers(held[key]) for key, _ in layout.labels]
    except KeyError as error:
        raise ValueError(f"{source}: no {error} in it; {holds(sorted(map(str, held)))}") from error
    except Exception as error:  # what stands under a key may be anything
        raise unreadable(source, error) from error
    if images.dim() != 2 or images.shape[1] != PIXELS:
        raise ValueError(f"{source}: images {list(images.shape)}, not [N, {PIXELS}]")
    for (key, _), of_kind in zip(layout.labels, labels, strict=True):
        if len(of_kind) != len(images):
            raise ValueError(f"{source}: {len(of_kind)} {key}, but {len(images)} images")
    return images, labels


def _whole_numbers(values: Any) -> Tensor:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("labels that are no list of whole numbers")
    return torch.tensor(values, dtype=torch.int64)


def _images_in_a_file(content: bytearray, source: object) -> int:
    count = _dictionary(content, source).get("num_cases_per_batch")
    if type(count) is not int:
        raise ValueError(f"{source}: num_cases_per_batch is {count!r}, not a number of images")
    return count


def _dictionary(content: bytearray, source: object) -> dict[Any, Any]:
    """What a pickle holds; its keys as str, which Python 2 wrote as bytes."""
    try:
        held = pickles.load(bytes(content))
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in held.items()}
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{source}: no pickle of CIFAR ({type(error).__name__}: {error}); starts with {content[:8].hex()}"
        ) from error


def _check_counts(batches: dict[Any, Batch], count: int | None, layout: _Layout) -> None:
    """ValueError unless the files of the training images hold equally many, all that `count` announces.

    Nothing in a binary file says how many images it has: of one that is cut short between two, this alone tells.
    """
    train = dict(list(batches.items())[: len(layout.train)])
    counted = batches if count is not None else train
    wanted = count if count is not None else max(len(images) for images, _ in train.values())
    for source, (images, _) in counted.items():
        if len(images) != wanted:
            says = f"{layout.about} announces" if count is not None else "another file of the training images has"
            raise ValueError(f"{source}: {len(images)} images, but {says} {wanted}")
