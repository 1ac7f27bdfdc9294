"""Which way a step takes, in words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import optim
from .. import peer as peers
from .. import validation as check
from ..backends import select
from ..objectives import DEFAULT_OBJECTIVE, AnyObjective, Objective, any_objective
from ..peer import PeerNormalisation
from .maps import PoolOf, checked_geometry, compute_dtype_of, conv_tensors


def explain(
    weight: Tensor,
    optimizer: Optimizer | None = None,
    *,
    objective: AnyObjective | Callable[..., Tensor] = DEFAULT_OBJECTIVE,
    activation: str = "relu",
    compute_dtype: torch.dtype | None = None,
    peer: PeerNormalisation | None = None,
    skip_below: float = 0.0,
    pool: PoolOf = None,
    backend: str | None = None,
) -> str:
    """Says which backend a layer step runs on, why each other one is passed over, and how the update runs.

    Of a weight `[out, in / groups, k, k]` it is the step of a convolution with that `pool`.

    Raises:
        ValueError, TypeError: for an argument that does not fit, and where a forced backend cannot run it, as the step
            itself would.
    """
    geometry = None
    if isinstance(weight, Tensor) and weight.dim() == 4:
        geometry = checked_geometry(1, 0, "zeros", 1, pool)
        conv_tensors(weight, None, geometry)
        if peer is not None:
            raise ValueError("peer came with a convolution's weight, which has no peer normalisation; accepted: None")
    else:
        check.layer_tensors(weight, None)
        if pool is not None:
            raise ValueError(f"pool={pool!r} came with a linear layer's weight; accepted: None")
    check.optimizer_object(optimizer)
    objective = any_objective(objective)
    check.objective_alone(objective, skip_below, len(weight))
    head = check.head(objective, weight)
    check.one_of("activation", activation, check.ACTIVATIONS)
    check.peer_object(peer)
    compute = (check.compute_dtype_of if geometry is None else compute_dtype_of)(compute_dtype, weight)
    rule, update = optim.fused_rule(optimizer, weight, *(() if head is None else (head,)))
    if optimizer is not None and rule == "grad":
        optim.steps_on_gradients(optimizer)
    check.fraction("skip_below", skip_below)
    request = select.Request(
        weight.device,
        weight.dtype,
        compute,
        activation,
        rule,
        peers.gradient_of(peer),
        skips=skip_below > 0,
        geometry=geometry,
    )
    chosen = select.choose(request, backend)
    forced, source = select.forced_backend(backend)
    because = "first that can run it" if forced is None else f"forced by {source}"
    lines = [f"backend: {chosen} ({because}) for {weight.dtype} on {weight.device}, products in {compute}"]
    for name, reason in select.verdicts(request).items():
        if name != chosen:
            lines.append(f"  passed over: {name}: {reason or 'comes later in the order of preference'}")
    if geometry is None and isinstance(objective, Objective) and select.has_loss(chosen, objective.loss):
        loss = f"{objective.loss}, which the backend knows: one call"
    else:
        loss = "in plain PyTorch, between the backend's forward and its update"
    return "\n".join([*lines, f"loss: {loss}", f"update: {update}"])
