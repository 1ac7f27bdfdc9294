"""A pipeline: each process has some consecutive layers, and hands their activities on to the next one.

Nothing comes back from the layers above, so that a process may begin its next minibatch while those above are still at
this one: each layer sees the rows, the sums of squares and its own weights that it would see on one process, and ends
up with the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import interrupts, negatives
from .. import validation as check
from ..compiling import never_compiled
from ..functional import StepResult
from ..nn import FFLinear, FFNetwork
from ..nn.network import PREDICTION_IMAGES, PREDICTION_ROWS
from ..nn.stack import BETWEEN
from . import processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of each row, what upper layers read besides its activities.
OF_ROWS = ("is_positive", "labels", "sample_weight")


class Header(NamedTuple):
    """What a message begins with, so that its receiver knows what follows; -1 for what does not.

    Attributes:
        refused: 1: nothing follows, since the step's arguments were refused.
        dtype: place in `DTYPES`.
        n_pos: -1 also where the sides are not apart.
        sumsq, is_positive, labels, sample_weight: lengths.
        channels, height, width: of a row; a linear layer's units are its channels.
    """

    refused: int = 0
    dtype: int = 0
    rows: int = 0
    n_pos: int = -1
    sumsq: int = -1
    is_positive: int = -1
    labels: int = -1
    sample_weight: int = -1
    channels: int = 0
    height: int = -1
    width: int = -1


class Message(NamedTuple):
    """What one process hands on to the next: activities, their sums of squares, and what a step is told of the rows."""

    y: Tensor
    sumsq: Tensor | None
    n_pos: int | None
    of_rows: dict[str, Tensor]


class Pipeline(nn.Module):
    """A network whose layers are divided among processes: consecutive ones to each, the first ones to the first.

    Its parameters are those of this process's layers, `stage`; an optimizer is made of them, or of the whole network's.
    Names in `state_dict` are those of the whole network. The network given is not kept: what the other processes have
    gives its memory back with it.

    Args:
        net: the same network on each process; weights are those of the process that a layer belongs to.
        process_group: of `torch.distributed`; None: the default one.
        layers: how many each process has, one after the other; None: so that the largest number of weights on a
            process is as small as can be.
        in_flight: how many minibatches may wait for the next process before this one does.

    Raises:
        TypeError, ValueError: for a network that is wrapped or sharded, and for layers that cannot be divided so.
    """

    def __init__(
        self,
        net: FFNetwork,
        process_group: ProcessGroup | None = None,
        *,
        layers: Sequence[int] | None = None,
        in_flight: int = 2,
    ) -> None:
        super().__init__()
        processes.checked_network(net)
        if net._shortcuts:
            raise ValueError("net has a Shortcut, which would cross processes; accepted: DataParallel, or one process")
        self._given_group = processes.checked_group(process_group)
        if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
            raise ValueError(f"in_flight={in_flight!r} is not an integer >= 1")
        rank, size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        counts = _divided(net, size) if layers is None else _checked_division(layers, size, len(net))
        processes.check_same_network(net, self.process_group, counts)
        starts = [sum(counts[:i]) for i in range(size + 1)]
        self.first, self.last = starts[rank], starts[rank + 1]
        self.rank, self.size, self.in_flight = rank, size, in_flight
        self.stage = FFNetwork(_modules_of(net, self.first, self.last))
        self.stage.training = net.training
        self._starts, self._counts = starts, counts
        # Of the whole network, what its parts do not know.
        self._depth = len(net)
        self._maximize = [layer.objective.maximize for layer in net]
        self._classes = [layer.objective.classes for layer in net]
        self._label_by_columns = net.between is None and isinstance(net.layers[0], FFLinear)
        self._like = {
            name: torch.empty_like(tensor, device="meta") for name, tensor in net.state_dict(keep_vars=False).items()
        }
        self._sent: deque[tuple[list[Any], list[Tensor]]] = deque()
        silent = [i for i, layer in enumerate(net) if layer.outputs == "none" and i < len(net) - 1]
        if silent:
            raise ValueError(
                f"net.layers[{silent[0]}].outputs='none' but a layer comes after it; accepted: 'post' or 'pre'"
            )

    @property
    def process_group(self) -> Any:
        """The group of the processes. The default one is not held: it ends with `destroy_process_group()`."""
        return dist.group.WORLD if self._given_group is None else self._given_group

    @property
    def _device(self) -> torch.device:
        return next(self.stage.parameters()).device

    @never_compiled("a step of several processes waits for the others in its midst")
    @torch.no_grad()
    def step(
        self,
        x_pos: Tensor | None,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        *,
        label_field: int | None = None,
        product: Tensor | None = None,
        keep: bool = False,
        **options: Any,
    ) -> list[StepResult]:
        """One step of this process's layers on the next minibatch: `FFNetwork.step`, whose results are theirs alone.

        All processes call it equally often. Rows, and what is said of each row (`is_positive`, `labels`,
        `sample_weight`), are those of the first process; what the others are given of these is not read, and may be
        None. Other options are each process's own. It returns when this process is done with the minibatch: those
        above may still be at work.

        Args:
            x_pos, x_neg, label_field, product: as in `FFNetwork.step`; of the first process.
            optimizers: one that holds the layers of this process, or one for each of these layers.
            keep: whether the results keep `y`.

        Raises:
            ValueError: where a process below has refused what it was given; nothing is changed here then.
            ProcessLost: where another process does not answer.
        """
        held = interrupts.hold()
        try:
            return self._step(x_pos, x_neg, optimizers, options, keep, {"label_field": label_field, "product": product})
        finally:
            interrupts.release(held)

    def _step(
        self,
        x_pos: Tensor | None,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        options: dict[str, Any],
        keep: bool,
        shared: dict[str, Any],
    ) -> list[StepResult]:
        stage, hands_on = self.stage, self.rank < self.size - 1
        sumsq = None
        if self.rank:
            message = self._receive()
            options = {**{name: value for name, value in options.items() if name not in OF_ROWS}, **message.of_rows}
            x, sumsq, n_pos = message.y, message.sumsq, message.n_pos
            shared = {}
            x_pos, x_neg = (x, None) if n_pos is None else (x[:n_pos], x[n_pos:])
        try:
            check.tensor("x_pos", x_pos)
            rows = cast("Tensor", x_pos)
            ready = stage._ready(rows, x_neg, optimizers, options, keep=hands_on or keep, **shared)
            if sumsq is not None:
                joint = rows if x_neg is None else torch.cat([rows, x_neg])
                y, sumsq = stage._between(0, joint, sumsq)
                rows, x_neg = (y, None) if x_neg is None else (y[: len(rows)], y[len(rows) :])
            else:
                rows, x_neg = stage._into(0, rows), None if x_neg is None else stage._into(0, x_neg)
            results = stage._climb(rows, x_neg, ready, options, keep=hands_on or keep, sumsq=sumsq)
        except Exception:
            if hands_on:
                self._send(None)
            raise
        if hands_on:
            top = results[-1]
            assert top.y is not None
            # What the caller has may change before it is sent.
            of_rows = {name: options[name].clone() for name in OF_ROWS if options.get(name) is not None}
            one_side = x_neg is None
            y, of_top = (top.y.clone(), top.sumsq.clone()) if keep else (top.y, top.sumsq.clone())
            self._send(Message(y, of_top, None if one_side else len(rows), of_rows))
        return results if keep else [_without_activities(result) for result in results]

    def finish(self) -> None:
        """Waits until the next process has taken all that this one has handed on."""
        while self._sent:
            self._taken()

    def _taken(self) -> None:
        works, _ = self._sent.popleft()
        with processes.others_answer():
            for work in works:
                work.wait()

    def _send(self, message: Message | None) -> None:
        """Hands on to the next process; None: that this one has refused."""
        while len(self._sent) >= self.in_flight:
            self._taken()
        header, tensors = Header(refused=1), []
        if message is not None:
            y, sumsq, n_pos, of_rows = message
            lengths = {name: len(values) for name, values in {"sumsq": sumsq, **of_rows}.items() if values is not None}
            sizes = dict(zip(("channels", "height", "width"), y.shape[1:], strict=False))
            place = DTYPES.index(y.dtype)
            header = Header(0, place, len(y), -1 if n_pos is None else n_pos, **lengths, **sizes)
            # Maps are channels-last, and stay so.
            tensors = [y.permute(0, 2, 3, 1) if y.dim() == 4 else y]
            tensors += [] if sumsq is None else [sumsq]
            tensors += [_as_numbers(of_rows[name]) for name in OF_ROWS if name in of_rows]
        sent = [torch.tensor(header, device=self._device), *(t.contiguous() for t in tensors if t.numel())]
        to = dist.get_global_rank(self.process_group, self.rank + 1)
        with processes.others_answer():
            works = [dist.isend(tensor, to, group=self.process_group) for tensor in sent]
        self._sent.append((works, sent))

    def _receive(self) -> Message:
        """What the process below hands on."""
        device, dtype = self._device, next(self.stage.parameters()).dtype
        first = torch.empty(len(Header._fields), dtype=torch.int64, device=device)
        header = Header(*self._received(first).tolist())
        if header.refused:
            if self.rank < self.size - 1:
                self._send(None)
            raise ValueError("a process below refused what its step was given, and says why; nothing was changed here")
        of_y = DTYPES[header.dtype]
        if header.height < 0:
            y = self._received(torch.empty(header.rows, header.channels, dtype=of_y, device=device))
        else:
            maps = torch.empty(header.rows, header.height, header.width, header.channels, dtype=of_y, device=device)
            y = self._received(maps).permute(0, 3, 1, 2)
        found = {}
        for name, of in (
            ("sumsq", dtype), ("is_positive", torch.bool), ("labels", torch.int64), ("sample_weight", dtype),
        ):  # fmt: skip
            length = getattr(header, name)
            if length >= 0:
                found[name] = torch.empty(length, dtype=of, device=device)
                self._received(_as_numbers(found[name]))
        sumsq = found.pop("sumsq", None)
        return Message(y, sumsq, None if header.n_pos < 0 else header.n_pos, found)

    def _received(self, tensor: Tensor) -> Tensor:
        """The tensor, filled by what the process below sends next."""
        if tensor.numel():
            source = dist.get_global_rank(self.process_group, self.rank - 1)
            with processes.others_answer():
                dist.recv(tensor, source, group=self.process_group)
        return tensor

    def _from_all(self, own: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        """On every process, what each has; `shapes` by rank."""
        parts = []
        for rank, shape in enumerate(shapes):
            mine = rank == self.rank
            part = (
                own.contiguous() if mine and own is not None else torch.empty(shape, dtype=dtype, device=self._device)
            )
            if part.numel():
                processes.take_over([part], self.process_group, rank)
            parts.append(part)
        return parts

    @torch.no_grad()
    def goodness(self, x: Tensor | None, **shared: Any) -> Tensor:
        """`FFNetwork.goodness` of the whole network, on every process: `[rows, layers]`, or `[rows, layers, classes]`.

        All processes call it; rows are those of the first.
        """
        if len(set(self._classes)) > 1:
            raise ValueError(f"the layers' objectives have {self._classes} classes; accepted: the same for all")
        self.finish()
        sumsq = None
        if self.rank:
            message = self._receive()
            x, sumsq = message.y, message.sumsq
        assert x is not None
        own: list[Tensor] = []
        hands_on = self.rank < self.size - 1
        y, below = x, x
        try:
            for i, (layer, ran) in enumerate(
                self.stage._pass(x, keep=hands_on or self._classes[0] is not None, input_sumsq=sumsq, **shared)
            ):
                own.append(self.stage._goodness(i, layer, ran, below))
                y, sumsq, below = ran.y, ran.sumsq, ran.y
        except Exception:
            if hands_on:
                self._send(None)
                self.finish()
            raise
        if hands_on:
            self._send(Message(y, sumsq, None, {}))
            self.finish()
        goodness = torch.stack(own, dim=1)
        rest = goodness.shape[2:]
        shapes = [
            (len(goodness), end - start, *rest) for start, end in zip(self._starts, self._starts[1:], strict=False)
        ]
        return torch.cat(self._from_all(goodness, shapes, goodness.dtype), dim=1)

    @torch.no_grad()
    def predict(
        self, x: Tensor, num_classes: int = 10, layers: Sequence[int] | None = None, label_value: float = 1.0
    ) -> Tensor:
        """`FFNetwork.predict` of the whole network, on every process. All call it, with rows of the same shape;
        the numbers are those of the first's."""
        chosen = _chosen(layers, self._depth)
        signs = [1.0 if maximize else -1.0 for maximize in self._maximize]
        best = [x.new_empty(0, dtype=torch.int64, device=self._device)]
        if {self._classes[i] for i in chosen} != {None}:
            for rows in x.split(PREDICTION_ROWS if x.dim() == 2 else PREDICTION_IMAGES):
                of_layers = self.goodness(rows)
                total = torch.zeros_like(of_layers[:, 0])
                for i in sorted(set(chosen)):
                    total = total + signs[i] * of_layers[:, i]
                best.append(total.argmax(1))
            return torch.cat(best)
        if not self._label_by_columns:
            raise ValueError("net begins with a convolution, which has no label field; accepted: objectives of classes")
        negatives.check_rows(x, num_classes)
        negatives.check_value(label_value)
        for rows in x.split(max(1, PREDICTION_ROWS // num_classes)):
            under_all = rows.repeat(num_classes, 1)
            field = under_all.view(num_classes, len(rows), x.shape[1])[:, :, :num_classes]
            field.zero_().diagonal(dim1=0, dim2=2).fill_(label_value)
            shared = self.stage._sharing(rows, num_classes) if self.rank == 0 else {}
            goodness = self.goodness(under_all, **shared)
            totals = (goodness[:, chosen] * goodness.new_tensor([signs[i] for i in chosen])).sum(1)
            best.append(totals.view(num_classes, len(rows)).argmax(0))
        return torch.cat(best)

    def losses(self, results: Sequence[StepResult]) -> Tensor:
        """`[layers]` losses of the whole network, on every process, of what `step` has returned. All call it."""
        own = torch.stack([result.loss for result in results])
        shapes = [(count,) for count in self._counts]
        return torch.cat(self._from_all(own, shapes, own.dtype))

    def _whole_name(self, name: str) -> str:
        """The whole network's name of an entry of this stage."""
        kind, index, rest = name.split(".", 2)
        return f"{kind}.{int(index) + self.first}.{rest}"

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The entries of this process's layers, under their names in the whole network."""
        found = {} if destination is None else destination
        for name, value in self.stage.state_dict(keep_vars=keep_vars).items():
            found[f"{prefix}{self._whole_name(name)}"] = value
        return found

    @torch.no_grad()
    def whole_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of the whole network, on every process, which all call."""
        self.finish()
        own, whole = self.state_dict(), {}
        for name, like in self._like.items():
            layer = int(name.split(".", 2)[1])
            owner = next(rank for rank in range(self.size) if layer < self._starts[rank + 1])
            whole[name] = own[name].clone() if name in own else torch.empty_like(like, device=self._device)
            processes.take_over([whole[name]], self.process_group, owner)
        return whole

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads this process's layers from a `state_dict` of the whole network, or of this process's layers.

        Errors, and what is missing or unexpected, have the whole network's names.
        """
        names = self.state_dict().keys()
        if strict and (unknown := [name for name in state_dict if name not in self._like]):
            raise ValueError(f"state_dict holds {', '.join(unknown)}; accepted: names of the network's own")
        own = {name: value for name, value in state_dict.items() if name in names or name not in self._like}
        return Stage(self.stage, self.first).load_state_dict(own, strict=strict, assign=assign)


class Stage(nn.Module):
    """Layers of a stage under their names in the whole network."""

    def __init__(self, stage: FFNetwork, first: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(stage, first)})


def _without_activities(result: StepResult) -> StepResult:
    return StepResult(None, result.sumsq, result.goodness, result.loss, result.n_pos, result.is_positive)


def _as_numbers(tensor: Tensor) -> Tensor:
    """Of booleans, which not every group sends, their bytes; in the same memory."""
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _modules_of(net: FFNetwork, first: int, last: int) -> list[nn.Module]:
    """These layers of a network and what stands in front of each, as its constructor takes them."""
    modules: list[nn.Module] = []
    for i in range(first, last):
        if net.between is not None:
            modules += [m for m in cast("nn.Sequential", net.between[i]) if isinstance(m, BETWEEN)]
        modules.append(net.layers[i])
    return modules


def _divided(net: FFNetwork, size: int) -> list[int]:
    """How many consecutive layers each of `size` processes has, so that the largest number of weights is least."""
    weights = [sum(p.numel() for p in layer.parameters()) for layer in net]
    if len(weights) < size:
        raise ValueError(f"net has {len(weights)} layers for {size} processes; accepted: at least one for each")
    # best[i]: the least possible largest number for the first i layers, and how many the last process has.
    best: list[tuple[float, list[int]]] = [(0, [])] + [(float("inf"), [])] * len(weights)
    for _ in range(size):
        further: list[tuple[float, list[int]]] = [(float("inf"), [])]
        for end in range(1, len(weights) + 1):
            options = [
                (max(best[start][0], sum(weights[start:end])), [*best[start][1], end - start]) for start in range(end)
            ]
            further.append(min(options, key=lambda option: option[0]))
        best = further
    return best[-1][1]


def _checked_division(layers: Sequence[int], size: int, depth: int) -> list[int]:
    counts = list(layers)
    wrong = any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts)
    if wrong or len(counts) != size or sum(counts) != depth:
        raise ValueError(f"layers={counts!r}; accepted: {size} integers >= 1 that sum to the {depth} layers of net")
    return counts


def _chosen(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth]
    if wrong or not len(layers):
        raise ValueError(f"layers={list(layers)!r}; accepted: indices of {depth} layers")
    return [i % depth for i in layers]
