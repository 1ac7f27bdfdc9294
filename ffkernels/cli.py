"""The command line: `python -m ffkernels train | reproduce | paper | bench | info | tune`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import math
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import Objective, __version__, explain
from .backends.native import library
from .backends.select import Request
from .backends.triton import support as triton_support
from .experiments import ablation, checkpoint, data, picture, presets, results, train
from .experiments.lock import locked

PROGRAM = "python -m ffkernels"
COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
USER_ERROR, INTERRUPTED, CLOSED_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for what the user can mend, 130 after Ctrl-C, 141 where a pipe was closed."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A folder's name may hold what the terminal's encoding does not.
                stream.reconfigure(errors="backslashreplace")
        try:
            code = _run(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as exit_:
            if exit_.code:
                raise
            code = 0  # argparse has printed its help
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        return CLOSED_PIPE
    except (UserError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        _complain(_text_of(error))
        return USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    finally:
        _let_go_of_what_is_not_taken()


def _run(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:
        # Its options are the checkout's; `_parser` only names it.
        return _bench(argv[1:])
    arguments = _parser().parse_args(argv)
    code: int = arguments.run(arguments, argv)
    return code


def _text_of(error: BaseException) -> str:
    """One line on an error; a file that it is about stands first."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.splitlines())


def _complain(text: str) -> None:
    with suppress(OSError):
        _say(f"{PROGRAM}: {text}")


def _let_go_of_what_is_not_taken() -> None:
    """What a closed pipe or a full disk has refused must not be tried again, with a traceback, when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class UserError(Exception):
    """Something the user can mend; its text is all they need to see."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Forward-Forward on fast, exact kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = "\n".join(f"  {name}: {preset.source}" for name, preset in presets.PRESETS.items())
    command = commands.add_parser(
        "train",
        help="train a network on labelled images",
        description="Trains a network; writes metrics, a checkpoint after every epoch, and a picture.\n\n"
        f"presets:\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_train, results=None)
    command.add_argument("--preset", choices=presets.PRESETS, default="quick", help="the recipe (%(default)s)")
    _add_run_options(command)

    recipes = "\n".join(
        f"  {name}: {preset.source} Assumed here: {preset.assumed or 'nothing.'} "
        f"Published: {preset.published or 'no error.'}"
        for name, preset in presets.PRESETS.items()
    )
    command = commands.add_parser(
        "reproduce",
        help="train a published recipe and record what came of it",
        description="Trains a recipe as `train` does, and writes a row of results: errors, seconds, machine, versions, "
        f"seed.\n\nrecipes:\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_reproduce)
    command.add_argument("preset", nargs="?", choices=presets.PRESETS, metavar="NAME", help="the recipe")
    command.add_argument("--readme", action="store_true", help="no training: make README.md's table from the results")
    command.add_argument("--results", type=_path, default=Path(results.FOLDER), help="folder of rows (%(default)s)")
    _add_run_options(command)

    command = commands.add_parser(
        "paper",
        help="the runs and measurements behind docs/paper.md (needs the checkout)",
        description="ablation trains what is missing in results/ablation; steps and target measure steps, and the time "
        "to 2% error, against backprop's and write results/backprop; tables makes those of docs/paper.md.",
    )
    command.set_defaults(run=_paper)
    command.add_argument("what", choices=("ablation", "steps", "target", "tables"))
    command.add_argument("--data", default="mnist", help="mnist, fashion-mnist or a folder of IDX files (%(default)s)")

    commands.add_parser("bench", help="measure this machine against what people use today (needs the checkout)")
    command = commands.add_parser("info", help="versions, devices, and which backends run on them")
    command.set_defaults(run=_info)

    command = commands.add_parser("tune", help="time the Triton kernels' configurations on this machine's GPU")
    command.set_defaults(run=_tune)
    command.add_argument("--output", type=_path, help="folder for the file (FFKERNELS_CONFIGS, else the package's own)")
    command.add_argument("--seconds", type=_seconds, default=600, help="when to stop (%(default)s)")
    return parser


def _path(text: str) -> Path:
    try:
        return data.user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return seconds


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", default="mnist", help="mnist, fashion-mnist or a folder of IDX files (%(default)s)")
    command.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu (auto)")
    command.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        default="float32",
        help="of the products' operands; weights and sums stay float32 (%(default)s)",
    )
    command.add_argument(
        "--skip-below",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="leave rows out of the update whose loss is less steep; an approximation (%(default)s)",
    )
    command.add_argument("--epochs", type=int, help="instead of the recipe's")
    command.add_argument("--seed", type=int, default=0, help="of weights, order and negatives (%(default)s)")
    command.add_argument("--output", type=_path, help="folder for metrics, checkpoint, picture (runs/RECIPE-DATA...)")
    command.add_argument("--no-picture", action="store_true", help="draw none")
    existing = command.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder, if there is one"
    )
    existing.add_argument("--overwrite", action="store_true", help="start anew over the run in the output folder")


