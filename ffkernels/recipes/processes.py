"""The processes of a training: which rows of a minibatch are whose, what they add up, and who writes files."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.processes import others_answer


class Processes:
    """The processes that train a network together; without a group there is one, and nothing is sent.

    Args:
        group: of `torch.distributed`.
        device: where it sends from.
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        self.group, self.device = group, torch.device(device)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def writes(self) -> bool:
        """Whether this process speaks, and writes files, for all."""
        return self.rank == 0

    def own(self, rows: int) -> slice:
        """Which of a minibatch's rows are this process's: consecutive ones, whose numbers differ by one at most."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.group is None:
            return values
        total = values.to(self.device, copy=True)
        with others_answer():
            dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def any(self, flag: bool) -> bool:
        """Whether this is so on any process."""
        if self.group is None:
            return flag
        return bool(self.sum(torch.tensor(int(flag))))

    def check_same(self, what: str, number: int) -> None:
        """Raises ValueError on all processes unless a number is the same on them."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        found = self.sum(numbers).tolist()
        if len(set(found)) > 1:
            raise ValueError(f"{what}: {found} on processes 0 to {self.size - 1}; accepted: the same on all")

    def leave(self) -> None:
        """Ends what `join` began. Not where something was raised: the others may be gone, and would be waited for."""
        if self.group is not None:
            dist.destroy_process_group()


ALONE = Processes()


def launched() -> bool:
    """Whether a launcher such as torchrun has started several processes, and this is one of them."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def join(device: Callable[[], torch.device], seconds: float) -> Processes:
    """The processes of a launcher, which wait so long for each other; this one alone without a launcher.

    Raises:
        ValueError: where torch cannot do that.
    """
    if not launched():
        return ALONE
    if not dist.is_available():
        raise ValueError("WORLD_SIZE is set, but this build of torch has no torch.distributed")
    here = device()
    backend = {"cuda": "nccl", "cpu": "gloo"}.get(here.type)
    if backend is None:
        raise ValueError(f"several processes on {here.type}; accepted: cpu or cuda")
    with others_answer():
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    if backend == "gloo":
        atexit.register(_end_of_threads)
    return Processes(dist.group.WORLD, here)


def _end_of_threads() -> None:
    """Gloo's threads end with the last reference to the group. One that lets go of a tensor while the interpreter is
    being taken down aborts the process, whatever it has done."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
