"""Which data set is where; SVHN, class folders, crops and flips, and training on images of other shapes."""

from __future__ import annotations

import itertools
import math
import random
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffkernels import cli
from ffkernels.recipes import RECIPES, Trainer, batches, data, picture

from .image_files import cifar_parts, write_cifar


def test_what_is_in_a_folder_decides(tmp_path):
    for kind in ("cifar-10-batches-py", "cifar-100-binary"):
        write_cifar(tmp_path / "sets" / kind, kind, cifar_parts(kind))
    with pytest.raises(
        ValueError, match=r"more than one data set, name one of .*cifar-10-batches-py, .*cifar-100-binary"
    ):
        data.load(tmp_path / "sets")
    with pytest.raises(FileNotFoundError, match=r"no CIFAR or SVHN in it, .*it holds sets/; pass .*/sets, where there"):
        data.load(tmp_path)
    (tmp_path / "a.tar.gzip").write_bytes(b"no archive")
    with pytest.raises(FileNotFoundError, match=r"a file, where a name .* or an archive of CIFAR is wanted"):
        data.load(tmp_path / "a.tar.gzip")
    with pytest.raises(ValueError, match="mnist: has no coarse labels"):
        data.load("mnist", coarse=True)


def svhn(folder: Path, **changes: Any) -> Path:
    """Both files of SVHN; entries of `train_32x32.mat` may be others, or left out by None."""
    scipy_io, numpy = pytest.importorskip("scipy.io"), pytest.importorskip("numpy")
    folder.mkdir(parents=True, exist_ok=True)
    for file, count, seed in (("train_32x32.mat", 11, 0), ("test_32x32.mat", 4, 1)):
        draw = numpy.random.default_rng(seed)
        held = {
            "X": draw.integers(0, 256, (32, 32, 3, count), dtype=numpy.uint8),
            "y": (numpy.arange(count, dtype=numpy.uint8) % 10 + 1)[:, None],
        }
        if file.startswith("train"):
            held |= {key: value(numpy) if callable(value) else value for key, value in changes.items()}
        held = {key: value for key, value in held.items() if value is not None}
        scipy_io.savemat(folder / file, held, do_compression=True)
    return folder


def test_svhn(tmp_path):
    folder = svhn(tmp_path / "SVHN")
    for given in (folder, svhn(tmp_path / "doubles", y=lambda numpy: (numpy.arange(11.0) % 10 + 1)[:, None])):
        dataset = data.load(given)
        numpy = pytest.importorskip("numpy")
        pixels = numpy.random.default_rng(0).integers(0, 256, (32, 32, 3, 11), dtype=numpy.uint8)
        images = dataset.train_images.view(-1, *dataset.shape)
        for n, channel, row, column in ((0, 0, 0, 0), (10, 2, 31, 30), (3, 1, 4, 5), (7, 0, 31, 0)):
            assert images[n, channel, row, column] == int(pixels[row, column, channel, n])
        assert dataset.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert dataset.test_labels.tolist() == [1, 2, 3, 4]
        assert (dataset.name, dataset.shape, dataset.num_classes) == ("svhn", (3, 32, 32), 10)
        assert dataset.train_images.shape == (11, 3072) and dataset.train_images.is_contiguous()
    (folder / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat of SVHN missing; it holds train_32x32\.mat"):
        data.load(folder)
    with pytest.raises(ValueError, match="has no coarse labels"):
        data.load(tmp_path / "doubles", coarse=True)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"y": None}, "no y in it, but X"),
        ({"X": None, "y": None, "z": 1}, "no X, y in it, but z"),
        ({"X": lambda numpy: numpy.zeros((32, 32, 3, 11))}, r"X is double \[32, 32, 3, 11\], not uint8"),
        ({"X": lambda numpy: numpy.zeros((28, 28, 3, 11), numpy.uint8)}, r"X is uint8 \[28, 28, 3, 11\]"),
        ({"X": lambda numpy: numpy.zeros((32, 32, 3, 0), numpy.uint8)}, r"X is uint8 \[32, 32, 3, 0\]"),
        ({"y": lambda numpy: numpy.ones((10, 1), numpy.uint8)}, r"y is uint8 \[10, 1\], but X holds 11 images"),
        ({"y": lambda numpy: numpy.ones((11, 1), numpy.int32)}, r"y is int32"),
        ({"y": lambda numpy: numpy.full((11, 1), 11, numpy.uint8)}, r"labels must lie in 1\.\.10; found 11"),
        ({"y": lambda numpy: numpy.zeros((11, 1), numpy.uint8)}, r"labels must lie in 1\.\.10; found 0"),
        ({"y": lambda numpy: numpy.full((11, 1), 1.5)}, "labels that are no whole numbers"),
        ({"y": lambda numpy: numpy.full((11, 1), numpy.nan)}, "labels that are no whole numbers"),
    ],
)
def test_svhn_that_is_none_is_named(tmp_path, changes, found):
    with pytest.raises(ValueError, match=rf"train_32x32\.mat: {found}"):
        data.load(svhn(tmp_path, **changes))