def _reproduce(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.readme == (arguments.preset is not None):
        raise UserError(f"reproduce needs NAME or --readme, one of the two; names: {', '.join(presets.PRESETS)}")
    if not arguments.readme:
        return _train(arguments, argv)
    if not arguments.results.is_dir():
        raise UserError(f"--results {arguments.results}: no folder, so there are no rows to make the table of")
    try:
        results.update_readme(Path("README.md"), arguments.results)
    except ValueError as error:
        raise UserError(error) from error
    print(f"README.md: made from {arguments.results}")
    return 0


def _train(arguments: argparse.Namespace, argv: list[str]) -> int:
    trainer = _prepare(arguments)
    name = f"{arguments.preset}-{trainer.data.name}"
    row_file = None
    if arguments.results is not None:
        identity = results.identity(trainer)
        name, row_file = results.name_of(identity), results.path_of(arguments.results, identity)
    output = arguments.output or Path("runs", name)
    files = {"metrics": output / train.METRICS, "checkpoint": output / train.CHECKPOINT}
    picture_file = output / picture.PICTURE
    checkpoint.try_writing(files["checkpoint"])
    with locked(output):
        checkpoint.remove_leftovers([*files.values(), picture_file])
        _take_up(arguments, trainer, output)
        with_picture = not arguments.no_picture
        if with_picture and (reason := picture.unavailable(trainer)):
            _say(reason)
            with_picture = False
        # What would fail after the training fails here.
        for path in (files["metrics"], row_file, picture_file if with_picture else None):
            if path is not None:
                checkpoint.try_writing(path)
        with _StopOnInterrupt() as stop:
            finished = _until_stopped(trainer, output, stop)
        if not finished:
            _say_stopped(trainer, output, argv)
            return INTERRUPTED
        if row_file is not None:
            try:
                files = {"result": results.write(arguments.results, results.row_of(trainer)), **files}
            except OSError as error:
                raise UserError(f"{_text_of(error)}; the run is kept in {output}: --resume writes its row") from error
        if with_picture:
            try:
                picture.draw(trainer, picture_file)
                files = {"picture": picture_file, **files}
            except Exception as error:  # whatever a drawing library raises, the run is worth more
                _say(f"no picture: {type(error).__name__}: {_text_of(error)}")
    print(train.summary(trainer))
    for kind, path in files.items():
        print(f"{kind + ':':<12}{path}")
    return 0


def _until_stopped(trainer: train.Trainer, output: Path, stop: Callable[[], bool]) -> bool:
    try:
        return train.train(trainer, output, stop)
    except BrokenPipeError:
        raise
    except OSError as error:
        kept = "--resume goes on from the checkpoint" if (output / train.CHECKPOINT).exists() else "no epoch is saved"
        raise UserError(f"{_text_of(error)}; {kept}") from error


def _prepare(arguments: argparse.Namespace) -> train.Trainer:
    """The trainer, before anything is written: what can be wrong with the data and numbers asked for shows here."""
    try:
        device = _device(arguments.device)
        trainer = train.Trainer(
            presets.PRESETS[arguments.preset],
            data.load(arguments.data),
            seed=arguments.seed,
            epochs=arguments.epochs,
            device=device,
            compute_dtype=COMPUTE_DTYPES[arguments.compute_dtype],
            skip_below=arguments.skip_below,
        )
        first = next(iter(trainer.net))
        explanation = explain(
            first.weight,
            trainer.net_optimizer,
            objective=first.objective,
            activation=first.activation,
            compute_dtype=first.compute_dtype,
            peer=first.peer,
            skip_below=trainer.skip_below,
        )
    except ValueError as error:
        raise UserError(error) from error
    _say(explanation.partition("\n")[0])
    return trainer


def _take_up(arguments: argparse.Namespace, trainer: train.Trainer, output: Path) -> None:
    """Goes on with the run in the output folder, starts anew, or says why neither is done."""
    if arguments.resume:
        try:
            resumed = train.resume(trainer, output)
        except ValueError as error:
            raise UserError(f"{error}; --overwrite starts anew") from error
        done = f"{output}: {len(trainer.rows)} of {trainer.epochs} epochs are done"
        _say(done if resumed else f"{output}: no checkpoint, starting anew")
    elif (output / train.CHECKPOINT).exists() and not arguments.overwrite:
        raise UserError(
            f"{output} holds a run already: --resume goes on with it, --overwrite starts anew, "
            "--output names another folder"
        )


def _device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(name for name, here in available.items() if here)
    if not available[name]:
        raise UserError(f"--device {name}: torch {torch.__version__} finds none on this machine")
    return torch.device(name)


class _StopOnInterrupt:
    """While entered, the first Ctrl-C only makes `self()` True; a second one interrupts as always."""

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._before = signal.getsignal(signal.SIGINT)
        # Only the main thread may set a handler; who ignores Ctrl-C, as a job in a script's background, goes on to.
        self._set = threading.current_thread() is threading.main_thread() and self._before is not signal.SIG_IGN
        if self._set:
            signal.signal(signal.SIGINT, self._first)
        return lambda: self._asked

    def __exit__(self, *error: object) -> None:
        if self._set:
            signal.signal(signal.SIGINT, self._before)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, self._before)
        # A handler may run in the middle of a print, which sys.stderr does not stand; where stderr was closed from the
        # start, 2 may be any file.
        if sys.__stderr__ is not None:
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def _say_stopped(trainer: train.Trainer, output: Path, argv: list[str]) -> None:
    # argparse takes their beginnings too.
    kept_options = [a for a in argv if len(a) < 3 or not ("--resume".startswith(a) or "--overwrite".startswith(a))]
    again = shlex.join([*PROGRAM.split(), *kept_options, "--resume"])
    kept = f"{len(trainer.rows)} of {trainer.epochs} epochs are kept in {output / train.CHECKPOINT}"
    _say(f"stopped; {kept if trainer.rows else 'no epoch was finished'}. To go on:\n  {again}")


