"""Networks, optimizers and batches that tests of several processes train; what each process runs of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
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

import ffkernels as ff
from ffkernels.objectives import AnyObjective
from tests.processes import GROUPS

IN, CLASSES = 12, 4


def _mean_square(goodness: Tensor, is_positive: Tensor) -> Tensor:
    return (goodness - torch.where(is_positive, 2.0, 0.5)).square().mean()


def _sum_of_classes(goodness: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(goodness, labels, reduction="sum") / 64


OBJECTIVES: dict[str, Callable[[], AnyObjective]] = {
    "logistic": lambda: ff.Objective(),
    "sum_of_means": lambda: ff.Objective(reduction="sum_of_means", threshold=(1.0, 0.5)),
    "sum goodness": lambda: ff.Objective(goodness="sum", threshold=4.0, temperature=2.0),
    "norm goodness, minimised": lambda: ff.Objective(goodness="norm", maximize=False),
    "symba": lambda: ff.Objective(loss="symba", alpha=4.0),
    "swish": lambda: ff.Objective(loss="swish", alpha=6.0),
    "cross_entropy": lambda: ff.Objective(loss="cross_entropy", classes=CLASSES, label_smoothing=0.1),
    "pvn": lambda: ff.Objective(loss="pvn", classes=CLASSES, goodness="mean"),
    "cwc": lambda: ff.Objective(loss="cwc", classes=CLASSES, goodness="activity"),
    "projection": lambda: ff.ProjectionHead(CLASSES),
    "prototypes": lambda: ff.ProjectionHead(CLASSES, form="prototypes"),
    "given mean": lambda: ff.GivenLoss(_mean_square),
    "given sum": lambda: ff.GivenLoss(_sum_of_classes, classes=CLASSES),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.003, eps=1e-3),
    "adamw": lambda p: AdamW(p, lr=0.003, eps=1e-3),
    "rmsprop": lambda p: RMSprop(p, lr=0.001, eps=1e-2),
    "amsgrad": lambda p: Adam(p, lr=0.003, eps=1e-3, amsgrad=True),
    "sgdw": lambda p: ff.optim.SGDW(p, lr=0.05, momentum=0.9, nesterov=True, decoupled=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.01, eps=1e-2),
    "adadelta": lambda p: Adadelta(p, lr=0.1, eps=1e-3),
    "adamax": lambda p: Adamax(p, lr=0.003, eps=1e-3),
    "nadam": lambda p: NAdam(p, lr=0.003, eps=1e-3, decoupled_weight_decay=True, weight_decay=0.01),
    "radam": lambda p: RAdam(p, lr=0.003, eps=1e-3),
    "asgd": lambda p: ASGD(p, lr=0.01, t0=2),
    "rprop": lambda p: Rprop(p, lr=1e-4),
    "groups": lambda p: _in_groups(list(p)),
}


def _in_groups(parameters: list[Tensor]) -> Optimizer:
    """Adam whose weights decay, and move more slowly than the rest."""
    weights = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() == 1]
    groups = [{"params": others}, {"params": weights, "lr": 0.001, "weight_decay": 0.02}]
    return Adam(groups, lr=0.004, eps=1e-3)


class Case(NamedTuple):
    """What is trained: a network by the name of its kind, and how."""

    objective: str = "logistic"
    outputs: str = "pre"
    optimizer: str = "adam"
    dtype: torch.dtype = torch.float64
    options: tuple[tuple[str, Any], ...] = ()
    kind: str = "linear"
    sides: str = "apart"
    weighted: bool = False
    steps: int = 5
    sync_batch_norm: bool = False
    shard_optimizer: bool = False

    @property
    def of_classes(self) -> bool:
        return OBJECTIVES[self.objective]().classes is not None

    def net(self) -> ff.FFNetwork:
        torch.manual_seed(3)
        options: dict[str, Any] = {"dtype": self.dtype, **dict(self.options)}
        objectives = [OBJECTIVES[self.objective]() for _ in range(3)]
        if self.kind != "convolution":
            # Narrow ones have no two of three processes alike, nor a row for each of them.
            widths = (IN, 20, 16, 12) if self.kind == "linear" else (IN, 7, 5, 2)
            return ff.FFNetwork(
                ff.FFLinear(a, b, objective=o, outputs=self.outputs, **options)
                for a, b, o in zip(widths[:-1], widths[1:], objectives, strict=True)
            )
        return ff.FFNetwork(
            [
                ff.FFConv2d(2, 8, 3, padding=1, pool=2, objective=objectives[0], **options),
                nn.AvgPool2d(2),
                nn.Flatten(),
                ff.FFLinear(8 * 2 * 2, 12, objective=objectives[1], outputs="pre", dtype=self.dtype),
            ]
        )

    def batch(self, step: int, splits: Sequence[int]) -> list[tuple[tuple[Tensor, Tensor | None], dict[str, Tensor]]]:
        """What each process steps on, and behind it the joint batch."""
        generator = torch.Generator().manual_seed(step)

        def rows(count: int) -> Tensor:
            shape = (count, 2, 8, 8) if self.kind == "convolution" else (count, IN)
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        parts: list[Any] = []
        for i, count in enumerate(splits):
            pos = rows(count)
            weight = torch.rand(count, generator=generator, dtype=torch.float64).to(self.dtype) + 0.5
            if self.of_classes:
                labels = torch.randint(CLASSES, (count,), generator=generator)
                parts.append((pos, pos[:0], labels, weight, weight[:0]))
                continue
            is_paired = OBJECTIVES[self.objective]().paired
            # Sides of other sizes, where nothing makes them equal.
            neg = rows(count if is_paired or count == 0 else count + i)
            more = torch.rand(len(neg), generator=generator, dtype=torch.float64).to(self.dtype) + 0.5
            parts.append((pos, neg, None, weight, weight[:0] if is_paired else more))
        arguments = [self._as_arguments(part, step) for part in parts]
        if self.sides == "mixed":
            options = {name: torch.cat([of[name] for _, of in arguments]) for name in arguments[0][1]}
            return [*arguments, ((torch.cat([x for (x, _), _ in arguments]), None), options)]
        joint = [None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)]
        return [*arguments, self._as_arguments(joint, step)]

    def _as_arguments(self, part: Any, step: int) -> tuple[tuple[Tensor, Tensor | None], dict[str, Tensor]]:
        pos, neg, labels, *weights = part
        options = {"sample_weight": torch.cat(weights)} if self.weighted else {}
        if self.of_classes:
            return (pos, None), {**options, "labels": labels}
        if self.sides == "apart":
            return (pos, neg), options
        order = torch.randperm(len(pos) + len(neg), generator=torch.Generator().manual_seed(step))
        if self.weighted:
            options = {"sample_weight": options["sample_weight"][order]}
        is_positive = torch.arange(len(pos) + len(neg)) < len(pos)
        return (torch.cat([pos, neg])[order], None), {**options, "is_positive": is_positive[order]}


def state_of(net: nn.Module, optimizer: Optimizer, parallel: Any = None) -> dict[str, Tensor]:
    """The numbers that training has moved, by name; state that `parallel` has sharded is put together."""
    numbers = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = optimizer.state_dict() if parallel is None else parallel.whole_optimizer_state_dict(optimizer)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(net.parameters()):
        of_parameter = found["state"].get(held.index(id(parameter)), {}) if id(parameter) in held else {}
        for key, tensor in of_parameter.items():
            if isinstance(tensor, Tensor):
                numbers[f"state {i} {key}"] = tensor.clone()
    return numbers


def trained_alone(case: Case, splits: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """One process on the joint batches: what is trained, and `[steps, layers]` losses."""
    net = case.net()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    losses = []
    for step in range(case.steps):
        rows, options = case.batch(step, splits)[-1]
        losses.append(torch.stack([result.loss for result in net.step(*rows, optimizer, **options)]))
    return state_of(net, optimizer), torch.stack(losses)


def trained_by_parts(case: Case, splits: Sequence[int]) -> dict[str, Tensor]:
    """One process with a copy of the network for each split, whose gradients and statistics count by their rows."""
    nets = [case.net() for _ in splits]
    optimizer = OPTIMIZERS[case.optimizer](nets[0].parameters())
    for step in range(case.steps):
        rows = [sum(len(x) for x in sides if x is not None) for sides, _ in case.batch(step, splits)[:-1]]
        shares = [count / sum(rows) for count in rows]
        for net, (sides, options) in zip(nets, case.batch(step, splits)[:-1], strict=True):
            net.step(*sides, None, **options)
        for parameters in zip(*[net.parameters() for net in nets], strict=True):
            parameters[0].grad = sum(share * p.grad for share, p in zip(shares, parameters, strict=True))
        optimizer.step()
        for buffers in zip(*[net.buffers() for net in nets], strict=True):
            if buffers[0].is_floating_point():
                buffers[0].copy_(sum(share * t for share, t in zip(shares, buffers, strict=True)))
        for net in nets[1:]:
            net.load_state_dict(nets[0].state_dict())
    return state_of(nets[0], optimizer)


def trained_together(case: Case, splits: Sequence[int], rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """What a process of this rank has after its steps on its own rows."""
    net = case.net()
    if rank:
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    given = {"given mean": "mean", "given sum": "sum"}.get(case.objective)
    parallel = ff.parallel.DataParallel(
        net,
        GROUPS.get(len(splits)),
        given_loss=given,
        sync_batch_norm=case.sync_batch_norm,
        shard_optimizer=case.shard_optimizer,
    )
    losses = []
    for step in range(case.steps):
        rows, options = case.batch(step, splits)[rank]
        results = parallel.step(*rows, optimizer, **options)
        assert all(len(result.goodness) == sum(map(len, [t for t in rows if t is not None])) for result in results)
        losses.append(torch.stack([result.loss for result in results]))
    if case.shard_optimizer:
        for p in net.parameters():
            rows = -(-len(p) // len(splits))
            own = max(0, min(rows, len(p) - rank * rows)) * p[0].numel()
            assert {t.numel() for t in optimizer.state[p].values() if t.dim()} <= {own}
    return state_of(net, optimizer, parallel), torch.stack(losses)


def piped(case: Case, splits: Sequence[int], rank: int) -> dict[str, Any]:
    """What processes that have a layer or two each come to on the joint batches."""
    net = case.net()
    pipeline = ff.parallel.Pipeline(net, GROUPS.get(len(splits)))
    optimizer = OPTIMIZERS[case.optimizer](pipeline.parameters())
    losses = []
    for step in range(case.steps):
        rows, options = case.batch(step, (9,))[-1]
        if rank:
            rows, options = (None, None), {}
        given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
        results = pipeline.step(*rows, optimizer, **given)
        for value in given.values():
            # What a step was given may change once it is back, whatever is still to be sent.
            if isinstance(value, Tensor):
                value.zero_()
        if step % 10 == 0:
            losses.append(pipeline.losses(results))
    found = {"losses": torch.stack(losses), "net": pipeline.whole_state_dict()}
    x = case.batch(1000, (6,))[-1][0][0]
    pipeline.eval()
    found |= {"goodness": pipeline.goodness(x), "own": list(pipeline.state_dict())}
    if case.of_classes or case.kind == "linear":
        found["predicted"] = pipeline.predict(x, CLASSES)
        found["predicted by one"] = pipeline.predict(x, CLASSES, layers=[-1])
    return found


def not_piped(case: Case) -> dict[str, Any]:
    """The same by one process."""
    net = case.net()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    losses = []
    for step in range(case.steps):
        rows, options = case.batch(step, (9,))[-1]
        results = net.step(*rows, optimizer, **options)
        if step % 10 == 0:
            losses.append(torch.stack([result.loss for result in results]))
    x = case.batch(1000, (6,))[-1][0][0]
    found: dict[str, Any] = {"losses": torch.stack(losses), "net": net.state_dict()}
    with torch.no_grad():
        net.eval()
        found["goodness"] = net.goodness(x)
    if case.of_classes or case.kind == "linear":
        found["predicted"] = net.predict(x, CLASSES)
        found["predicted by one"] = net.predict(x, CLASSES, layers=[-1])
    return found


def refused(case: Case, wrong: str, size: int, rank: int) -> tuple[str, bool]:
    """The error of a step whose last process is given something `wrong`, and whether everything is as before."""
    net = case.net()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    parallel = ff.parallel.DataParallel(net, GROUPS.get(size), shard_optimizer=case.shard_optimizer)
    (pos, neg), options = case.batch(0, (4,) * size)[rank]
    parallel.step(pos, neg, optimizer, **options)
    before = state_of(net, optimizer)
    if rank == size - 1:
        if wrong == "columns":
            pos = pos[:, 1:]
        elif wrong == "labels":
            options = {"labels": options["labels"] + CLASSES}
        elif wrong == "rows":
            pos = pos[:1]
            options = {name: values[:1] for name, values in options.items()}
        elif wrong == "optimizer":
            optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        parallel.step(pos, neg, optimizer, **options)
        text = ""
    except ValueError as error:
        text = str(error)
    after = state_of(net, optimizer) if wrong != "optimizer" or rank < size - 1 else before
    # The processes still know each other.
    sums = torch.ones(())
    dist.all_reduce(sums, group=GROUPS.get(size))
    return text, all(torch.equal(before[name], after[name]) for name in before) and sums.item() == size


def killed(kind: str, size: int, rank: int) -> tuple[str, bool]:
    """What a process says whose last neighbour is killed between two steps, and whether its numbers are whole."""
    case = Case(dtype=torch.float32)
    net = case.net()
    trains: Any
    if kind == "pipeline":
        trains = ff.parallel.Pipeline(net, GROUPS.get(size))
    else:
        trains = ff.parallel.DataParallel(net, GROUPS.get(size), shard_optimizer=kind == "shards")
    parameters = list(trains.parameters() if kind == "pipeline" else net.parameters())
    optimizer = OPTIMIZERS[case.optimizer](parameters)
    text = ""
    try:
        for step in range(1000):
            if step == 3 and rank == size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            trains.step(*case.batch(step, (4,) * size)[rank][0], optimizer)
    except ff.parallel.ProcessLost as error:
        text = str(error)
    return text, all(bool(p.isfinite().all()) for p in parameters)


def with_hooks(size: int, rank: int) -> tuple[list[Tensor], Tensor]:
    """What a gradient hook sees, and the gradient that it leaves."""
    case = Case()
    net = case.net()
    seen: list[Tensor] = []
    weight = net.layers[0].weight

    def halved(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient / 2

    weight.register_hook(halved)
    parallel = ff.parallel.DataParallel(net, GROUPS.get(size))
    parallel.step(*case.batch(0, (4, 6))[rank][0], None)
    assert weight.grad is not None
    return seen, weight.grad


def partly_frozen(sync_batch_norm: bool, size: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """A network whose first layer, with batch normalisation, does not learn; and its losses. Rank -1: one process."""
    case = Case(options=(("batch_norm", "behind"),))
    net = case.net()
    net.layers[0].requires_grad_(False)
    optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    trains: Any = net
    if rank >= 0:
        trains = ff.parallel.DataParallel(net, GROUPS.get(size), sync_batch_norm=sync_batch_norm)
    results = trains.step(*case.batch(0, (4, 6))[rank][0], optimizer)
    return state_of(net, optimizer), torch.stack([result.loss for result in results])


def layer_by_layer(case: Case, splits: Sequence[int], rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """Three steps of each layer on the same rows; by one process for rank -1."""
    net = case.net()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    options = {"sync_batch_norm": case.sync_batch_norm, "shard_optimizer": case.shard_optimizer}
    trains = net if rank < 0 else ff.parallel.DataParallel(net, GROUPS.get(len(splits)), **options)
    rows, options = case.batch(0, splits)[rank]
    losses = trains.train_layerwise(*rows, optimizer, 3, **options)
    return state_of(net, optimizer, None if rank < 0 else trains), torch.stack(losses)


def failing(size: int, shard_optimizer: bool, rank: int) -> tuple[list[str], dict[str, Tensor]]:
    """The errors of a step that fails on the last process in the third layer, and of the next; and what is trained."""
    net = Case().net()

    def infinite(goodness: Tensor, is_positive: Tensor) -> Tensor:
        return goodness.mean() / (0.0 if rank == size - 1 else 1.0)

    net.layers[2].objective = ff.GivenLoss(infinite)
    parallel = ff.parallel.DataParallel(net, given_loss="mean", shard_optimizer=shard_optimizer)
    optimizer = SGD(net.parameters(), lr=0.1)
    errors = []
    for _ in range(2):
        try:
            parallel.step(*Case().batch(0, (4,) * size)[rank][0], optimizer)
        except (ValueError, ff.parallel.ProcessLost) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors, state_of(net, optimizer)


def saved_in_parts(folder: str, size: int, rank: int) -> dict[str, Tensor]:
    """A trained pipeline, saved by `torch.distributed.checkpoint`; loaded into another that is divided otherwise."""
    case, layers = Case(), ((1, 2), (2, 1))
    pipeline = ff.parallel.Pipeline(case.net(), GROUPS.get(size), layers=layers[0])
    optimizer = OPTIMIZERS[case.optimizer](pipeline.parameters())
    pipeline.step(*case.batch(0, (9,))[-1][0], optimizer)
    whole = pipeline.whole_state_dict()
    dcp.save({"net": pipeline.state_dict()}, checkpoint_id=folder, process_group=GROUPS.get(size))
    other = ff.parallel.Pipeline(case.net(), GROUPS.get(size), layers=layers[1])
    state = {"net": other.state_dict()}
    dcp.load(state, checkpoint_id=folder, process_group=GROUPS.get(size))
    other.load_state_dict(state["net"])
    again = other.whole_state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    other.load_state_dict(case.net().state_dict())
    assert torch.equal(other.whole_state_dict()["layers.2.weight"], case.net().layers[2].weight)
    return whole
