import base64
import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ffkernels import cli
from ffkernels.backends.native import library
from ffkernels.recipes import checkpoint, progress
from ffkernels.recipes.run import CHECKPOINT, METRICS
from paper import results

from .forks import in_a_process, start
from .toy_data import toy_data, write_idx

DEFAULT_BACKEND = "eager" if library.load().library is None else "native"

EPOCHS, STEPS = 3, 6  # of 100 images each
# Runs the command line and sends the process a signal within a step.
HOOKED = """
import os, sys
from ffkernels import cli
from ffkernels.recipes import progress
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
    """Of a recipe with a classifier."""
    options = ["--epochs", str(EPOCHS), "--device", "cpu", "--no-picture"]
    return ["train", "--data", str(folder), "--preset", "hard-negatives", *options]


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
def interrupt_at(monkeypatch, step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Ctrl-C, or another signal, within this step, counted from 1."""
    show, left = progress.Progress.step, [step]

    def hooked(self, describe) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)
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
    assert "runs/hard-negatives-toy/picture.png" in capsys.readouterr().out
    assert Path("runs/hard-negatives-toy/picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("preset", ["quick", "hard-negatives", "hinton-unsupervised"])
def test_a_report_is_a_page_of_the_runs_own_numbers(preset, arguments, capsys) -> None:
    """Every picture in it is there and drawn, has words beside it, and the page asks for nothing elsewhere."""
    pytest.importorskip("matplotlib")
    assert cli.main([*arguments, "--preset", preset, "--epochs", "2", "--report", "--output", "out"]) == 0
    assert "report:     out/report.html" in capsys.readouterr().out
    text = Path("out/report.html").read_text()
    assert not re.search(r"(?:src|href)=.(?!data:)", text) and "@import" not in text and "url(" not in text
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', text)
    layers = len(rows_of("out")[0]["loss"])
    assert len(images) == 2 + 2 * layers + 1 == text.count("<img")
    assert all(b"<path" in base64.b64decode(drawn) for _, drawn in images)
    for row in rows_of("out"):
        cells = ["", ""]
        for i, key in enumerate(("test_error_classifier", "test_error_goodness")):
            cells[i] = "" if row[key] is None else f"{row[key]:.2%}"
        losses = " / ".join(f"{loss:.4g}" for loss in row["loss"])
        assert f"<td>{row['epoch']}</td><td>{cells[0]}</td><td>{cells[1]}</td><td>{losses}</td>" in text
    assert "<td>seed</td><td>0</td>" in text


def test_without_matplotlib_it_says_so_and_trains(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.picture, "available", lambda: False)
    assert cli.main([*arguments[:-1], "--output", "out", "--epochs", "1"]) == 0
    out, err = capsys.readouterr()
    assert "picture" not in out
    assert "matplotlib is not installed" in err
    assert "pip install" in err


@pytest.mark.parametrize("step", [3, STEPS + 3])
def test_killed_and_resumed_run_gives_the_same_numbers(step: int, arguments, monkeypatch) -> None:
    with interrupt_at(monkeypatch, step, signal.SIGKILL):
        code = in_a_process(lambda: cli.main([*arguments, "--output", "killed"]), Path("said"))
    assert code == -signal.SIGKILL, Path("said").read_text()
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


@pytest.fixture
def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_renamed_folder_is_the_same_data(arguments, capsys, monkeypatch) -> None:
    shutil.copytree(arguments[2], "first name")
    arguments[2] = "first name"
    with interrupt_at(monkeypatch, STEPS + 2):
        assert cli.main([*arguments, "--output", "cut"]) == 130
    Path("first name").rename("second | name")
    arguments[2] = "second | name"
    assert cli.main([*arguments, "--output", "cut", "--resume"]) == 0
    assert "1 of 3 epochs are done" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", "whole"]) == 0
    assert_same_run("whole", "cut")


def test_two_trainings_in_a_folder(arguments, capsys, monkeypatch) -> None:
    """The second says so and leaves the first alone; after a kill nothing stands in the way."""
    with interrupt_at(monkeypatch, 3, signal.SIGSTOP):
        first = start(lambda: cli.main([*arguments, "--output", "out"]), Path("said"))
    try:
        assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
        before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
        for more in ("--resume", "--overwrite"):
            assert cli.main([*arguments, "--output", "out", more]) == 2
            assert_one_line(capsys, f"out: another training (process {first}) is at work in this folder")
        assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert cli.main([*arguments, "--output", "out", "--resume"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [CHECKPOINT, METRICS]


@pytest.mark.parametrize("where", ["fsync", "replace", "write"])
def test_ctrl_c_twice_while_saving(where: str, arguments, capsys, monkeypatch) -> None:
    """Within the second epoch's checkpoint: it is the old one, and nothing lies beside it."""
    save, saved = checkpoint.save, []

    def interrupting(path, *rest) -> None:
        saved.append(path)
        with monkeypatch.context() as patch:
            if len(saved) == 2 and where == "write":
                patch.setattr(torch, "save", lambda *rest: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
            elif len(saved) == 2:
                do = getattr(os, where)
                patch.setattr(os, where, lambda *a: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and do(*a))
            save(path, *rest)

    with monkeypatch.context() as patch_save:
        patch_save.setattr(checkpoint, "save", interrupting)
        assert cli.main([*arguments, "--output", "cut"]) == 130
    assert capsys.readouterr().err.endswith("python -m ffkernels: interrupted\n")
    assert sorted(path.name for path in Path("cut").iterdir()) == [CHECKPOINT, METRICS]
    assert len(checkpoint_of("cut")["state"]["rows"]) == 1
    assert cli.main([*arguments, "--output", "cut", "--resume"]) == 0
    assert cli.main([*arguments, "--output", "whole"]) == 0
    assert_same_run("whole", "cut")


def test_a_file_that_may_not_grow(arguments, monkeypatch) -> None:
    """What `ulimit -f` does, and a full disk: one line, the old checkpoint whole, nothing beside it."""
    command = ["train", *arguments[1:], "--output", "cut", "--resume"]

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        return cli.main(command)

    for epochs, rest in ((0, "no epoch is saved"), (1, "--resume goes on from the checkpoint")):
        old = Path("cut", CHECKPOINT).read_bytes() if epochs else None
        code, text = in_a_process(limited, Path("said")), Path("said").read_text()
        assert code == 2 and "Traceback" not in text
        assert text.splitlines()[-1] == f"python -m ffkernels: cut/checkpoint.pt: File too large; {rest}"
        assert sorted(path.name for path in Path("cut").iterdir()) == [CHECKPOINT, METRICS][1 - epochs :]
        if epochs:
            assert Path("cut", CHECKPOINT).read_bytes() == old
        else:
            with interrupt_at(monkeypatch, STEPS + 1):
                assert cli.main(command) == 130
    assert cli.main(command) == 0
    assert cli.main([*arguments, "--output", "whole"]) == 0
    assert_same_run("whole", "cut")


def test_results_that_cannot_be_written_show_before_training(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.Trainer, "run_epoch", None)
    Path("a file").write_text("")
    Path("rows/quick-toy-2ep-float32-seed0.json").mkdir(parents=True)
    options = ["reproduce", "quick", "--data", str(folder), "--device", "cpu", "--epochs", "2", "--no-picture"]
    for rows, said in (
        ("a file", "a file: there, but no folder"),
        ("a file/below", "a file/below: Not a directory"),
        ("rows", "rows/quick-toy-2ep-float32-seed0.json: a folder where a file is to be written"),
    ):
        assert cli.main([*options, "--results", rows]) == 2
        assert_one_line(capsys, said)
    assert cli.main(["reproduce", "--readme", "--results", "a file"]) == 2
    assert_one_line(capsys, "--results a file: no folder")


def test_what_fails_after_training_loses_nothing(folder, capsys, monkeypatch) -> None:
    """A picture that cannot be drawn is a message; a row that cannot be written is written by --resume."""
    pytest.importorskip("matplotlib")
    options = ["reproduce", "quick", "--data", str(folder), "--device", "cpu", "--epochs", "1", "--output", "out"]
    row = Path("results/quick-toy-1ep-float32-seed0.json")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(row))

    with monkeypatch.context() as patch:
        patch.setattr(results, "write", full)
        assert cli.main(options) == 2
    assert_one_line(capsys, f"{row}: No space left on device; the run is kept in out: --resume writes its row")
    assert len(rows_of("out")) == 1 and not row.exists()

    def spoilt(*_) -> None:
        assert row.exists()
        raise RuntimeError("no\nfont")

    with monkeypatch.context() as patch:
        patch.setattr(cli.picture, "draw", spoilt)
        assert cli.main([*options, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "no picture: RuntimeError: no font"
    assert f"result:     {row}" in out and "picture" not in out
    assert json.loads(row.read_text())["error_goodness"] == rows_of("out")[0]["test_error_goodness"]

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main([*options, "--resume"]) == 130
    assert cli.main([*options, "--resume"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [CHECKPOINT, METRICS, "picture.png"]


def test_a_matplotlib_that_is_broken_is_told_before_training(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.picture, "available", lambda: True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*arguments[:-1], "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert "picture" not in out
    assert "matplotlib cannot be imported" in err.splitlines()[1]


WRONG = [
    (["--data", "~nobody-here/x"], "~nobody-here/x: no home folder of that user is known"),
    (["--data", "a\0b"], "holds a null character"),
    (["--data", ""], ".: no IDX files in"),
    (["--data", "x" * 300], "File name too long"),
    (["--data", "a file"], "a file: a file, where a name"),
    (["--data", "two\nlines"], "two lines: neither a known name"),
    (["--data", "\udce9"], "neither a known name"),
    (["--epochs", "9" * 400], "is not at most 2147483647"),
    (["--epochs", "-1"], "epochs=-1 is not at least 1"),
    (["--seed", "9" * 400], "is not in 0..4294967295"),
    (["--skip-below", "nan"], "skip_below=nan is not in 0..1"),
    (["--skip-below", "inf"], "skip_below=inf is not in 0..1"),
    (["--skip-below=-1e400"], "skip_below=-inf is not in 0..1"),
    (["--output", "a file"], "a file: there, but no folder"),
    (["--output", "a file/below"], "a file/below: Not a directory"),
    (["--output", "dead link"], "dead link: there, but no folder"),
    (["--output", "x" * 300], "File name too long"),
    (["--output", "taken"], f"taken/{CHECKPOINT}: a folder where a file is to be written"),
    (["--output", "measured"], f"measured/{METRICS}: a folder where a file is to be written"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_wrong_values_are_one_line_and_train_nothing(options, said, arguments, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.Trainer, "run_epoch", None)
    Path("a file").write_text("")
    Path("dead link").symlink_to("nowhere")
    Path("taken", CHECKPOINT).mkdir(parents=True)
    Path("measured", METRICS).mkdir(parents=True)
    assert cli.main([*arguments, *options]) == 2
    assert_one_line(capsys, said)
    assert not Path("runs").exists() and not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--output", "~nobody-here/x"], "argument --output: ~nobody-here/x: no home folder"),
        (["train", "--output", "a\0b"], "argument --output: 'a\\x00b' holds a null character"),
        (["reproduce", "quick", "--results", "~nobody-here"], "argument --results: ~nobody-here: no home folder"),
        (["train", "--epochs", "1e3"], "argument --epochs: invalid int value"),
        (["train", "--epochs", "9" * 5000], "argument --epochs: invalid int value"),
        (["train", "--seed", "nan"], "argument --seed: invalid int value"),
        (["tune", "--seconds", "nan"], "argument --seconds: nan is not a number above 0"),
        (["tune", "--seconds", "-1"], "argument --seconds: -1 is not a number above 0"),
        (["tune", "--seconds", "inf"], "argument --seconds: inf is not a number above 0"),
        (["paper", "all"], "invalid choice"),
    ],
)
def test_wrong_options_are_named(command, said, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(command)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_options_by_their_beginnings_go_on_too(arguments, capsys, monkeypatch) -> None:
    with interrupt_at(monkeypatch, STEPS + 1):
        assert cli.main([*arguments, "--output", "cut", "--over"]) == 130
    words = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert words[3:] == [*arguments, "--output", "cut", "--resume"]


@pytest.mark.parametrize("command", [["info"], ["train", "--help"], ["--help"]])
def test_a_closed_pipe_is_no_traceback(command, environment) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ffkernels", *command], env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_training_whose_listeners_have_gone(arguments, environment) -> None:
    """stdout is wanted only at the end; without a stderr from the start nothing is said, nor written where 2 leads."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ffkernels", *arguments, "--output", "out", "--epochs", "1"]
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--resume"], env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "python -m ffkernels: [Errno 28] No space left on device"
    hooked = [sys.executable, "-c", HOOKED, str(STEPS + 2), str(signal.SIGINT.value), *arguments, "--output", "quiet"]
    closed = f"exec {shlex.join(hooked)} 2>&-"
    done = subprocess.run(["bash", "-c", closed], env=environment, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert cli.main([*arguments, "--output", "quiet", "--resume"]) == 0
    assert rows_of("quiet")[0]["loss"] == rows_of("out")[0]["loss"]


def test_in_a_thread_and_where_ctrl_c_is_ignored(arguments, monkeypatch) -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main([*arguments, "--output", "thread"])))
    thread.start()
    thread.join()
    assert codes == [0]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_at(monkeypatch, STEPS):
            assert cli.main([*arguments, "--output", "ignored"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_run("thread", "ignored")


def test_names_that_the_terminal_cannot_show(folder, environment) -> None:
    name = os.fsdecode(b"caf\xe9")
    shutil.copytree(folder, name)
    options = ["train", "--data", name, "--epochs", "1", "--device", "cpu", "--no-picture", "--output", "out"]
    environment["PYTHONIOENCODING"] = "ascii"
    done = subprocess.run(
        [sys.executable, "-m", "ffkernels", *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"quick (784-500-500) on caf\udce9: test error")


@pytest.mark.parametrize("what", ["backprop", "race", "race-convolutions", "classes", "variations", "search"])
def test_a_measurement_is_taken_where_it_can_be_written(what, folder, capsys, monkeypatch) -> None:
    module = pytest.importorskip(f"paper.{what.partition('-')[0]}")
    Path("measured.json").write_text("")
    if hasattr(module, "FILE"):
        monkeypatch.setattr(module, "FILE", Path("measured.json/below"))
    else:
        monkeypatch.setattr(module.Race, "file", Path("measured.json/below"))
    monkeypatch.setattr(module, "save", None)
    command = {"backprop": "steps"}.get(what, what)
    assert cli.main(["paper", command, "--data", str(folder)]) == 2
    assert_one_line(capsys, "measured.json: there, but no folder")


def test_a_few_kills(environment) -> None:
    root = Path(cli.__file__).parents[1]
    command = [sys.executable, "-m", "tests.campaign", "--rounds", "5", "--seed", "1"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 hits" in done.stdout


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
    assert (done.returncode, done.stdout) == (0, "0.2.0\n")


def assert_one_line(capsys, *said: str) -> None:
    """What stands on stderr after an error: what it was, and no traceback."""
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("python -m ffkernels: ")
    assert "Traceback" not in err
    for text in said:
        assert text in line
