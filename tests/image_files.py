"""Small data sets as the archives of CIFAR and SVHN hold them, written for tests."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TRAIN, TEST = 4, 3  # images in a file
CIFAR = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
ARCHIVES = {
    "cifar-10-batches-py": "cifar-10-python.tar.gz",
    "cifar-10-batches-bin": "cifar-10-binary.tar.gz",
    "cifar-100-python": "cifar-100-python.tar.gz",
    "cifar-100-binary": "cifar-100-binary.tar.gz",
}

Part = tuple[Tensor, Tensor, Tensor]  # images [N, 3072], coarse labels, labels


def cifar_parts(kind: str, seed: int = 0) -> dict[str, Part]:
    """What each file of a folder of CIFAR holds, the last of them test images."""
    generator = torch.Generator().manual_seed(seed)
    end = ".bin" * kind.endswith(("bin", "binary"))
    fine = 100 if "100" in kind else 10
    train = ["train"] if fine == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    test = "test" if fine == 100 else "test_batch"
    return {
        file + end: (
            torch.randint(256, (count, 3072), generator=generator, dtype=torch.uint8),
            torch.randint(20, (count,), generator=generator),
            torch.randint(fine, (count,), generator=generator),
        )
        for file, count in (*((file, TRAIN) for file in train), (test, TEST))
    }


def write_cifar(folder: Path, kind: str, parts: dict[str, Part]) -> Path:
    """The files of such a folder, in a folder of any name."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, part in parts.items():
        (folder / file).write_bytes(content_of(kind, part))
    return folder


def content_of(kind: str, part: Part) -> bytes:
    images, coarse, fine = part
    if kind.endswith(("bin", "binary")):
        labels = [coarse, fine] if "100" in kind else [fine]
        return bytes(torch.cat([*(label[:, None].to(torch.uint8) for label in labels), images], 1).flatten().tolist())
    held: dict[bytes, Any] = {b"batch_label": b"a batch", b"data": images}
    if "100" in kind:
        held |= {b"coarse_labels": coarse.tolist(), b"fine_labels": fine.tolist()}
    else:
        held[b"labels"] = fine.tolist()
    return python2_pickle(held)


def pack(folder: Path, archive: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, folder.name)
    return archive


def python2_pickle(value: Any) -> bytes:
    """What Python 2 writes by protocol 2: str is bytes; a uint8 tensor stands for an array of numpy 1."""
    return b"\x80\x02" + _item(value, iter(range(2**31))) + b"."


def _item(value: Any, places: Any) -> bytes:
    def put() -> bytes:
        place = next(places)
        return b"q" + bytes([place]) if place < 256 else b"r" + struct.pack("<I", place)

    def item(value: Any) -> bytes:
        return _item(value, places)

    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value + put()
    if isinstance(value, list):
        return b"]" + put() + b"(" + b"".join(map(item, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(item, value)) + b"t" + put()
    if isinstance(value, dict):
        return b"}" + put() + b"(" + b"".join(item(key) + item(held) for key, held in value.items()) + b"u"
    assert isinstance(value, Tensor)
    empty = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put() + item((0,)) + item(b"b")
    dtype = b"cnumpy\ndtype\n" + put() + item(b"u1") + b"K\0K\1\x87" + put() + b"R" + put()
    dtype += item((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    state = b"(K\1" + item(tuple(value.shape)) + dtype + b"\x89" + item(bytes(value.flatten().tolist())) + b"t"
    return empty + b"\x87" + put() + b"R" + put() + state + put() + b"b"


def python3_pickle(value: Any, protocol: int) -> bytes:
    """What Python 3 writes, with arrays of the numpy that is installed."""
    return pickle.dumps({k.decode(): v.numpy() if isinstance(v, Tensor) else v for k, v in value.items()}, protocol)


def tar_of(entries: dict[str, bytes]) -> bytes:
    """An archive with these files, not packed."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, held in entries.items():
            about = tarfile.TarInfo(name)
            about.size = len(held)
            tar.addfile(about, io.BytesIO(held))
    return content.getvalue()
