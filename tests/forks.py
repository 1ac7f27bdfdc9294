"""Processes that a signal or a fault may end: forks, since a new Python would import torch for seconds."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ffkernels.backends.native import library

INTERRUPTED = 130


def start(do: Callable[[], int], said: Path) -> int:
    """The number of a fork that runs `do`, and ends with what it returns; what it prints goes to `said`."""
    process = os.fork()
    if not process:
        code = 99
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            code = do()
        except KeyboardInterrupt:  # as __main__ has it
            code = INTERRUPTED
        except BaseException:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.setprofile(None)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def in_a_process(do: Callable[[], int], said: Path) -> int:
    """The exit code of `do` in a fork, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start(do, said), 0)[1])


def describe(copied: ModuleType) -> list[str]:
    return copied.describe()


def loading(
    cwd: Path, path: Path = Path(), ask: Callable[[ModuleType], list[str]] = describe, **environment: str
) -> list[str]:
    """What `library.py` of a folder answers in a process of its own."""

    def do() -> int:
        os.chdir(cwd)
        os.environ.update(environment)
        # Under a name of its own in its package, whose other files it imports.
        name = f"{library.__package__}.copied_library"
        spec = importlib.util.spec_from_file_location(name, path / "library.py")
        assert spec is not None and spec.loader is not None
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        print(*ask(copied), sep="\n")
        return 0

    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        code = in_a_process(do, said)
        assert code == 0, (code, said.read_text())
        return said.read_text().splitlines()
