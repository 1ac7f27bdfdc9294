"""A compiled library in a process of its own, which a fault in it would end."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def describe(library: ModuleType) -> list[str]:
    return library.describe()


def loading(
    cwd: Path, path: Path = Path(), ask: Callable[[ModuleType], list[str]] = describe, **environment: str
) -> list[str]:
    """What `library.py` of a folder answers in a fork: a new Python would import torch for seconds."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.chdir(cwd)
            os.environ.update(environment)
            sys.path.insert(0, str(path))
            with open(write, "w") as file:
                file.write("\n".join(ask(importlib.import_module("library"))))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as file:
        lines = file.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == 0, f"{path}: exit status {status}"
    return lines
