"""What a step needs to know of a layer, its options and its optimizer: checked once, kept until something changes."""

from __future__ import annotations

from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import optim
from .. import peer as peers
from .. import validation as check
from ..backends import select
from ..objectives import DEFAULT_OBJECTIVE, AnyObjective, Objective, ProjectionHead
from ..peer import PeerNormalisation
from ..spec import Goal, Layer, PeerPull


class Options(NamedTuple):
    """What a step of a layer is asked for besides its tensors: arguments of `linear_step_`.

    The first ones are attributes of a layer, `OF_LAYER`. `shares`: whether the product of what rows have in common is
    given.
    """

    objective: AnyObjective
    norm: Any
    eps: float
    eps_mode: Any
    activation: Any
    compute_dtype: torch.dtype | None
    peer: PeerNormalisation | None
    backend: str | None
    outputs: Any
    skip_below: float
    shares: bool
    batch_norm: nn.BatchNorm1d | None = None


OF_LAYER = Options._fields[: Options._fields.index("outputs")]


class Plan(NamedTuple):
    """How a step will run: the records that do not hang on its rows, and what it will write.

    A given loss and a head have a goal that nobody reads.

    Attributes:
        is_whole: whether the backend knows the loss and runs the step in one call.
        hands_out_all: whether that call makes everything that the step hands out, too.
        prepared: what the backend has made of the records but for the rule's numbers, or None.
    """

    layer: Layer
    goal: Goal
    pull: PeerPull
    chosen: str
    is_whole: bool
    hands_out_all: bool
    update: optim.Plan
    written: list[Tensor]
    prepared: object = None


class Kept(NamedTuple):
    """A plan, the facts under which it was made, and how the optimizer's state lies in memory.

    `options` hold what the facts name by address.
    """

    plan: Plan
    options: Options
    facts: tuple[object, ...]
    state: list[Tensor]
    layout: list[object]


# What a forward pass takes of a layer.
FORWARD_OPTIONS = ("norm", "eps", "eps_mode", "activation", "compute_dtype", "backend")

# An optimizer owns what its plans hold, so that they live no longer than it does.
_kept: WeakKeyDictionary[Optimizer, dict[int, Kept]] = WeakKeyDictionary()


