"""Processes that know each other by gloo, one thread each; they run functions that tests name, and never outlive them."""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# How long the processes wait for each other, and a test for them.
TIMEOUT, PATIENCE = 15, 60


class Failed(Exception):
    """A process has raised, or died: the text of each rank's error."""


class Processes:
    """`size` processes of one group; `run` calls a function of a module of tests on all of them."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size, self.timeout = size, timeout
        self.folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
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

    def run(self, function: Callable[..., Any], *args: Any, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """What each rank's call returns, of `args` and, by rank, of `each`.

        Raises:
            Failed: where one has raised or died; the processes are started anew then.
        """
        name = (function.__module__, function.__qualname__)
        for rank, pipe in enumerate(self.pipes):
            pipe.send((name, (*args, *(() if each is None else each[rank]))))
        answers = [_answer(pipe) for pipe in self.pipes]
        errors = [error for error, _ in answers]
        if any(error is not None for error in errors):
            self.stop()
            self._start()
            raise Failed("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors)))
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
    while True:
        (module, name), args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((None, getattr(importlib.import_module(module), name)(*args)))
        except BaseException as error:
            pipe.send((f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))


def root() -> Path:
    """The repository's folder."""
    return Path(__file__).parents[1]
