"""Processes that know each other by gloo, one thread each, which run functions of tests and never outlive them."""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# How long the processes wait for each other, and a test for them.
TIMEOUT, PATIENCE = 15, 60


# In a process: the group of so many first ranks; that of all is the default.
GROUPS: dict[int, Any] = {}


class Failed(Exception):
    """A process has raised, or died: the text of each rank's error.

    Attributes:
        values: what those that have not returned.
    """

    values: list[Any]


class Processes:
    """`size` processes; `run` calls a function of a module of tests on them, or on the first of them."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size, self.timeout = size, timeout
        self.folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        # What all of them import is imported once.
        mp.set_forkserver_preload(["ffkernels", "tests.parallel_cases"])
        self.pipes: list[Any] = []
        self.workers: list[Any] = []
        store = tempfile.mktemp(dir=self.folder.name)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, self.size, store, self.timeout, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], *args: Any, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the calls of the first `len(each)` ranks return, of `args` and, by rank, of `each`.

        Raises:
            Failed: where one has raised or died; the processes are started anew then.
        """
        name = (function.__module__, function.__qualname__)
        asked = list(zip(self.pipes, each, strict=False))
        for pipe, own in asked:
            pipe.send((name, (*args, *own)))
        answers = [_answer(pipe) for pipe, _ in asked]
        errors = [error for error, _ in answers]
        if any(error is not None for error in errors):
            self.stop()
            self._start()
            failed = Failed("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
            failed.values = [value for _, value in answers]
            raise failed
        return [value for _, value in answers]

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        for pipe in self.pipes:
            pipe.close()


def _answer(pipe: Connection) -> tuple[str | None, Any]:
    try:
        if not pipe.poll(PATIENCE):
            return "no answer", None
        return pipe.recv()
    except (EOFError, OSError) as error:
        return f"died ({type(error).__name__})", None


def _work(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    group = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    for some in range(1, size):
        GROUPS[some] = dist.new_group(list(range(some)), timeout=timedelta(seconds=timeout))
    while True:
        (module, name), args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((None, getattr(importlib.import_module(module), name)(*args)))
        except BaseException as error:
            pipe.send((f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))
