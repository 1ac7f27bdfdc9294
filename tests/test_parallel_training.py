"""`python -m ffkernels train` by several processes: the numbers of one, whatever their number, and whole files."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffkernels import cli
from ffkernels.recipes import processes as of_training
from ffkernels.recipes.batches import hard_label
from ffkernels.recipes.catalogue import RECIPES, Convolution
from ffkernels.recipes.picture import PICTURE, available
from ffkernels.recipes.run import CHECKPOINT, METRICS
from ffkernels.recipes.train import Trainer
from tests.processes import GROUPS, Processes
from tests.toy_data import toy_data, write_idx

EPOCHS, STEPS = 3, 4  # of 100 images each
PATIENCE = 120
ROOT = Path(__file__).parents[1]
# The command line, which ends itself by a signal within a step of its own.
HOOKED = """
import os, sys
from ffkernels import cli
from ffkernels.recipes import progress
show, left = progress.Progress.step, [int(sys.argv[1])]
def step(self, describe):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
    show(self, describe)
progress.Progress.step = step
sys.exit(cli.main(sys.argv[2:]))
"""
# The command line, which says of what kind its threads are once all else at its exit is done.
THREADS_AT_EXIT = """
import atexit, os, pathlib, sys
names = lambda: sorted(f.read_text().strip() for f in pathlib.Path("/proc/self/task").glob("*/comm"))
atexit.register(lambda: print("at exit:", *names()))
import torch.distributed as dist
join = dist.init_process_group
def joined(*args, **options):
    join(*args, **options)
    print("joined:", *names())
dist.init_process_group = joined
from ffkernels import cli
sys.exit(cli.main(sys.argv[1:]))
"""
# Networks of several processes that outlive the default group.
THREADS_AFTER_GROUP = """
import pathlib
import torch
import torch.distributed as dist
import ffkernels as ff
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
kept = [divided(ff.FFNetwork([ff.FFLinear(8, 4)])) for divided in (ff.parallel.DataParallel, ff.parallel.Pipeline)]
for network in kept:
    parameters = network.net.parameters() if network is kept[0] else network.parameters()
    network.step(torch.rand(3, 8), torch.rand(3, 8), torch.optim.Adam(parameters))
dist.destroy_process_group()
print(*(f.read_text().strip() for f in pathlib.Path("/proc/self/task").glob("*/comm")))
"""
SMALL = {
    "hard-negatives": replace(RECIPES["hard-negatives"], hidden=(60, 40), batch_size=50),
    "hinton-matlab": replace(RECIPES["hinton-matlab"], hidden=(60, 40, 40), batch_size=50),
    "hinton-unsupervised": replace(RECIPES["hinton-unsupervised"], hidden=(60, 40, 40), batch_size=50),
    "mohammadpz": replace(RECIPES["mohammadpz"], hidden=(40, 30), layerwise_steps=5),
    "grouped-mnist": replace(RECIPES["grouped-mnist"], hidden=(60, 43), batch_size=50, dropout=0.2, jitter=1),
    "mono-forward": replace(RECIPES["mono-forward"], hidden=(60, 40), batch_size=50),
    "cwc-mnist": replace(
        RECIPES["cwc-mnist"],
        convolutions=(Convolution(10), Convolution(10, by_class=True, pool=2), Convolution(20, by_class=True, pool=2)),
        batch_size=50,
        classifier_layers=(2,),
        goodness_layers=(2,),
    ),
}
# In front of batch normalisation the gradients of these cancel to rounding noise, which Adam makes full steps of.
NOISE = {"cwc-mnist": (".bias", ".running_mean")}


def small_run(name: str, size: int, rank: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An epoch of a small copy of a recipe, by this process of `size`: its row, and what is trained."""
    together = (
        of_training.Processes(GROUPS.get(size) or torch.distributed.group.WORLD) if size > 1 else of_training.ALONE
    )
    trainer = Trainer(SMALL[name], toy_data(151, 30), epochs=1, processes=together)
    row = trainer.run_epoch(lambda describe: bool(describe()) and False)
    assert row is not None
    numbers = dict(trainer.net.state_dict())
    if trainer.classifier is not None:
        numbers["classifier"] = trainer.classifier.weight.detach()
    return {key: value for key, value in row.items() if "seconds" not in key}, numbers


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes(3)
    yield started
    started.stop()


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_has_the_numbers_of_one_process(processes, name):
    """Of 151 images in batches of 50 the last has one: two of the three processes have none."""
    found = processes.run(small_run, name, 3, each=[(rank,) for rank in range(3)])
    row, numbers = small_run(name, 1)
    for of_rank, trained in found:
        assert of_rank.keys() == row.keys()
        for key, value in row.items():
            assert of_rank[key] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key
        for key, tensor in numbers.items():
            assert torch.equal(trained[key], found[0][1][key]), key
            if not key.endswith(NOISE.get(name, ())):
                assert (trained[key] - tensor).double().norm() <= 1e-3 * tensor.double().norm(), key


def test_wrong_labels_are_drawn_alike_by_any_number_of_processes():
    logits, labels = torch.randn(7, 10), torch.arange(7)
    whole = hard_label(logits, labels, torch.Generator().manual_seed(1))
    parts = [
        hard_label(logits[own], labels[own], torch.Generator().manual_seed(1), 7, own)
        for own in (slice(0, 2), slice(2, 2), slice(2, 7))
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "toy", toy_data(100 * STEPS, 50))


