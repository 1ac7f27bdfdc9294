import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ffkernels import cli
from ffkernels.backends.native import library
from ffkernels.experiments import progress
from ffkernels.experiments.train import CHECKPOINT, METRICS

from .toy_data import toy_data, write_idx

DEFAULT_BACKEND = "eager" if library.load().library is None else "native"

EPOCHS, STEPS = 3, 6  # of 100 images each
# Runs the command line and sends the process a signal within a step.
HOOKED = """
import os, sys
from ffkernels import cli
from ffkernels.experiments import progress
show, left = progress.Progress.step, [int(sys.argv[1])]
def step(self, describe):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), int(sys.argv[2]))
    show(self, describe)
progress.Progress.step = step
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "toy", toy_data(100 * STEPS, 50))


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    """The same numbers here and in a subprocess with OMP_NUM_THREADS=1; an empty working folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(folder) -> list[str]:
    return ["train", "--data", str(folder), "--epochs", str(EPOCHS), "--device", "cpu", "--no-picture"]


def checkpoint_of(output: str) -> dict:
    return torch.load(Path(output, CHECKPOINT), weights_only=True)


def rows_of(output: str) -> list[dict]:
    rows = [json.loads(line) for line in Path(output, METRICS).read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def assert_same_run(one: str, other: str) -> None:
    assert rows_of(one) == rows_of(other)
    assert len(rows_of(one)) == EPOCHS
    states = [checkpoint_of(output)["state"] for output in (one, other)]
    for part in ("net", "classifier"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name
    for part in ("net_optimizer", "classifier_optimizer"):
        for index, state in states[0][part]["state"].items():
            for name, value in state.items():
                assert torch.equal(value, states[1][part]["state"][index][name]), (part, index, name)


@contextmanager
def interrupt_at(monkeypatch, step: int) -> Iterator[None]:
    """Ctrl-C within this step, counted from 1."""
    show, left = progress.Progress.step, [step]

    def hooked(self, describe) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGINT)
        show(self, describe)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "step", hooked)
        yield