def plan_for(
    weight: Tensor, bias: Tensor | None, optimizer: Optimizer | None, peer_mean: Tensor | None, options: Options
) -> Plan:
    """The plan of a step; the last one of these tensors where all that was checked is as it was.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    if optimizer is None or torch.compiler.is_compiling() or type(optimizer) not in optim.FUSED:
        return _plan(weight, bias, optimizer, peer_mean, options)
    moment = Moment(weight.device)
    kept = kept_plan(weight, bias, optimizer, peer_mean, options, moment)
    if kept is not None:
        return kept.plan
    plan = _plan(weight, bias, optimizer, peer_mean, options)
    if plan.update.rule != "grad" and not plan.update.makes_state:
        plan = _prepared(plan)
        state = [tensor for part in plan.update.parts for tensor in part.slot.state]
        kept_ones, reading = moment.of(optimizer)
        # Of parameters that the optimizer no longer holds nothing is kept.
        held = {id(p) for of_group in reading.parameters for p in of_group}
        for gone in kept_ones.keys() - held:
            kept_ones.pop(gone, None)
        facts = _facts(weight, bias, peer_mean, options, moment)
        kept_ones[id(weight)] = Kept(plan, options, facts, state, _layout(state))
    return plan


class Moment:
    """What plans are made under besides a layer and its options, read once for all layers of one moment.

    Attributes:
        modes: PyTorch's, for layers of one device, and what the environment says.
    """

    def __init__(self, device: torch.device) -> None:
        anywhere = torch._C._is_any_autocast_enabled()
        autocast = anywhere and check.autocast_is_on(device) and torch.get_autocast_dtype(device.type)
        precision = check.precision_of(torch.float32)
        self.modes = autocast, torch.is_inference_mode_enabled(), select.forced_backend(None), precision
        self._of: dict[Optimizer, tuple[dict[int, Kept], optim.Reading]] = {}

    def of(self, optimizer: Optimizer) -> tuple[dict[int, Kept], optim.Reading]:
        """The plans that are kept for an optimizer, by the addresses of their weights, and what it says."""
        if optimizer not in self._of:
            self._of[optimizer] = _kept.setdefault(optimizer, {}), optim.Reading(optimizer)
        return self._of[optimizer]


def kept_plan(
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer,
    peer_mean: Tensor | None,
    options: tuple[Any, ...],
    moment: Moment,
) -> Kept | None:
    """The last plan of these tensors where all that was checked is as it was; else None. `options`: `Options`."""
    kept_ones, reading = moment.of(optimizer)
    kept = kept_ones.get(id(weight))
    if kept is None or not _same(kept.options, options):
        return None
    if _facts(weight, bias, peer_mean, kept.options, moment) != kept.facts or _layout(kept.state) != kept.layout:
        return None
    update = optim.again(optimizer, reading, kept.plan.update)
    if update is None:
        return None
    if update is not kept.plan.update:
        kept = kept_ones[id(weight)] = kept._replace(plan=kept.plan._replace(update=update))
    return kept


class Forward(NamedTuple):
    """What a forward pass of a layer needs to know of it, and the facts under which that was found out."""

    layer: Layer
    chosen: str
    facts: tuple[object, ...]


def forward_plan(
    kept: Forward | None, weight: Tensor, bias: Tensor | None, options: dict[str, Any], shares: bool, moment: Moment
) -> Forward:
    """`kept` where all that was checked is as it was, else a new one; `options`: `FORWARD_OPTIONS` and their values.

    Raises:
        ValueError, TypeError: as `linear_forward` does for a layer and its options.
    """
    of_both = (_of(weight), None if bias is None else _of(bias))
    facts = (moment.modes, shares, type(options["eps"]), tuple(options.values()), *of_both)
    if kept is not None and kept.facts == facts:
        return kept
    norm, eps, eps_mode, activation, compute_dtype, backend = (options[name] for name in FORWARD_OPTIONS)
    check.layer_options(norm, eps, eps_mode, activation)
    check.layer_tensors(weight, bias)
    compute = check.compute_dtype_of(compute_dtype, weight)
    chosen = select.choose(select.Request(weight.device, weight.dtype, compute, activation, shares=shares), backend)
    layer = Layer(weight, bias, norm, float(eps), eps_mode, activation, compute, check.precision_of(compute))
    return Forward(layer, chosen, facts)


def _prepared(plan: Plan) -> Plan:
    if not plan.is_whole or plan.chosen not in select.PREPARES:
        return plan
    prepared = select.load(plan.chosen).prepare(plan.layer, plan.goal, plan.pull, plan.update.record)
    return plan._replace(prepared=prepared)


def _same(kept: Options, options: tuple[Any, ...]) -> bool:
    try:
        # Yes and 1.0 are equal, and only one of them is right.
        return kept == options and [*map(type, kept)] == [*map(type, options)]
    except (RuntimeError, ValueError, TypeError):  # of several numbers where one belongs, as their check will say
        return False


def _facts(
    weight: Tensor, bias: Tensor | None, peer_mean: Tensor | None, options: Options, moment: Moment
) -> tuple[object, ...]:
    """What the checks have read of tensors and of PyTorch's modes."""
    objective, batch_norm = options.objective, options.batch_norm
    others: list[object] = []
    if batch_norm is not None or isinstance(objective, ProjectionHead):
        others += [(name, _of(p)) for name, p in others_of(objective, batch_norm).items()]
        others.append(isinstance(objective, ProjectionHead) and check.is_watched(objective))
        others.append(None if batch_norm is None else _of_norm(batch_norm))
    threshold = objective.threshold
    return (
        moment.modes,
        _of(weight),
        bias if bias is None else _of(bias),
        peer_mean if peer_mean is None else _of(peer_mean),
        _of(threshold) if isinstance(threshold, Tensor) else None,
        others,
    )


