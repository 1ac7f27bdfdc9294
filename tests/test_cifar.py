"""CIFAR-10 and CIFAR-100: small files in the formats that people have, whole and damaged."""

from __future__ import annotations

import gzip
import pickle
import random
import struct
import tarfile
import tracemalloc
from typing import Any

import pytest
import torch

from ffkernels.recipes import data

from .image_files import (
    ARCHIVES,
    CIFAR,
    TEST,
    TRAIN,
    cifar_parts,
    content_of,
    pack,
    python2_pickle,
    python3_pickle,
    tar_of,
    write_cifar,
)


def assert_holds(dataset: data.Dataset, kind: str, parts: dict[str, Any], coarse: bool = False) -> None:
    *train, test = parts.values()
    label = 1 if coarse else 2
    assert torch.equal(dataset.train_images, torch.cat([part[0] for part in train]))
    assert torch.equal(dataset.train_labels, torch.cat([part[label] for part in train]))
    assert torch.equal(dataset.test_images, test[0])
    assert torch.equal(dataset.test_labels, test[label])
    assert (dataset.train_images.dtype, dataset.test_labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.shape == (3, 32, 32)
    assert dataset.num_classes == (20 if coarse else 100 if "100" in kind else 10)
    assert dataset.name == ("cifar-100" if "100" in kind else "cifar-10") + "-coarse" * coarse


@pytest.mark.parametrize("kind", CIFAR)
def test_cifar_as_people_have_it(tmp_path, kind):
    parts = cifar_parts(kind)
    folder = write_cifar(tmp_path / "a" / kind, kind, parts)
    renamed = write_cifar(tmp_path / "b" / "renamed", kind, parts)
    (tmp_path / "c").mkdir()
    packed = pack(folder, tmp_path / "c" / ARCHIVES[kind])
    plain = pack(folder, tmp_path / "plain.tar", "w")
    unpacked_too = write_cifar(tmp_path / "d" / kind, kind, parts)
    (tmp_path / "d" / ARCHIVES[kind]).write_bytes(b"never looked at where it has been unpacked")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    wanted = {
        folder: folder,
        folder.parent: folder,
        renamed: renamed,
        packed: packed,
        packed.parent: packed,
        plain: plain,
        unpacked_too.parent: unpacked_too,
    }
    for given, source in wanted.items():
        dataset = data.load(given)
        assert_holds(dataset, kind, parts)
        assert dataset.source == str(source)
        if "100" in kind:
            assert_holds(data.load(str(given), coarse=True), kind, parts, coarse=True)
        else:
            with pytest.raises(ValueError, match="has no coarse labels, CIFAR-100 has"):
                data.load(given, coarse=True)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_python_2s_pickles_are_what_pickle_and_numpy_read():
    """The writer of these tests writes what numpy wrote."""
    numpy = pytest.importorskip("numpy")
    images = torch.arange(300, dtype=torch.uint8).view(3, 100)
    held = pickle.loads(python2_pickle({b"data": images, b"labels": [1, 300]}), encoding="bytes")
    assert numpy.array_equal(held[b"data"], images.numpy()) and held[b"labels"] == [1, 300]


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("by_columns", [False, True])
def test_pickles_written_anew_by_python_3(tmp_path, protocol, by_columns):
    pytest.importorskip("numpy")
    kind = "cifar-100-python"
    parts = cifar_parts(kind)
    folder = write_cifar(tmp_path / kind, kind, parts)
    images, coarse, fine = parts["train"]
    images = images.t().contiguous().t() if by_columns else images
    held = {b"data": images, b"coarse_labels": coarse.tolist(), b"fine_labels": fine.tolist()}
    (folder / "train").write_bytes(python3_pickle(held, protocol))
    assert_holds(data.load(folder), kind, parts)


def test_a_pickle_runs_nothing(tmp_path):
    """Whatever it names is refused before it is called, and nothing of numpy is there to be misused."""
    (tmp_path / "touched").mkdir()
    target = tmp_path / "touched" / "it"
    folder = write_cifar(tmp_path / "cifar-100-python", "cifar-100-python", cifar_parts("cifar-100-python"))
    evil = {
        "posix.system": b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(target),
        "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01a\x85R.",
        "numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
        "os.system": b"(S'touch %s'\nios\nsystem\n." % bytes(target),
        "persistent": b"P1\n.",
        # sets attributes of what is called, were it not refused
        "__setstate__": b"cnumpy\ndtype\nN}U\x08__init__K\x01s\x86b.",
    }
    for found, content in evil.items():
        (folder / "train").write_bytes(content)
        with pytest.raises(ValueError, match=rf"cifar-100-python/train: no pickle of CIFAR .*{found}"):
            data.load(folder)
    assert not target.exists()


def test_a_pickle_takes_no_more_memory_than_it_has_bytes(tmp_path):
    folder = write_cifar(tmp_path / "cifar-100-python", "cifar-100-python", cifar_parts("cifar-100-python"))
    bombs = [
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        b"}p4294967295\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"ab.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b"ab.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**36) + b"}.",
        b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"ab.",
    ]
    for content in bombs:
        (folder / "test").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match="cifar-100-python/test: no pickle of CIFAR"):
            data.load(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20


@pytest.mark.parametrize("kind", CIFAR)
def test_flipped_bytes_are_other_pixels_or_a_named_error(tmp_path, kind):
    """A damage between pixels cannot be told from them; any other is an error of the file."""
    parts = cifar_parts(kind)
    folder = write_cifar(tmp_path / kind, kind, parts)
    path = folder / next(iter(parts))
    whole = path.read_bytes()
    random_ = random.Random(0)
    ends = [*range(120), *range(len(whole) - 120, len(whole))]
    for at in random_.sample(ends, 60) + random_.choices(range(len(whole)), k=10):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << random_.randrange(8))]) + whole[at + 1 :])
        named = None
        try:
            data.load(folder)
        except ValueError as error:
            named = str(error)
        assert named is None or str(path) in named
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=str(path)):
            data.load(folder)


