"""The processes of a group: what all of them agree on, and a clear word where one of them is gone."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import validation as check
from ..nn import FFNetwork

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


if dist.is_available():
    # Its functions' defaults keep the default group of when it is imported, and gloo's threads with it, for ever. A
    # step of torch's optimizers would import it: so now, while there is none.
    import torch.distributed.nn.functional


class ProcessLost(RuntimeError):
    """Another process died, or did not answer within the timeout of the process group."""


@contextmanager
def others_answer() -> Iterator[None]:
    """Raises `ProcessLost` where a call to the other processes fails."""
    try:
        yield
    except ProcessLost:
        raise
    except RuntimeError as error:
        # Of what the group says, advice that is not about this program comes behind the first sentence.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ProcessLost(
            f"another process died, or did not answer within the timeout of the process group ({reason})"
        ) from error


def checked_group(process_group: object) -> Any:
    """What was given as a group, None for the default one.

    Raises:
        ValueError, TypeError: where there is none to use.
    """
    if not dist.is_available():
        raise ValueError("process_group: this build of torch has no torch.distributed; accepted: one that has")
    if not dist.is_initialized():
        raise ValueError(
            f"process_group={process_group!r} came before torch.distributed.init_process_group(), which makes the "
            "processes know each other; accepted: a program that calls it first, launched by torchrun"
        )
    if process_group is None:
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}; accepted: a torch.distributed.ProcessGroup, or None"
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError("process_group does not hold this process; accepted: one that does, or None")
    return process_group


def checked_network(net: object) -> FFNetwork:
    """The network, whose parameters are whole on one device.

    Raises:
        TypeError, ValueError: for a wrapped one, and for parameters that are not.
    """
    if not isinstance(net, FFNetwork):
        hint = ""
        if isinstance(net, nn.Module) and any(isinstance(module, FFNetwork) for module in net.modules()):
            hint = "; the network within this wrapper learns from no backward(), which is what the wrapper reduces"
        raise TypeError(f"net is a {type(net).__name__}; accepted: an ffkernels.FFNetwork{hint}")
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        check.tensor(f"net.{name}", tensor)
    for i, layer in enumerate(net):
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            if parameter is not None and not (parameter.is_leaf and not parameter.requires_grad):
                check.trainable(f"net.layers[{i}].{name}", parameter)
    devices = {tensor.device for tensor in (*net.parameters(), *net.buffers())}
    if len(devices) > 1:
        raise ValueError(f"net is on {', '.join(sorted(map(str, devices)))}; accepted: one device for each process")
    return net


def check_same_network(net: FFNetwork, group: ProcessGroup, division: Sequence[int] = ()) -> None:
    """Raises ValueError on every process unless all of them have layers of the same shapes, divided alike."""
    facts = [(name, tuple(t.shape), str(t.dtype)) for name, t in net.state_dict().items()], list(division)
    mark = zlib.crc32(repr(facts).encode())
    device = next(net.parameters()).device
    least_and_most = torch.tensor([mark, -mark], device=device)
    with others_answer():
        dist.all_reduce(least_and_most, dist.ReduceOp.MIN, group=group)
    least, most = least_and_most.tolist()
    if least != -most:
        raise ValueError(
            "net has layers of other shapes on another process, or they are divided otherwise there; accepted: the "
            "same network on all"
        )


def take_over(tensors: Iterable[Tensor], group: ProcessGroup, source: int = 0) -> None:
    """Gives every process the numbers that these tensors have on the process of this rank in the group."""
    origin = dist.get_global_rank(group, source)
    with torch.no_grad(), others_answer():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, origin, group=group)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def sum_of(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all processes, at once."""
    total = values.clone()
    with others_answer():
        dist.all_reduce(total, group=group)
    return total


class Reduction:
    """Sums over all processes, under way: of large tensors in place, of small ones together.

    Args:
        large: each is summed where it is.
        small: of one dtype; their sums are what `wait` returns.
    """

    def __init__(self, large: list[Tensor], small: list[Tensor], group: ProcessGroup) -> None:
        self.large, self._shapes = large, [tensor.shape for tensor in small]
        self._flat = torch.cat([tensor.reshape(-1) for tensor in small])
        with others_answer():
            # In this order on every process.
            self._works = [dist.all_reduce(t, group=group, async_op=True) for t in (*large, self._flat)]

    def wait(self) -> list[Tensor]:
        """The sums of the small tensors, once all sums are there."""
        with others_answer():
            for work in self._works:
                work.wait()
        parts = self._flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
