"""The command line: `python -m ffkernels train | info | tune`, and in a checkout `reproduce | paper | bench`."""

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
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import FFLinear, Objective, __version__, explain
from .backends.native import library
from .backends.select import Request
from .backends.triton import support as triton_support
from .parallel import ProcessLost
from .recipes import catalogue, checkpoint, data, picture, report, run
from .recipes import processes as of_training
from .recipes.lock import locked
from .recipes.processes import Processes
from .recipes.train import Trainer

PROGRAM = "python -m ffkernels"
COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
USER_ERROR, INTERRUPTED, CLOSED_PIPE = 2, 130, 141
# Their code and data stand beside the package in the repository, and are in no wheel.
OF_CHECKOUT = ("reproduce", "paper", "bench")


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
    except (UserError, ProcessLost, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        _complain(_text_of(error))
        return USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    finally:
        _let_go_of_what_is_not_taken()


def _run(argv: list[str]) -> int:
    if argv and argv[0] in OF_CHECKOUT and not _in_checkout():
        raise UserError(f"{argv[0]} is not part of the installed package: run this in a checkout of the repository")
    if argv[:1] == ["bench"]:
        # It has options of its own; `_parser` only names it.
        return int(importlib.import_module("paper.command").bench(argv[1:]))
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
        say(f"{PROGRAM}: {text}")


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


def described(examples: str, about: str) -> dict[str, Any]:
    """What makes a parser's help begin with `examples`, a command a line, and go on with `about`, wrapped by hand."""
    blocks = textwrap.indent(textwrap.dedent(examples).strip(), "  "), textwrap.dedent(about).strip()
    return {
        "description": "examples:\n" + "\n\n".join(blocks),
        "formatter_class": lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
    }


def _parser() -> argparse.ArgumentParser:
    in_checkout = _in_checkout()
    examples = """
        python -m ffkernels train                    # MNIST, half a minute on two cores
        python -m ffkernels train --preset projected --report
        python -m ffkernels info                     # what runs on this machine, and why
        python -m ffkernels train --help             # the options of a command
    """
    if in_checkout:
        examples += """
        python -m ffkernels bench --quick            # how fast this machine is: a minute
        """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        **described("\n".join(filter(str.strip, examples.splitlines())), "Forward-Forward on fast, exact kernels."),
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        help="train a network on labelled images",
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m ffkernels train                     # quick on MNIST: half a minute on two cores
            python -m ffkernels train --preset projected --compute-dtype bfloat16 --report
            python -m ffkernels train --preset cwc-cifar10 --data path/to/cifar-10-python.tar.gz
            python -m ffkernels train --resume            # after Ctrl-C
            torchrun --nproc-per-node 2 -m ffkernels train    # by two processes
            """,
            f"""
Trains a network; writes metrics, a checkpoint after every epoch, and a picture.

{_names_of_recipes()}""",
        ),
    )
    command.set_defaults(run=train_recipe)
    command.add_argument(
        "--preset",
        dest="recipe",
        choices=catalogue.RECIPES,
        default="quick",
        metavar="RECIPE",
        help="the recipe (%(default)s)",
    )
    add_run_options(command, {name: recipe.source for name, recipe in catalogue.RECIPES.items()})

    if in_checkout:
        importlib.import_module("paper.command").add_to(commands)
        commands.add_parser("bench", help="measure this machine against what people use today")
    command = commands.add_parser(
        "info",
        help="versions, devices, and which backends run on them",
        **described(
            """
            python -m ffkernels info
            FFKERNELS_BACKEND=eager python -m ffkernels info    # as if forced to plain PyTorch
            """,
            """
            Prints versions, devices, the backend that each dtype runs on and why each other
            one is passed over, and how the compiled library was built or why it was not.
            """,
        ),
    )
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "tune",
        help="time the Triton kernels' configurations on this machine's GPU",
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m ffkernels tune --output configs --seconds 100
            FFKERNELS_CONFIGS=configs python -m ffkernels train    # trains with what was found
            """,
            "Times tile sizes of the Triton kernels and writes the fastest ones into a file.",
        ),
    )
    command.set_defaults(run=_tune)
    command.add_argument(
        "--output",
        type=to_path,
        metavar="DIR",
        help="folder for the file (FFKERNELS_CONFIGS, else the package's own)",
    )
    command.add_argument("--seconds", type=_seconds, default=600, metavar="N", help="when to stop (%(default)s)")
    return parser


def _names_of_recipes() -> str:
    return textwrap.fill(f"recipes: {', '.join(catalogue.RECIPES)}", 90, subsequent_indent="  ", break_on_hyphens=False)