def changed(kind: str, **fields: Any) -> bytes:
    """A batch with other entries; None leaves one out."""
    part = cifar_parts(kind)[{"cifar-100-python": "train", "cifar-10-batches-py": "data_batch_2"}[kind]]
    held = {b"data": part[0], b"coarse_labels": part[1].tolist(), b"fine_labels": part[2].tolist()}
    if kind == "cifar-10-batches-py":
        held = {b"data": part[0], b"labels": part[2].tolist()}
    held |= {key.encode(): value for key, value in fields.items()}
    return python2_pickle({key: value for key, value in held.items() if value is not None})


@pytest.mark.parametrize(
    ("kind", "content", "found"),
    [
        ("cifar-10-batches-py", lambda: b"", "is empty"),
        ("cifar-10-batches-py", lambda: b"<html>", "no pickle of CIFAR .*starts with 3c68746d"),
        ("cifar-10-batches-py", lambda: python2_pickle([1, 2]), "no pickle of CIFAR"),
        (
            "cifar-10-batches-py",
            lambda: changed("cifar-10-batches-py", labels=None),
            "no 'labels' in it; it holds data",
        ),
        ("cifar-10-batches-py", lambda: changed("cifar-10-batches-py", data=None), "no 'data' in it; it holds labels"),
        ("cifar-10-batches-py", lambda: changed("cifar-10-batches-py", data=[1]), "cannot be read"),
        ("cifar-10-batches-py", lambda: changed("cifar-10-batches-py", labels=[1, 2, 3]), "3 labels, but 4 images"),
        (
            "cifar-10-batches-py",
            lambda: changed("cifar-10-batches-py", labels=[1, 2, 10, 3]),
            r"labels must lie in 0\.\.9; found 10",
        ),
        ("cifar-10-batches-py", lambda: changed("cifar-10-batches-py", labels=[1, 2, -1, 3]), "found -1"),
        ("cifar-10-batches-py", lambda: changed("cifar-10-batches-py", labels=[1, 2, b"3", 3]), "no list of whole"),
        ("cifar-10-batches-py", lambda: changed("cifar-10-batches-py", labels=[True] * 4), "no list of whole"),
        (
            "cifar-10-batches-py",
            lambda: changed("cifar-10-batches-py", data=torch.zeros(4, 784, dtype=torch.uint8)),
            r"images \[4, 784\], not \[N, 3072\]",
        ),
        (
            "cifar-10-batches-py",
            lambda: changed("cifar-10-batches-py").replace(b"u1", b"i4"),
            r"an array of b'i4', not of bytes",
        ),
        (
            "cifar-10-batches-py",
            lambda: changed("cifar-10-batches-py").replace(b"J\0\x0c\0\0", b"J\1\x0c\0\0"),
            r"an array of shape \[4, 3073\], but of 12288 bytes",
        ),
        (
            "cifar-10-batches-py",
            lambda: changed("cifar-10-batches-py", data=torch.zeros(3, 3072, dtype=torch.uint8), labels=[1, 2, 3]),
            "3 images, but another file of the training images has 4",
        ),
        (
            "cifar-100-python",
            lambda: changed("cifar-100-python", coarse_labels=[20, 1, 2, 3]),
            r"coarse labels must lie in 0\.\.19; found 20",
        ),
        ("cifar-100-python", lambda: changed("cifar-100-python", fine_labels=[1, 2, 100, 3]), r"in 0\.\.99; found 100"),
        ("cifar-10-batches-bin", lambda: b"", "is empty"),
        ("cifar-10-batches-bin", lambda: bytes(3072), "3072 bytes, no whole number of images of 3073"),
        ("cifar-10-batches-bin", lambda: bytes(3 * 3073), "3 images, but another file of the training images has 4"),
        ("cifar-10-batches-bin", lambda: b"\x0a" + bytes(4 * 3073 - 1), r"labels must lie in 0\.\.9; found 10"),
        ("cifar-100-binary", lambda: bytes(4 * 3073), "12292 bytes, no whole number of images of 3074"),
        ("cifar-100-binary", lambda: b"\x14" + bytes(3073), r"coarse labels must lie in 0\.\.19; found 20"),
        ("cifar-100-binary", lambda: b"\0\x64" + bytes(3072), r"fine labels must lie in 0\.\.99; found 100"),
    ],
)
def test_a_damaged_batch_is_named_in_a_folder_and_in_an_archive(tmp_path, kind, content, found):
    folder = write_cifar(tmp_path / kind, kind, cifar_parts(kind))
    file = list(cifar_parts(kind))[1 if "10-" in kind else 0]
    (folder / file).write_bytes(content())
    archive = pack(folder, tmp_path / "cifar.tgz")
    for given, named in ((folder, f"{folder}/{file}"), (archive, f"{archive}, {kind}/{file}")):
        with pytest.raises(ValueError, match=found) as caught:
            data.load(given)
        if "another file" in found:
            named = str(given)
        assert named in str(caught.value)


