"""Processes that a signal or a fault may end: forks, since a new Python would import torch for seconds."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


def describe(library: ModuleType) -> list[str]:
    return library.describe()


def loading(
    cwd: Path, path: Path = Path(), ask: Callable[[ModuleType], list[str]] = describe, **environment: str
) -> list[str]:
    """What `library.py` of a folder answers in a process of its own."""

    def do() -> int:
        os.chdir(cwd)
        os.environ.update(environment)
        sys.path.insert(0, str(path))
        print(*ask(importlib.import_module("library")), sep="\n")
        return 0

    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        code = in_a_process(do, said)
        assert code == 0, (code, said.read_text())
        return said.read_text().splitlines()
