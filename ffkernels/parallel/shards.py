"""Sharded optimizer state: each process runs the rule on its own rows of every parameter, and has their state alone.

The first stage of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). Gradients are summed so that each process gets the
sums of its own rows, the caller's optimizer steps on these, and the rows of all are put together again. Of `n` rows
(output units, channels) the first process has the first `ceil(n / processes)`, and so on; the last ones may have fewer,
or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from .. import optim
from ..backends.eager import rules
from .processes import others_answer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# torch 2.13 has other names for them.
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
# Each number's step hangs on its own gradient and state alone, so that any rows can take theirs without the others.
ELEMENTWISE = (
    SGD, optim.SGDW, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, RMSprop, ASGD, Rprop,
)  # fmt: skip


class Place(NamedTuple):
    """A process's place among those of a group.

    Attributes:
        scatters: whether the group reduces to parts, and gathers them, where the network is; else sums over all stand
            in for both.
    """

    group: Any
    rank: int
    size: int
    scatters: bool

    def rows(self, tensor: Tensor) -> slice:
        """Which rows of a parameter are this process's."""
        chunk = _chunk(tensor.shape, self.size)
        start, end = (min(place * chunk, len(tensor)) for place in (self.rank, self.rank + 1))
        return slice(start, end)

    def scatter(self, packed: Tensor) -> tuple[Tensor, Any]:
        """This process's row of the sum of `packed` `[processes, n]` over all, and the work that makes it so."""
        with others_answer():
            if not self.scatters:
                return packed[self.rank], dist.all_reduce(packed, group=self.group, async_op=True)
            own = torch.empty_like(packed[0])
            return own, REDUCE_SCATTER(own, packed.view(-1), group=self.group, async_op=True)

    def gather(self, packed: Tensor, own: Tensor) -> Any:
        """The work that fills `packed` `[processes, n]` with the `own` row of every process."""
        with others_answer():
            if self.scatters:
                return ALL_GATHER(packed.view(-1), own, group=self.group, async_op=True)
            # Zeros from all others: the sum is the row. It may lie in `packed` itself.
            mine = own.clone()
            packed.zero_()
            packed[self.rank] = mine
            return dist.all_reduce(packed, group=self.group, async_op=True)