def others_of(
    objective: AnyObjective,
    batch_norm: nn.Module | None,
    input_norm: nn.Module | None = None,
    product_norm: nn.Module | None = None,
) -> dict[str, Tensor]:
    """What learns besides weight and bias, by name."""
    others = {"objective.weight": objective.weight if isinstance(objective, ProjectionHead) else None}
    for name, norm in (("batch_norm", batch_norm), ("input_norm", input_norm), ("product_norm", product_norm)):
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            others |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    return {name: p for name, p in others.items() if p is not None}


def _of_norm(norm: nn.BatchNorm1d) -> tuple[object, ...]:
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return norm.momentum, norm.training, check.is_watched(norm), *[None if t is None else _of(t) for t in buffers]


# The names come as one call of C each: a loop over them in Python takes several times as long.
_OF_TENSOR = attrgetter("shape", "dtype", "device", "requires_grad", "is_leaf")
_OF_STATE = attrgetter("nbytes", "dtype")


def _of(t: Tensor) -> tuple[object, ...]:
    return id(t), type(t), t.data_ptr(), t.stride(), *_OF_TENSOR(t)


def _layout(state: list[Tensor]) -> list[object]:
    return [*map(Tensor.data_ptr, state), *map(Tensor.is_contiguous, state), *map(_OF_STATE, state)]


def _plan(
    weight: Tensor, bias: Tensor | None, optimizer: Optimizer | None, peer_mean: Tensor | None, options: Options
) -> Plan:
    objective, norm, eps, eps_mode, activation, compute_dtype, peer, backend, outputs, skip_below, shares, _ = options
    compiling = torch.compiler.is_compiling()
    check.layer_options(norm, eps, eps_mode, activation)
    check.one_of("outputs", outputs, check.OUTPUTS)
    check.layer_tensors(weight, bias)
    check.head(objective, weight)
    check.batch_norm(options.batch_norm, weight, outputs, peer)
    others = others_of(objective, options.batch_norm)
    for name, parameter in (("weight", weight), ("bias", bias), *others.items()):
        check.trainable(name, parameter)
        check.writable(name, parameter)
    compute = check.compute_dtype_of(compute_dtype, weight)
    check.fraction("skip_below", skip_below)
    check.objective_alone(objective, skip_below, len(weight))
    check.peer_normalisation(peer, peer_mean, weight)
    if not compiling:
        check.apart(weight, bias, peer_mean, None, None, None, others)
    check.optimizer_object(optimizer)
    # State that is made in inference mode could not be written outside of it.
    with torch.inference_mode(False) if not compiling and torch.is_inference_mode_enabled() else nullcontext():
        update = optim.plan(optimizer, weight, bias, others)
    written = update.written() + ([] if peer_mean is None else [peer_mean])
    if options.batch_norm is not None:
        written += [t for t in options.batch_norm.buffers() if t is not None]
    request = select.Request(
        weight.device, weight.dtype, compute, activation, update.rule, peers.gradient_of(peer),
        skips=skip_below > 0, shares=shares,
    )  # fmt: skip
    chosen = select.choose(request, backend)
    if chosen in select.WRITES_BY_TORCH and not compiling:
        check.writable_here(written)
    layer = Layer(weight, bias, norm, float(eps), eps_mode, activation, compute, check.precision_of(compute))
    goal = (objective if isinstance(objective, Objective) else DEFAULT_OBJECTIVE).goal(skip_below)
    is_whole = isinstance(objective, Objective) and select.has_loss(chosen, objective.loss)
    is_whole = is_whole and options.batch_norm is None
    # The optimizer's own step comes between the operator and what it would hand out.
    hands_out_all = is_whole and chosen in select.HANDS_OUT_ALL and update.rule != "grad"
    pull = peers.pull(peer, peer_mean, weight.shape[0])
    return Plan(layer, goal, pull, chosen, is_whole, hands_out_all, update, written)


def rounded(plan: Plan) -> Tensor | None:
    """`[out, in]` for the new weight in the compute dtype, where the forward pass after the update reads that."""
    weight, compute = plan.layer.weight, plan.layer.compute_dtype
    if compute == weight.dtype or plan.update.rule == "grad" or plan.chosen not in select.TAKES_ROUNDED:
        return None
    return weight.new_empty(weight.shape, dtype=compute)