def test_train_says_where_everything_is(arguments, capsys) -> None:
    assert cli.main([*arguments, "--output", "out"]) == 0
    out, err = capsys.readouterr()
    summary, *files = out.splitlines()
    last = rows_of("out")[-1]
    assert f"test error {last['test_error_classifier']:.2%} by classifier" in summary
    assert f"{last['test_error_goodness']:.2%} by goodness" in summary
    assert [line.split() for line in files] == [["metrics:", "out/metrics.jsonl"], ["checkpoint:", "out/checkpoint.pt"]]
    assert [line.partition(":")[0] for line in err.splitlines()[-EPOCHS:]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert f"backend: {DEFAULT_BACKEND}" in err


def test_default_output_and_picture(arguments, capsys) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main([argument for argument in arguments if argument != "--no-picture"]) == 0
    assert "runs/quick-toy/picture.png" in capsys.readouterr().out
    assert Path("runs/quick-toy/picture.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_it_says_so_and_trains(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.picture, "available", lambda: False)
    assert cli.main([*arguments[:-1], "--output", "out", "--epochs", "1"]) == 0
    out, err = capsys.readouterr()
    assert "picture" not in out
    assert "matplotlib is not installed" in err
    assert "pip install" in err


@pytest.mark.parametrize("step", [3, STEPS + 3])
def test_killed_and_resumed_run_gives_the_same_numbers(step: int, arguments) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOOKED, str(step), str(signal.SIGKILL.value), *arguments, "--output", "killed"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert len(rows_of("killed")) == step // STEPS
    assert cli.main([*arguments, "--output", "killed", "--resume"]) == 0
    assert cli.main([*arguments, "--output", "whole"]) == 0
    assert_same_run("whole", "killed")


def test_killed_between_checkpoint_and_metrics(arguments, monkeypatch) -> None:
    """The checkpoint knows of an epoch that the metrics file does not, and the other way round after a broken disk."""
    assert cli.main([*arguments, "--output", "whole"]) == 0
    for left_behind in ("", '{"epoch": 1}\n{"epoch": 2}\n{"ep'):
        with interrupt_at(monkeypatch, STEPS + 2):
            assert cli.main([*arguments, "--output", "cut", "--overwrite"]) == 130
        Path("cut", METRICS).write_text(left_behind)
        assert cli.main([*arguments, "--output", "cut", "--resume"]) == 0
        assert_same_run("whole", "cut")


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(arguments, capsys, monkeypatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt_at(monkeypatch, 2 * STEPS + 1):
        assert cli.main([*arguments, "--output", "cut here"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 of 3 epochs are kept in cut here/checkpoint.pt" in err
    words = shlex.split(err.splitlines()[-1])
    assert words[:3] == ["python", "-m", "ffkernels"]
    assert words[-1] == "--resume"
    assert cli.main(words[3:]) == 0
    assert cli.main([*arguments, "--output", "whole"]) == 0
    assert_same_run("whole", "cut here")


def test_ctrl_c_before_the_first_checkpoint(arguments, capsys, monkeypatch) -> None:
    with interrupt_at(monkeypatch, 1):
        assert cli.main([*arguments, "--output", "cut", "--overwrite"]) == 130
    err = capsys.readouterr().err
    assert "no epoch was finished" in err
    assert "--overwrite" not in err
    assert not Path("cut", CHECKPOINT).exists()


def test_ctrl_c_in_a_process_of_its_own(arguments) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOOKED, "2", str(signal.SIGINT.value), *arguments, "--output", "cut"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "To go on:" in done.stderr


def test_a_finished_run_resumed_is_left_as_it_is(arguments, capsys) -> None:
    assert cli.main([*arguments, "--output", "out"]) == 0
    first = capsys.readouterr().out
    before = rows_of("out")
    assert cli.main([*arguments, "--output", "out", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert out == first
    assert "3 of 3 epochs are done" in err
    assert rows_of("out") == before


def test_a_run_is_not_overwritten_unasked(arguments, capsys) -> None:
    assert cli.main([*arguments, "--output", "out", "--seed", "1"]) == 0
    before = checkpoint_of("out")["settings"]
    capsys.readouterr()
    assert cli.main([*arguments, "--output", "out"]) == 2
    assert_one_line(capsys, "out holds a run already", "--resume", "--overwrite")
    assert cli.main([*arguments, "--output", "out", "--resume"]) == 2
    assert_one_line(capsys, "out/checkpoint.pt: a run with other settings: seed 1, now 0; --overwrite")
    assert checkpoint_of("out")["settings"] == before
    assert cli.main([*arguments, "--output", "out", "--overwrite"]) == 0
    assert checkpoint_of("out")["settings"]["seed"] == 0


def test_damaged_checkpoint(arguments, capsys) -> None:
    Path("out").mkdir()
    Path("out", CHECKPOINT).write_bytes(b"PK\3\4 and no more")
    assert cli.main([*arguments, "--output", "out", "--resume"]) == 2
    assert_one_line(capsys, "out/checkpoint.pt: damaged", "--overwrite starts anew")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "nowhere"], "nowhere: neither a known name"),
        (["--seed", "-1"], "seed=-1 is not in 0.."),
        (["--epochs", "0"], "epochs=0 is not at least 1"),
        (["--output", "a file"], "a file"),
    ],
)
def test_bad_input_is_one_line(options: list[str], said: str, arguments, capsys) -> None:
    Path("a file").write_text("")
    assert cli.main([*arguments, *options]) == 2
    assert_one_line(capsys, said)
    assert not Path("runs").exists()


def test_a_device_that_is_not_there(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*arguments, "--device", "cuda"]) == 2
    assert_one_line(capsys, "--device cuda:", "finds none")


@pytest.mark.parametrize("options", [["--preset", "other"], ["--compute-dtype", "int8"], ["--resume", "--overwrite"]])
def test_bad_options(options: list[str], arguments, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, *options])
    assert exit_.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_forced_backend_that_does_not_exist(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FFKERNELS_BACKEND", "abacus")
    assert cli.main(arguments) == 2
    assert_one_line(capsys, "abacus")
    assert cli.main(["info"]) == 0
    assert "'abacus' is not a backend" in capsys.readouterr().out


def test_info(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    # What torch says of itself has the build it is of; what the package index called it may not.
    assert "  torch      2.13.0+cu130\n" in out
    lines = out.splitlines()
    cpu = next(i for i, line in enumerate(lines) if line.startswith("cpu: "))
    assert lines[cpu + 1].startswith(f"  float32: backend: {DEFAULT_BACKEND}")
    assert f"native: {library.describe()[0]}" in lines
    assert any(line.startswith("  bfloat16: backend: ") for line in lines[cpu:])


def test_as_a_module() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "ffkernels", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


def assert_one_line(capsys, *said: str) -> None:
    """What stands on stderr after an error: what it was, and no traceback."""
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("python -m ffkernels: ")
    assert "Traceback" not in err
    for text in said:
        assert text in line
