"""The command line: `python -m ffkernels train | reproduce | paper | bench | info | tune`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import Objective, __version__, explain
from .backends.native import library
from .backends.select import Request
from .backends.triton import support as triton_support
from .experiments import ablation, data, picture, presets, results, train

PROGRAM = "python -m ffkernels"
COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:
        # Its options are the checkout's; `_parser` only names it.
        arguments = argparse.Namespace(run=_bench)
    else:
        arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments, argv)
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


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
    command.add_argument("--results", type=Path, default=Path(results.FOLDER), help="folder of rows (%(default)s)")
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
    command.add_argument("--output", type=Path, help="folder for the file (FFKERNELS_CONFIGS, else the package's own)")
    command.add_argument("--seconds", type=float, default=600, help="when to stop (%(default)s)")
    return parser


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
    command.add_argument("--output", type=Path, help="folder for metrics, checkpoint and picture (runs/RECIPE-DATA...)")
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
    try:
        results.update_readme(Path("README.md"), arguments.results)
    except ValueError as error:
        raise UserError(error) from error
    print(f"README.md: made from {arguments.results}")
    return 0


def _train(arguments: argparse.Namespace, argv: list[str]) -> int:
    trainer, output = _prepare(arguments)
    with_picture = not arguments.no_picture
    if with_picture and not picture.available():
        _say(picture.MISSING)
        with_picture = False
    with _StopOnInterrupt() as stop:
        finished = train.train(trainer, output, stop)
    if not finished:
        _say_stopped(trainer, output, argv)
        return INTERRUPTED
    files = {"metrics": output / train.METRICS, "checkpoint": output / train.CHECKPOINT}
    if with_picture:
        files = {"picture": output / picture.PICTURE, **files}
        picture.draw(trainer, files["picture"])
    if arguments.results is not None:
        files = {"result": results.write(arguments.results, results.row_of(trainer)), **files}
    print(train.summary(trainer))
    for name, path in files.items():
        print(f"{name + ':':<12}{path}")
    return 0


def _prepare(arguments: argparse.Namespace) -> tuple[train.Trainer, Path]:
    """Everything that can be wrong with what the user asked for shows here, before anything is written."""
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
        _say(explanation.partition("\n")[0])
        name = f"{arguments.preset}-{trainer.data.name}"
        if arguments.results is not None:
            name = results.name_of(results.identity(trainer))
        output = arguments.output or Path("runs", name)
        if arguments.resume:
            resumed = _resume(trainer, output)
            done = f"{output}: {len(trainer.rows)} of {trainer.epochs} epochs are done"
            _say(done if resumed else f"{output}: no checkpoint, starting anew")
        elif (output / train.CHECKPOINT).exists() and not arguments.overwrite:
            raise UserError(
                f"{output} holds a run already: --resume goes on with it, --overwrite starts anew, "
                "--output names another folder"
            )
    except ValueError as error:
        raise UserError(error) from error
    return trainer, output


def _resume(trainer: train.Trainer, output: Path) -> bool:
    try:
        return train.resume(trainer, output)
    except ValueError as error:
        raise UserError(f"{error}; --overwrite starts anew") from error


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
        self._before = signal.signal(signal.SIGINT, self._first)
        return lambda: self._asked

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, self._before)
        # A handler may run in the middle of a print, which sys.stderr does not stand.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def _say_stopped(trainer: train.Trainer, output: Path, argv: list[str]) -> None:
    again = shlex.join([*PROGRAM.split(), *(a for a in argv if a not in ("--resume", "--overwrite")), "--resume"])
    kept = f"{len(trainer.rows)} of {trainer.epochs} epochs are kept in {output / train.CHECKPOINT}"
    _say(f"stopped; {kept if trainer.rows else 'no epoch was finished'}. To go on:\n  {again}")


def _bench(arguments: argparse.Namespace, argv: list[str]) -> int:
    return _of_checkout("bench.command").main(argv[1:])


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
        if arguments.what == "ablation":
            ablation.run(data.load(arguments.data), ablation.FOLDER, _say)
        elif arguments.what != "tables":
            backprop.save(arguments.what, data.load(arguments.data), _say)
        else:
            page = Path("docs", "paper.md")
            results.update_page(page, ablation.BEGIN, ablation.END, ablation.table(results.load(ablation.FOLDER)))
            results.update_page(page, backprop.BEGIN, backprop.END, backprop.tables())
            print(f"{page}: made from {ablation.FOLDER} and {backprop.FILE}")
    except ValueError as error:
        raise UserError(error) from error
    return 0


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
    print(text, file=sys.stderr, flush=True)