def test_cifar_10_says_how_many_images_a_file_holds(tmp_path):
    kind = "cifar-10-batches-py"
    folder = write_cifar(tmp_path / kind, kind, cifar_parts(kind))
    meta = folder / "batches.meta"
    meta.write_bytes(python2_pickle({b"num_cases_per_batch": TRAIN, b"label_names": [b"airplane"]}))
    for given in (folder, pack(folder, tmp_path / "whole.tar.gz")):
        with pytest.raises(ValueError, match=rf"test_batch: {TEST} images, but batches\.meta announces {TRAIN}"):
            data.load(given)
    test = {"test_batch": cifar_parts(kind, 1)["data_batch_1"]}
    write_cifar(folder, kind, test)
    assert_holds(data.load(folder), kind, {**cifar_parts(kind), **test})
    meta.write_bytes(python2_pickle({b"label_names": [b"airplane"]}))
    with pytest.raises(ValueError, match=r"batches\.meta: num_cases_per_batch is None, not a number of images"):
        data.load(folder)


@pytest.mark.parametrize("kind", CIFAR)
def test_missing_batches_are_named(tmp_path, kind):
    folder = write_cifar(tmp_path / kind, kind, cifar_parts(kind))
    missing = list(cifar_parts(kind))[-2]
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{kind}: {missing} of cifar-10.* missing; it holds .*test"):
        data.load(folder)
    archive = pack(folder, tmp_path / "cut.tar.gz")
    with pytest.raises(ValueError, match=rf"cut\.tar\.gz: {missing} missing in the archive.* it holds {kind}/"):
        data.load(archive)


def test_damaged_archives(tmp_path):
    kind = "cifar-10-batches-bin"
    parts = cifar_parts(kind)
    files = {f"./{kind}/{file}": content_of(kind, part) for file, part in parts.items()}
    whole = tar_of(files)
    packed = gzip.compress(whole)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(packed)
    assert_holds(data.load(tmp_path), kind, parts)
    announced = tarfile.TarInfo(f"{kind}/test_batch.bin")
    announced.size = 10 * 2**30
    damages = {
        "damaged gzip file": packed[:-2000],
        "damaged gzip file .*CRC": packed[:-8] + bytes(4) + packed[-4:],
        "no whole tar archive": b"",
        "no whole tar archive ": b"<html>",
        "unexpected end of data": gzip.compress(whole[: 512 * 20]),
        "missing in the archive, which may be cut short": gzip.compress(whole[: 512 * 26]),
        "more follows behind the end": gzip.compress(whole + bytes(64 << 20), 1),
        "10737418240 bytes, more than any file of CIFAR has": announced.tobuf() + bytes(4096),
        "no folder cifar-10-batches-py, .*it holds a, b/c$": tar_of({"a": b"a", "b/c": b"c"}),
        r"no folder cifar-10-batches-py, .*it is empty": tar_of({}),
        "a second data set": tar_of({**files, "cifar-100-binary/train.bin": bytes(3074)}),
    }
    for found, content in damages.items():
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=found) as caught:
            data.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(path) in str(caught.value)
        assert peak < 8 << 20