def _bench(argv: list[str]) -> int:
    return _of_checkout("bench.command").main(argv)


def _of_checkout(module: str) -> Any:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "command.py").exists():
        raise UserError("the benchmark is not part of the installed package: run this in a checkout of the repository")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(module)


def _paper(arguments: argparse.Namespace, argv: list[str]) -> int:
    backprop = _of_checkout("bench.backprop")
    try:
        if arguments.what in ("steps", "target"):
            # What is measured is added to what the file holds: both must be possible before hours of measuring.
            checkpoint.try_writing(backprop.FILE)
            _tables(backprop)
        if arguments.what == "ablation":
            ablation.run(data.load(arguments.data), ablation.FOLDER, _say)
        elif arguments.what != "tables":
            backprop.save(arguments.what, data.load(arguments.data), _say)
        else:
            page = Path("docs", "paper.md")
            results.update_page(page, ablation.BEGIN, ablation.END, ablation.table(results.load(ablation.FOLDER)))
            results.update_page(page, backprop.BEGIN, backprop.END, _tables(backprop))
            print(f"{page}: made from {ablation.FOLDER} and {backprop.FILE}")
    except ValueError as error:
        raise UserError(error) from error
    return 0


def _tables(backprop: Any) -> str:
    try:
        return str(backprop.tables())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{backprop.FILE}: not as `paper steps` and `paper target` write it ({found})") from error


def _info(arguments: argparse.Namespace, argv: list[str]) -> int:
    print(f"ffkernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    # Its metadata may lack the build (+cpu, +cu130).
    print(f"  {'torch':<11}{torch.__version__}")
    for package in ("triton", "numpy", "tqdm", "matplotlib", "numcodecs"):
        print(f"  {package:<11}{_version(package)}")
    cpu = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{cpu}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    for device, description in devices.items():
        print(f"{device}: {description}")
        for name, dtype in COMPUTE_DTYPES.items():
            print(f"  {name}: {_backends(device, dtype)}")
    print("\n".join(f"native: {line}" for line in library.describe()))
    return 0


def _tune(arguments: argparse.Namespace, argv: list[str]) -> int:
    if not torch.cuda.is_available():
        raise UserError(f"tune needs a CUDA or ROCm device; torch {torch.__version__} finds none on this machine")
    reason = triton_support.unsupported(Request(torch.device("cuda"), torch.float32, torch.float32, "relu"))
    if reason is not None:
        raise UserError(f"tune: {reason}")
    from .backends.triton import configs, tune

    folder = arguments.output or Path(os.environ.get(configs.VARIABLE) or configs.FOLDER)
    checkpoint.try_writing(folder / "tuned.json")
    print(tune.tune(folder, arguments.seconds, _say, torch.device("cuda", torch.cuda.current_device())))
    return 0


def _backends(device: str, compute_dtype: torch.dtype | None) -> str:
    """What a step of a small layer with Adam would run on."""
    weight = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    try:
        text = explain(weight, torch.optim.Adam([weight]), objective=Objective(), compute_dtype=compute_dtype)
    except ValueError as error:
        return str(error)
    return text.replace("\n", "\n    ")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _say(text: str) -> None:
    # print would take a closed stderr for stdout.
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