def command(folder: Path, output: Path, *more: str) -> list[str]:
    options = [
        "--data",
        str(folder),
        "--epochs",
        str(EPOCHS),
        "--device",
        "cpu",
        "--no-picture",
        "--output",
        str(output),
    ]
    return ["train", *options, *more]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launched(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Exit status and output of these processes, which a launcher would start with these variables."""
    port, running = free_port(), []
    for rank, of_rank in enumerate(commands):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        paths = {"PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **paths, **{name: str(value) for name, value in variables.items()}}
        running.append(
            subprocess.Popen(
                [sys.executable, *of_rank],
                env=environment,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        return [(process.wait(PATIENCE), process.communicate()[0]) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / METRICS).read_text().splitlines()]


def state_of(output: Path) -> dict[str, Any]:
    return torch.load(output / CHECKPOINT, weights_only=True)["state"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("more", [(), ("--epochs", "0")], ids=["trained", "refused"])
def test_no_thread_of_the_group_outlives_its_program(folder, tmp_path, more):
    """One that lets go of a tensor while the interpreter is taken down would abort the process."""
    ends = launched([["-c", THREADS_AT_EXIT, *command(folder, tmp_path / "run", *more)]] * 2)
    for code, said in ends:
        assert code == (cli.USER_ERROR if more else 0), said
        assert "gloo" in said.partition("joined:")[2].partition("\n")[0], said
        assert "gloo" not in said.partition("at exit:")[2], said


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_no_thread_of_a_group_outlives_it():
    said = subprocess.run([sys.executable, "-c", THREADS_AFTER_GROUP], cwd=ROOT, text=True, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert "python" in said.stdout and "gloo" not in said.stdout


def test_a_killed_process_ends_the_others_and_another_number_goes_on(folder, tmp_path, capsys):
    whole, output = tmp_path / "whole", tmp_path / "hit"
    at = STEPS + random.Random(7).randint(1, STEPS)
    hit = ["-c", HOOKED, str(at), *command(folder, output, "--process-timeout", "20")]
    (code, said), (of_killed, _) = launched(
        [["-m", "ffkernels", *command(folder, output, "--process-timeout", "20")], hit]
    )
    assert of_killed == -signal.SIGKILL
    assert code == cli.USER_ERROR, said
    assert "another process died, or did not answer within the timeout" in said
    assert "--resume goes on from the checkpoint" in said
    assert len(state_of(output)["rows"]) == 1
    assert sorted(path.name for path in output.iterdir()) == [CHECKPOINT, METRICS]
    with_picture = [part for part in command(folder, output, "--resume") if part != "--no-picture"]
    ends = launched([["-m", "ffkernels", *with_picture]] * 3)
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert "1 of 3 epochs are done" in ends[0][1]
    assert [said for _, said in ends[1:]] == ["", ""]
    assert (output / PICTURE).exists() == available()
    assert sum(f"picture:    {output / PICTURE}" in said for _, said in ends) == available()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(command(folder, whole)) == 0
    torch.set_num_threads(threads)
    for row, expected in zip(rows_of(output), rows_of(whole), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-4)
        assert row["test_error_goodness"] == pytest.approx(expected["test_error_goodness"], abs=0.05)
    for name, tensor in state_of(whole)["net"].items():
        assert (state_of(output)["net"][name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def script_of(path: str, port: int, rank: int) -> str:
    """What a script prints as one of two processes that torchrun would have started; none of a group any longer."""
    torch.distributed.destroy_process_group()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(path, run_name="__main__")
    return said.getvalue()


@pytest.fixture
def scripts() -> Iterator[Callable[[Path], list[str]]]:
    """Runs a script by two processes."""
    started = Processes(2)
    yield lambda path: started.run(script_of, str(path), free_port(), each=[(0,), (1,)])
    started.stop()


def test_the_example_learns_in_both_ways(scripts):
    path = ROOT / "examples" / "two_processes.py"
    assert len(path.read_text().splitlines()) < 80
    errors = re.findall(r"error (.*)%", "".join(scripts(path)))
    assert len(errors) == 4
    assert all(float(error) < 20 for error in errors), errors


def test_the_page_is_a_script_of_two_processes(tmp_path, scripts):
    page = ROOT / "docs" / "parallel.md"
    script = tmp_path / "script.py"
    script.write_text("".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)))
    first, second = scripts(script)
    assert "34 own rows" in first
    assert "32 own rows" in second
    assert "layers 0..1" in first
    assert "layers 2..3" in second
    options = {action.option_strings[0] for action in train_options() if action.option_strings}
    named = set(re.findall(r"(?<=\s)--[a-z-]+", "".join(re.findall(r"-m ffkernels train(.*)", page.read_text()))))
    assert named <= options


def train_options() -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset")
    cli.add_run_options(parser, {})
    return parser._actions


def test_what_the_first_process_refuses_ends_all(folder, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"a run")
    (code, said), (other, silent) = launched([["-m", "ffkernels", *command(folder, tmp_path)]] * 2)
    assert (code, other) == (cli.USER_ERROR, cli.USER_ERROR)
    assert "holds a run already" in said
    assert silent == ""
    assert (tmp_path / CHECKPOINT).read_bytes() == b"a run"