def test_damaged_files_of_svhn(tmp_path):
    path = svhn(tmp_path) / "train_32x32.mat"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"<html>", whole[:100], whole[:140], whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat: "):
            data.load(tmp_path)
    # not packed, so that the header can be changed: gigabytes are announced, and as many labels
    scipy_io, numpy = pytest.importorskip("scipy.io"), pytest.importorskip("numpy")
    scipy_io.savemat(path, {"X": numpy.zeros((32, 32, 3, 77), numpy.uint8), "y": numpy.ones((77, 1), numpy.uint8)})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 77), struct.pack("<I", 2**30)))
    with pytest.raises(ValueError, match=r"its header announces 1073741824 images, which .* bytes cannot hold"):
        data.load(tmp_path)


def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    (tmp_path / "svhn").mkdir()
    for side in ("train", "test"):
        (tmp_path / "svhn" / f"{side}_32x32.mat").write_bytes(b"")
        for name in "ab":
            (tmp_path / "images" / side / name).mkdir(parents=True)
            (tmp_path / "images" / side / name / "1.png").write_bytes(b"")
    for module, folder, extra in (("scipy", "svhn", "svhn"), ("PIL", "images", "images")):
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError, match=rf'pip install "ffkernels\[{extra}\]"'):
            data.load(tmp_path / folder)
        assert cli.main(["train", "--data", str(tmp_path / folder), "--device", "cpu"]) == cli.USER_ERROR
        assert f'pip install "ffkernels[{extra}]"' in capsys.readouterr().err


def images(folder: Path, mode: str = "RGB", end: str = "png", size: tuple[int, int] = (6, 4)) -> Path:
    """Classes b, a, C of 3, 2 and 1 images `[4, 6]` in train; two of them in test."""
    pillow = pytest.importorskip("PIL.Image")
    generator = random.Random(0)
    for side, classes in (("train", {"b": 3, "a": 2, "C": 1}), ("test", {"b": 1, "C": 2})):
        for name, count in classes.items():
            (folder / side / name).mkdir(parents=True)
            for i in range(count):
                content = generator.randbytes(size[0] * size[1] * (3 if mode == "RGB" else 1))
                pillow.frombytes(mode, size, content).save(folder / side / name / f"{i}.{end}")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("end", ["png", "jpg", "JPEG"])
def test_class_folders(tmp_path, mode, channels, end):
    folder = images(tmp_path / "mine", mode, end)
    (folder / "train" / "a" / "notes.txt").write_text("left out")
    (folder / "train" / "a" / f".0.{end}").write_text("left out")
    (folder / "train" / ".hidden").mkdir()
    dataset = data.load(folder)
    assert (dataset.name, dataset.shape, dataset.num_classes) == ("mine", (channels, 4, 6), 3)
    assert dataset.source == str(folder)
    # by turns, in the order of the names: C, a, b
    assert dataset.train_labels.tolist() == [0, 1, 2, 1, 2, 2]
    assert dataset.test_labels.tolist() == [0, 2, 0]
    pillow = pytest.importorskip("PIL.Image")
    for i, name in enumerate(("C/0", "a/0", "b/0", "a/1", "b/1", "b/2")):
        with pillow.open(folder / "train" / f"{name}.{end}") as image:
            for row, column in ((0, 0), (3, 5), (1, 4), (2, 0)):
                pixel = image.getpixel((column, row))
                found = dataset.train_images.view(-1, *dataset.shape)[i, :, row, column].tolist()
                assert found == (list(pixel) if channels == 3 else [pixel])


