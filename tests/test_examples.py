"""Each of examples/ on a little data: it is learnt, in seconds; and each file is short."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ffkernels as ff

from .image_files import cifar_parts, write_cifar
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


def test_own_loss():
    error, thresholds = example("own_loss").train(toy_data(600, 100), epochs=2, batch=20)
    assert error < 0.3
    assert all(abs(threshold - 0.5) > 1e-3 for threshold in thresholds)


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
