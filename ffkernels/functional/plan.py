"""What a step needs to know of a layer, its options and its optimizer: checked once, kept until something changes."""

from __future__ import annotations

from contextlib import nullcontext
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

    `shares`: whether the product of what rows have in common is given.
    """

    objective: AnyObjective
    norm: Any
    eps: float
    eps_mode: Any
    activation: Any
    outputs: Any
    compute_dtype: torch.dtype | None
    skip_below: float
    peer: PeerNormalisation | None
    backend: str | None
    shares: bool
    batch_norm: nn.BatchNorm1d | None = None


class Plan(NamedTuple):
    """How a step will run: the records that do not hang on its rows, and what it will write.

    A given loss and a head have a goal that nobody reads.

    Attributes:
        is_whole: whether the backend knows the loss and runs the step in one call.
    """

    layer: Layer
    goal: Goal
    pull: PeerPull
    chosen: str
    is_whole: bool
    update: optim.Plan
    written: list[Tensor]


class Kept(NamedTuple):
    """A plan, and the facts under which it was made; `options` hold what the facts name by address."""

    plan: Plan
    options: Options
    facts: tuple[object, ...]


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
    of_optimizer = _kept.get(optimizer)
    kept = None if of_optimizer is None else of_optimizer.get(id(weight))
    if kept is not None and _same(kept.options, options):
        facts = _facts(weight, bias, peer_mean, options)
        if facts == kept.facts:
            update = optim.again(optimizer, kept.plan.update)
            if update is not None:
                return kept.plan if update is kept.plan.update else kept.plan._replace(update=update)
    plan = _plan(weight, bias, optimizer, peer_mean, options)
    if plan.update.rule != "grad" and not plan.update.makes_state:
        facts = _facts(weight, bias, peer_mean, options)
        _kept.setdefault(optimizer, {})[id(weight)] = Kept(plan, options, facts)
    return plan


def _same(kept: Options, options: Options) -> bool:
    try:
        return kept == options
    except (RuntimeError, ValueError, TypeError):  # of several numbers where one belongs, as their check will say
        return False


def _facts(weight: Tensor, bias: Tensor | None, peer_mean: Tensor | None, options: Options) -> tuple[object, ...]:
    """What the checks have read of tensors and of PyTorch's modes."""
    threshold = options.objective.threshold
    return (
        _of(weight),
        None if bias is None else _of(bias),
        None if peer_mean is None else _of(peer_mean),
        _of(threshold) if isinstance(threshold, Tensor) else None,
        [(name, _of(p)) for name, p in others_of(options.objective, options.batch_norm).items()],
        None if options.batch_norm is None else _of_norm(options.batch_norm),
        isinstance(options.objective, ProjectionHead) and check.is_watched(options.objective),
        type(options.eps), type(options.skip_below),
        check.autocast_is_on(weight.device) and torch.get_autocast_dtype(weight.device.type),
        torch.is_inference_mode_enabled(),
        select.forced_backend(options.backend),
    )  # fmt: skip


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


def _of(t: Tensor) -> tuple[object, ...]:
    return (id(t), type(t), t.shape, t.stride(), t.dtype, t.device, t.data_ptr(), t.requires_grad, t.is_leaf)


def _plan(
    weight: Tensor, bias: Tensor | None, optimizer: Optimizer | None, peer_mean: Tensor | None, options: Options
) -> Plan:
    objective, norm, eps, eps_mode, activation, outputs, compute_dtype, skip_below, peer, backend, shares, _ = options
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
    layer = Layer(weight, bias, norm, float(eps), eps_mode, activation, compute)
    goal = (objective if isinstance(objective, Objective) else DEFAULT_OBJECTIVE).goal(skip_below)
    is_whole = isinstance(objective, Objective) and select.has_loss(chosen, objective.loss)
    is_whole = is_whole and options.batch_norm is None
    return Plan(layer, goal, peers.pull(peer, peer_mean, weight.shape[0]), chosen, is_whole, update, written)


def rounded(plan: Plan) -> Tensor | None:
    """`[out, in]` for the new weight in the compute dtype, where the forward pass after the update reads that."""
    weight, compute = plan.layer.weight, plan.layer.compute_dtype
    if compute == weight.dtype or plan.update.rule == "grad" or plan.chosen not in select.TAKES_ROUNDED:
        return None
    return weight.new_empty(weight.shape, dtype=compute)