def test_class_folders_that_are_none(tmp_path):
    pillow = pytest.importorskip("PIL.Image")

    def refused(error: type[Exception], found: str, change: Any) -> None:
        folder = images(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder)
        with pytest.raises(error, match=found):
            data.load(folder)

    def removed(path: Path) -> None:
        for entry in path.iterdir():
            removed(entry) if entry.is_dir() else entry.unlink()
        path.rmdir()

    def saved(mode: str, size: tuple[int, int], place: str) -> Any:
        return lambda folder: pillow.new(mode, size).save(folder / place)

    def written(content: bytes, place: str) -> Any:
        def write(folder: Path) -> None:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(content)

        return write

    def cut(folder: Path) -> None:
        path = folder / "test" / "C" / "1.png"
        path.write_bytes(path.read_bytes()[:-30])

    refused(
        FileNotFoundError,
        "/test: no folder of images for each class; .* must hold both train and test; it holds train/",
        lambda folder: removed(folder / "test"),
    )
    refused(FileNotFoundError, "/train: no folder of images", lambda folder: removed(folder / "train"))
    refused(
        ValueError,
        r"train/b/2\.png: RGB, 5 x 4 pixels, but .*train/C/0\.png is RGB, 6 x 4 pixels",
        saved("RGB", (5, 4), "train/b/2.png"),
    )
    refused(ValueError, r"test/b/0\.png: grey, 6 x 4 pixels, but", saved("L", (6, 4), "test/b/0.png"))
    refused(ValueError, r"a/1\.png: an image of mode RGBA; grey ones", saved("RGBA", (6, 4), "train/a/1.png"))
    refused(ValueError, r"C/0\.png: an image of mode P;", saved("P", (6, 4), "train/C/0.png"))
    refused(ValueError, r"test/C/1\.png: cannot be read", cut)
    refused(ValueError, r"train/a/0\.png: cannot be read", written(b"", "train/a/0.png"))
    refused(ValueError, r"train/a/7\.jpg: cannot be read", written(b"<html>", "train/a/7.jpg"))
    refused(ValueError, r"test/d: a class that .*train does not have: C, a, b", written(b"", "test/d/0.png"))
    refused(ValueError, r"train/d: no images \(.jpeg, .jpg, .png\); it holds 0\.bmp", written(b"", "train/d/0.bmp"))
    refused(ValueError, "one class, b; at least 2", lambda f: [removed(f / "train" / name) for name in ("a", "C")])


def plain_crops(rows: torch.Tensor, pad: int, seed: int) -> torch.Tensor:
    count, channels, height, width = rows.shape
    down, right = torch.randint(2 * pad + 1, (2, count, 1), generator=torch.Generator().manual_seed(seed))
    out = torch.zeros_like(rows)
    for n in range(count):
        for i in range(height):
            for j in range(width):
                row, column = i + int(down[n]) - pad, j + int(right[n]) - pad
                if 0 <= row < height and 0 <= column < width:
                    out[n, :, i, j] = rows[n, :, row, column]
    assert channels
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (2, 1, 3)])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crops_and_shifts_are_those_of_a_loop(dtype, shape, pad):
    rows = torch.randint(1, 256, (9, *shape)).to(dtype)
    kept = rows.clone()
    wanted = plain_crops(rows, pad, 5)
    assert torch.equal(batches.random_crops(rows, pad, torch.Generator().manual_seed(5)), wanted)
    moved = batches.shifted(rows.flatten(1), pad, torch.Generator().manual_seed(5), shape)
    assert torch.equal(moved, wanted.flatten(1)) and moved.is_contiguous()
    if shape == (1, 28, 28):
        assert torch.equal(batches.shifted(rows.flatten(1), pad, torch.Generator().manual_seed(5)), moved)
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flips_are_those_of_a_loop_and_a_half(dtype):
    rows = torch.randint(256, (1000, 3, 4, 5)).to(dtype)
    flipped = batches.random_flips(rows, torch.Generator().manual_seed(3))
    turns = torch.randint(2, (1000, 1, 1, 1), generator=torch.Generator().manual_seed(3)).flatten().tolist()
    for row, found, turn in zip(rows, flipped, turns, strict=True):
        assert torch.equal(found, row.flip(2) if turn else row)
    assert 400 < sum(turns) < 600
    assert torch.equal(batches.random_flips(rows, torch.Generator().manual_seed(3)), flipped)