def _in_checkout() -> bool:
    """Whether `bench` and `paper` stand beside this package; they can be imported then."""
    root = Path(__file__).resolve().parents[1]
    if not all((root / folder / "command.py").exists() for folder in ("bench", "paper")):
        return False
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return True


def to_path(text: str) -> Path:
    """The type of an option that names a file or a folder."""
    try:
        return data.user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return seconds


class _List(argparse.Action):
    """Prints names and texts of recipes and ends the command, whatever else it was given."""

    def __init__(self, option_strings: Sequence[str], dest: str, recipes: Mapping[str, str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self._recipes = recipes

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name, text in self._recipes.items():
            print(textwrap.fill(f"{name}: {text}", 100, subsequent_indent="  ", break_on_hyphens=False))
        parser.exit()


def add_run_options(command: argparse.ArgumentParser, recipes: Mapping[str, str]) -> None:
    """The options of every command that trains a recipe; `--list` prints names and texts of `recipes`."""
    command.add_argument("--list", action=_List, recipes=recipes, help="name the recipes with their sources, and end")
    command.add_argument(
        "--data",
        default="mnist",
        help="mnist, fashion-mnist, a CIFAR archive, or a folder: IDX, CIFAR, SVHN, images in "
        "train/CLASS, test/CLASS (%(default)s)",
    )
    command.add_argument("--coarse", action="store_true", help="the 20 coarse classes of CIFAR-100, not its 100")
    command.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or mps; auto: cuda, else mps, else cpu (%(default)s)",
    )
    command.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        default="float32",
        metavar="DTYPE",
        help="float32, bfloat16 or float16 products; weights and sums stay float32 (%(default)s)",
    )
    command.add_argument(
        "--skip-below",
        type=float,
        default=0.0,
        metavar="SLOPE",
        help="an approximation: leave rows with a flatter loss out of the update (%(default)s)",
    )
    command.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order, negatives (%(default)s)")
    command.add_argument(
        "--output", type=to_path, metavar="DIR", help="for metrics, checkpoint, picture (runs/RECIPE-DATA)"
    )
    command.add_argument("--no-picture", action="store_true", help="draw none")
    command.add_argument("--report", action="store_true", help="leave the run as a page, report.html, in that folder")
    command.add_argument(
        "--process-timeout",
        type=_seconds,
        default=600,
        metavar="SECONDS",
        help="how long processes started by torchrun wait for each other (%(default)s)",
    )
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from that folder's checkpoint, if it has one")
    existing.add_argument("--overwrite", action="store_true", help="start anew over the run in that folder")


@dataclass(frozen=True)
class Record:
    """What is kept of a finished run beside its output folder: the run's name, the file, and how it is written."""

    name: str
    path: Path
    write: Callable[[], Path]


def train_recipe(
    arguments: argparse.Namespace, argv: list[str], record: Callable[[Trainer], Record] | None = None
) -> int:
    """Trains `arguments.recipe` with what `add_run_options` adds, and says where everything is.

    Of the processes that torchrun has started the first one speaks and writes.
    """
    try:
        processes = of_training.join(lambda: _device(arguments.device), arguments.process_timeout)
    except ValueError as error:
        raise UserError(error) from error
    code = _train(arguments, argv, record, processes)
    processes.leave()
    return code


def _train(
    arguments: argparse.Namespace,
    argv: list[str],
    record: Callable[[Trainer], Record] | None,
    processes: Processes,
) -> int:
    trainer = _prepare(arguments, processes)
    kept = None if record is None else record(trainer)
    name = f"{arguments.recipe}-{trainer.data.name}" if kept is None else kept.name
    output = arguments.output or Path("runs", name)
    files = {"metrics": output / run.METRICS, "checkpoint": output / run.CHECKPOINT}
    drawn = {
        "picture": (output / picture.PICTURE, picture.draw, not arguments.no_picture),
        "report": (output / report.REPORT, report.write, arguments.report),
    }
    drawings = {kind: (path, draw) for kind, (path, draw, asked) in drawn.items() if processes.writes and asked}
    with ExitStack() as stack:
        with _all_or_none(processes):
            if processes.writes:
                checkpoint.try_writing(files["checkpoint"])
                stack.enter_context(locked(output))
                checkpoint.remove_leftovers([*files.values(), *(path for path, *_ in drawn.values())])
            _take_up(arguments, trainer, output)
            if drawings and (reason := picture.unavailable(trainer)):
                say(reason)
                drawings = {}
            # What would fail after the training fails here.
            paths = [files["metrics"], *([] if kept is None else [kept.path]), *(path for path, _ in drawings.values())]
            for path in paths if processes.writes else ():
                checkpoint.try_writing(path)
        try:
            processes.check_same(f"epochs that are done in {output}", len(trainer.rows))
        except ValueError as error:
            raise UserError(error) from error
        with _StopOnInterrupt() as stop:
            finished = _until_stopped(trainer, output, stop)
        if not processes.writes:
            return 0 if finished else INTERRUPTED
        if not finished:
            _say_stopped(trainer, output, argv)
            return INTERRUPTED
        if kept is not None:
            try:
                files = {"result": kept.write(), **files}
            except OSError as error:
                raise UserError(f"{_text_of(error)}; the run is kept in {output}: --resume writes its row") from error
        for kind, (path, draw) in drawings.items():
            try:
                draw(trainer, path)
                files = {kind: path, **files}
            except Exception as error:  # whatever a drawing library raises, the run is worth more
                say(f"no {kind}: {type(error).__name__}: {_text_of(error)}")
    print(run.summary(trainer))
    for kind, path in files.items():
        print(f"{kind + ':':<12}{path}")
    return 0