def place_in(group: ProcessGroup, like: Tensor) -> Place:
    """This process's place in a group that sends tensors of this dtype and device. All processes call it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    place = Place(group, rank, size, True)
    ones = like.new_ones(size, 1)
    try:
        own, work = place.scatter(ones)
        work.wait()
        place.gather(ones, own).wait()
        return place._replace(scatters=bool((ones == size).all()))
    except (RuntimeError, NotImplementedError):
        # Not every backend has them on every device. Where a process is gone instead, the next call says so.
        return place._replace(scatters=False)


def check_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor], place: Place) -> None:
    """Raises ValueError or TypeError for an optimizer that cannot step on some rows of these alone; changes nothing."""
    kind = type(optimizer)
    if kind not in ELEMENTWISE:
        raise TypeError(
            f"optimizer is a {kind.__name__}, of which nobody knows whether it can step on some rows of a parameter "
            f"alone; accepted under shard_optimizer=True: {', '.join(known.__name__ for known in ELEMENTWISE)}"
        )
    if because := optim.own_step_because(optimizer):
        raise ValueError(
            f"optimizer ({kind.__name__}): {because}, and it would see this process's rows alone; accepted under "
            "shard_optimizer=True: an optimizer without"
        )
    for name, parameter in parameters.items():
        if optim.hooked(parameter):
            raise ValueError(
                f"{name} has gradient hooks, but no process has its whole gradient; accepted under "
                "shard_optimizer=True: a parameter without"
            )
    optim.check_parameters(optimizer, parameters)
    with _standing_in(optimizer, parameters, place, keeps=False) as own:
        _planned(optimizer, own)


class Shards:
    """The step of a layer on this process's rows: sums under way, then the rule, then everyone's new rows under way.

    Parameters stay as they are until `finish`, which writes all that a layer's step does. `rows`: this process's, by
    name.

    Args:
        parameters: by the names that `optim.plan` has.
        gradients: likewise; their memory is used up.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], place: Place) -> None:
        self._parameters, self._place = parameters, place
        self.rows = {name: place.rows(parameter) for name, parameter in parameters.items()}
        # The weight alone, where it is.
        names = list(parameters)
        self._names = [part for part in (names[:1], names[1:]) if part]
        self._packed = [_packed([gradients[name] for name in part], place.size) for part in self._names]
        self._own, self._works = map(list, zip(*[place.scatter(packed) for packed in self._packed], strict=True))

    def _of_own(self) -> dict[str, Tensor]:
        """Views of this process's rows of each, in what is sent."""
        found: dict[str, Tensor] = {}
        for part, own in zip(self._names, self._own, strict=True):
            views = _unpacked(own.unsqueeze(0), [self._parameters[name].shape for name in part], self._place.size)
            for name, view in zip(part, views, strict=True):
                rows = self.rows[name]
                found[name] = view[: rows.stop - rows.start]
        return found

    def gradients(self) -> dict[str, Tensor]:
        """The sums over all processes of this one's rows, once they are there."""
        with others_answer():
            for work in self._works:
                work.wait()
        return self._of_own()

    def update(
        self, optimizer: Optimizer, gradients: Mapping[str, Tensor], beside: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Runs the optimizer's rule on this process's rows and sends them to all.

        beside: what is to be written with the parameters, and what it becomes.
        """
        self._beside = beside
        with _standing_in(optimizer, self._parameters, self._place, keeps=True) as own:
            plan = _planned(optimizer, own)
            for gradient, part in zip(gradients.values(), plan.parts, strict=True):
                rules.step(plan.rule, part.parameter, gradient, part.slot)
            plan.finish(optimizer)
            for name, sent in self._of_own().items():
                sent.copy_(own[name].detach())
        pairs = zip(self._packed, self._own, strict=True)
        self._works = [self._place.gather(packed, own_rows) for packed, own_rows in pairs]

    def finish(self) -> None:
        """Writes the layer, once the rows of all are there."""
        with others_answer():
            for work in self._works:
                work.wait()
        for part, packed in zip(self._names, self._packed, strict=True):
            parameters = [self._parameters[name] for name in part]
            whole = _unpacked(packed, [parameter.shape for parameter in parameters], self._place.size)
            for parameter, numbers in zip(parameters, whole, strict=True):
                parameter.copy_(numbers)
        for into, found in self._beside:
            into.copy_(found)


def whole_state(optimizer: Optimizer, parameters: Sequence[Tensor], place: Place, to: int | None) -> dict[str, Any]:
    """The `state_dict` of an optimizer whose state of these parameters is sharded, put together on the CPU."""
    ours = {id(parameter) for parameter in parameters}
    found = optimizer.state_dict()
    is_here = to is None or to == place.rank
    state: dict[int, dict[str, Any]] = {}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(held):
        if i not in found["state"]:
            continue
        entry = dict(found["state"][i])
        if id(parameter) in ours:
            for key in sorted(key for key, value in entry.items() if _is_sharded(key, value)):
                own = _own_part(key, entry[key], parameter, place)
                chunk = own.new_zeros(_chunk(parameter.shape, place.size), *parameter.shape[1:])
                chunk[: len(own)] = own
                packed = chunk.new_empty(place.size, chunk.numel())
                work = place.gather(packed, chunk.view(-1))
                with others_answer():
                    work.wait()
                if is_here:
                    entry[key] = _unpacked(packed, [parameter.shape], place.size)[0].cpu()
        state[i] = {key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    for key, value in entry.items()} if is_here else {}  # fmt: skip
    return {"state": state, "param_groups": found["param_groups"]} if is_here else {}


@contextmanager
def _standing_in(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], place: Place, *, keeps: bool
) -> Iterator[dict[str, Tensor]]:
    """Within, the optimizer holds this process's rows in place of these parameters, with the state of these rows.

    keeps: whether the rows are copies, and their state is the parameters' afterwards; else nothing has changed then.
    """
    own: dict[str, Tensor] = {}
    before: dict[Tensor, Any] = {}
    states: dict[Tensor, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rows = parameter.detach()[place.rows(parameter)]
        own[name] = nn.Parameter(rows.clone() if keeps else rows)
        if parameter in optimizer.state:
            before[parameter] = optimizer.state[parameter]
            states[own[name]] = {
                key: _own_part(key, value, parameter, place, copies=keeps) if _is_sharded(key, value) else value
                for key, value in before[parameter].items()
            }
    stand_in = {parameter: own[name] for name, parameter in parameters.items()}
    held = [group["params"] for group in optimizer.param_groups]
    try:
        for parameter in before:
            del optimizer.state[parameter]
        optimizer.state.update(states)
        for group in optimizer.param_groups:
            group["params"] = [stand_in.get(parameter, parameter) for parameter in group["params"]]
        yield own
    finally:
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"] = params
        for parameter, rows in stand_in.items():
            after = optimizer.state.pop(rows, None)
            found = after if keeps else before.get(parameter)
            if found is not None:
                optimizer.state[parameter] = found


def _planned(optimizer: Optimizer, own: Mapping[str, Tensor]) -> optim.Plan:
    others = {name: parameter for name, parameter in own.items() if name not in ("weight", "bias")}
    return optim.plan(optimizer, own["weight"], own.get("bias"), others)


def _is_sharded(key: str, value: object) -> bool:
    """Whether an optimizer keeps this for each number of a parameter; counts are kept for all of them."""
    return isinstance(value, Tensor) and value.dim() > 0 and key != "step"


def _own_part(key: str, value: Tensor, parameter: Tensor, place: Place, copies: bool = False) -> Tensor:
    """What belongs to this process's rows, of state that is theirs alone or that of the whole parameter."""
    rows = place.rows(parameter)
    own = torch.Size([rows.stop - rows.start, *parameter.shape[1:]])
    if value.shape == own:
        return value
    if value.shape == parameter.shape:
        return value[rows].clone() if copies else value[rows]
    raise ValueError(
        f"the optimizer's {key} is {tuple(value.shape)}; accepted: {tuple(own)}, as process {place.rank} of "
        f"{place.size} has it, or {tuple(parameter.shape)}, as whole_optimizer_state_dict() puts it together"
    )


def _chunk(shape: torch.Size, size: int) -> int:
    """How many rows a process has at most."""
    return -(-shape[0] // size)


def _packed(tensors: Sequence[Tensor], size: int) -> Tensor:
    """`[processes, n]`: each one's rows of all these, zeros in place of rows that are missing.

    In the memory of a single one that can be divided.
    """
    parts = []
    for tensor in tensors:
        chunk = _chunk(tensor.shape, size)
        if chunk * size > len(tensor):
            tensor = torch.cat([tensor, tensor.new_zeros(chunk * size - len(tensor), *tensor.shape[1:])])
        parts.append(tensor.reshape(size, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _unpacked(packed: Tensor, shapes: Sequence[torch.Size], size: int) -> list[Tensor]:
    """The tensors of these shapes that lie in `packed` `[processes, n]`; of one process's `[1, n]`, its rows."""
    widths = [_chunk(shape, size) * shape[1:].numel() for shape in shapes]
    parts = packed.split(widths, dim=1)
    return [part.reshape(-1, *shape[1:])[: shape[0]] for part, shape in zip(parts, shapes, strict=True)]