def plain_turns(rows: torch.Tensor, degrees: float, zoom: float, seed: int) -> torch.Tensor:
    """Each pixel of each image on its own, in float64."""
    draws = torch.rand(2, len(rows), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    out = torch.zeros(rows.shape, dtype=torch.float64)
    _, _, height, width = rows.shape
    for i, image in enumerate(rows.double()):
        angle, size = math.radians(degrees) * float(draws[0, i]), 1 + zoom * float(draws[1, i])
        for down, right in itertools.product(range(height), range(width)):
            y, x = down - (height - 1) / 2, right - (width - 1) / 2
            from_x = (math.cos(angle) * x - math.sin(angle) * y) / size + (width - 1) / 2
            from_y = (math.sin(angle) * x + math.cos(angle) * y) / size + (height - 1) / 2
            for at_y, at_x in itertools.product(*((math.floor(f), math.floor(f) + 1) for f in (from_y, from_x))):
                if 0 <= at_y < height and 0 <= at_x < width:
                    share = (1 - abs(from_y - at_y)) * (1 - abs(from_x - at_x))
                    out[i, :, down, right] += share * image[:, at_y, at_x]
    return out


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (2, 1, 3)])
@pytest.mark.parametrize(("degrees", "zoom"), [(0.0, 0.0), (30.0, 0.0), (0.0, 0.3), (180.0, 0.5)])
def test_turns_are_those_of_a_loop(shape, degrees, zoom):
    rows = torch.randint(1, 256, (5, *shape)).to(torch.uint8)
    kept, wanted = rows.clone(), plain_turns(rows, degrees, zoom, 5)
    found = batches.random_turns(rows.float(), degrees, zoom, torch.Generator().manual_seed(5))
    assert (found.double() - wanted).abs().max() < 255 * 1e-4
    whole = batches.random_turns(rows, degrees, zoom, torch.Generator().manual_seed(5))
    assert torch.equal(whole, found.round().to(torch.uint8)) and torch.equal(rows, kept)
    flat = batches.turned(rows.flatten(1), degrees, zoom, torch.Generator().manual_seed(5), shape)
    assert torch.equal(flat, whole.flatten(1))
    if not (degrees or zoom):
        assert torch.equal(whole, rows)


@pytest.mark.parametrize("name", ["quick", "hard-negatives", "hinton-jitter", "loewex"])
def test_recipes_train_on_colours(tmp_path, name):
    kind = "cifar-100-binary"
    dataset = data.load(write_cifar(tmp_path / kind, kind, cifar_parts(kind)), coarse=True)
    recipe = replace(RECIPES[name], hidden=(30,) * len(RECIPES[name].hidden), batch_size=2)
    trainer = Trainer(recipe, dataset, epochs=1)
    row = trainer.run_epoch(lambda describe: False)
    assert row is not None and trainer.net.layers[0].in_features == 3072


def test_images_are_mixed_in_their_own_shape_and_colours_not_at_all(tmp_path):
    recipe = replace(RECIPES["hinton-unsupervised"], hidden=(30,) * 4, batch_size=4)
    dataset = data.load(images(tmp_path / "grey", "L"))
    row = Trainer(recipe, dataset, epochs=1).run_epoch(lambda describe: False)
    assert row is not None
    with pytest.raises(ValueError, match="images of 3 channels; hinton-unsupervised mixes grey ones alone"):
        Trainer(recipe, data.load(images(tmp_path / "colours")))


def test_the_mosaic_of_colours_shows_their_mean():
    weight = torch.zeros(2, 3 * 2 * 4)
    weight[0, [5, 13, 21]] = torch.tensor([1.0, 2.0, 3.0])
    image = picture.mosaic(weight, 2, (3, 2, 4))
    assert image.shape == (3 * picture.TILES, 5 * picture.TILES)
    assert image[:2, :4].isnan().tolist() == [[True, True, False, False], [False] * 4]
    assert image[1, 1] == 1 and image[:2, :4].nansum() == 1


def test_the_command_trains_on_coarse_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kind = "cifar-100-python"
    folder = write_cifar(tmp_path / kind, kind, cifar_parts(kind))
    options = ["--epochs", "1", "--device", "cpu", "--no-picture", "--coarse"]
    assert cli.main(["train", "--data", str(folder), *options]) == 0
    assert "runs/quick-cifar-100-coarse/metrics.jsonl" in capsys.readouterr().out