@contextmanager
def _all_or_none(processes: Processes) -> Iterator[None]:
    """What fails within on one process ends the others as well, which say nothing of it."""
    try:
        yield
    except Exception:
        with suppress(ProcessLost):
            processes.any(True)
        raise
    if processes.any(False):
        raise SystemExit(USER_ERROR)


def _until_stopped(trainer: Trainer, output: Path, stop: Callable[[], bool]) -> bool:
    try:
        return run.train(trainer, output, stop)
    except BrokenPipeError:
        raise
    except (OSError, ProcessLost) as error:
        kept = "--resume goes on from the checkpoint" if (output / run.CHECKPOINT).exists() else "no epoch is saved"
        raise UserError(f"{_text_of(error)}; {kept}") from error


def _prepare(arguments: argparse.Namespace, processes: Processes) -> Trainer:
    """The trainer, before anything is written: what can be wrong with the data and numbers asked for shows here."""
    try:
        device = _device(arguments.device)
        trainer = Trainer(
            catalogue.RECIPES[arguments.recipe],
            data.load(arguments.data, coarse=arguments.coarse),
            seed=arguments.seed,
            epochs=arguments.epochs,
            device=device,
            compute_dtype=COMPUTE_DTYPES[arguments.compute_dtype],
            skip_below=arguments.skip_below,
            processes=processes,
        )
        first = next(iter(trainer.net))
        own: dict[str, Any] = {"peer": first.peer} if isinstance(first, FFLinear) else {"pool": first.pool}
        explanation = explain(
            first.weight,
            trainer.net_optimizer,
            objective=first.objective,
            activation=getattr(first, "activation", "relu"),
            compute_dtype=first.compute_dtype,
            skip_below=trainer.skip_below,
            **own,
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(error) from error
    if processes.writes:
        say(explanation.partition("\n")[0])
    return trainer


def _take_up(arguments: argparse.Namespace, trainer: Trainer, output: Path) -> None:
    """Goes on with the run in the output folder, starts anew, or says why neither is done."""
    if arguments.resume:
        try:
            resumed = run.resume(trainer, output)
        except ValueError as error:
            raise UserError(f"{error}; --overwrite starts anew") from error
        done = f"{output}: {len(trainer.rows)} of {trainer.epochs} epochs are done"
        if trainer.processes.writes:
            say(done if resumed else f"{output}: no checkpoint, starting anew")
    elif trainer.processes.writes and (output / run.CHECKPOINT).exists() and not arguments.overwrite:
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
    if name == "cuda" and of_training.launched():
        local = int(os.environ.get("LOCAL_RANK") or 0)
        if local >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK={local}, but there are {torch.cuda.device_count()} devices on this machine")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
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


def _say_stopped(trainer: Trainer, output: Path, argv: list[str]) -> None:
    # argparse takes their beginnings too.
    kept_options = [a for a in argv if len(a) < 3 or not ("--resume".startswith(a) or "--overwrite".startswith(a))]
    size = trainer.processes.size
    program = PROGRAM if size == 1 else f"torchrun --nproc-per-node {size} -m ffkernels"
    again = shlex.join([*program.split(), *kept_options, "--resume"])
    kept = f"{len(trainer.rows)} of {trainer.epochs} epochs are kept in {output / run.CHECKPOINT}"
    say(f"stopped; {kept if trainer.rows else 'no epoch was finished'}. To go on:\n  {again}")


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
    print(tune.tune(folder, arguments.seconds, say, torch.device("cuda", torch.cuda.current_device())))
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


def say(text: str) -> None:
    """A line for the user that is no result."""
    # print would take a closed stderr for stdout.
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
