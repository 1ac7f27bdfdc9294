"""Each of examples/ on a little data: it is learnt, in seconds; and each file is short."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ffkernels as ff
from ffkernels.recipes import Dataset

from .image_files import cifar_parts, write_cifar
from .test_conv_recipes import textures
from .toy_data import toy_data

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module of a name of its own, since lightning.py would hide Lightning."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text().splitlines()) < 80
    tests = "".join(
        Path(__file__).with_name(f"test_{name}.py").read_text() for name in ("examples", "parallel_training")
    )
    assert f'example("{path.stem}")' in tests or f"{path.name}" in tests


def test_mnist():
    module = example("mnist")
    assert module.train(toy_data(600, 100), epochs=2, batch=20) < 0.3
    labels = torch.arange(10)
    hard = module.hard_labels(torch.full((10, 10), -40.0).fill_diagonal_(40.0), labels)
    assert not (hard == labels).any()


def test_the_notebook(monkeypatch):
    """Its cells one after the other, on a little data; what it shows is of the whole of MNIST."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.setattr("ffkernels.recipes.load", lambda name: toy_data(600, 100))
    cells = json.loads((EXAMPLES / "mnist.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(len(code.splitlines()) for code in codes) < 80
    names: dict[str, Any] = {}
    for code in codes:
        exec(code, names)
    assert names["errors"][-1] < 0.3
    assert all(share > 0.7 for share in names["right"].tolist())
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in shown) == 3
    assert sum("test error" in "".join(output.get("text", ())) for output in shown) == 1


def test_own_loss():
    error, thresholds = example("own_loss").train(toy_data(600, 100), epochs=2, batch=20)
    assert error < 0.3
    assert all(abs(threshold - 0.5) > 1e-3 for threshold in thresholds)


def textured() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(*textures(600, generator), *textures(100, generator), name="toy", source="")


def test_asge():
    module = example("asge")
    assert module.train(textured(), epochs=3, batch=20) < 0.3
    goodness = module.SpatialGoodness(3)
    maps = torch.rand(2, 3, 8, 8)
    cells = torch.stack([part.square().mean((2, 3)) for row in maps.split(2, 2) for part in row.split(2, 3)], 2)
    torch.testing.assert_close(goodness.logits(maps), cells.flatten(1) @ goodness.matrix)


def test_channel_assignment():
    error, shares = example("channel_assignment").train(textured(), epochs=2, batch=20)
    assert error < 0.3
    # Undecided rows would have an entropy of log(10).
    assert all(float(torch.special.entr(share).sum(1).mean()) < 1.9 for share in shares)


def test_distance_forward():
    module = example("distance_forward")
    assert module.train(toy_data(600, 100), epochs=2, batch=20) < 0.3
    centroids = module.Centroids(4, classes=2, momentum=1.0)
    y, labels = torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0]]), torch.tensor([0, 1])
    expected = torch.tensor(-20.0 + centroids.margin).exp().log1p()
    torch.testing.assert_close(centroids(y, labels), expected)
    torch.testing.assert_close(centroids.centroids, torch.eye(2, 4))


def test_cifar():
    module = example("cifar")
    assert module.train(module.made(300), module.made(100), epochs=4, batch=20) < 0.3
    net = module.network()
    assert [type(layer) for layer in net.layers] == [ff.FFConv2d] * 3 + [ff.FFLinear]


def test_cifar_from_a_folder(tmp_path):
    module, parts = example("cifar"), cifar_parts("cifar-10-batches-bin")
    training, test = module.from_folder(str(write_cifar(tmp_path / "cifar", "cifar-10-batches-bin", parts)))
    images, _, labels = parts["test_batch.bin"]
    assert torch.equal(test[0], images.view(-1, 3, 32, 32) / 255)
    assert torch.equal(test[1], labels)
    assert 0 <= module.train(training, test, epochs=1) <= 1


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    error = example("lightning").train(toy_data(1000, 100), max_epochs=2, default_root_dir=tmp_path, **quiet)
    assert error < 0.3


def test_fflib_accelerated():
    pytest.importorskip("fflib")
    apart, seconds = example("fflib_accelerated").compare(width=50, steps=3, rows=16)
    assert apart < 1e-4
    assert set(seconds) == {"fflib", "accelerated"}


def test_the_script_itself_runs_beside_a_file_named_lightning(monkeypatch):
    """`python examples/mnist.py` puts examples/ first on the path."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    assert example("mnist").train
