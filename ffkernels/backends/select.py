"""Chooses the backend a call runs on, and says why the others were passed over.

A backend is a module with the functions that `ops.SCHEMAS` lists, `LOSSES`, those that its `linear_step_` knows, and
`unsupported(request)`, which returns None or the reason why it cannot run a call. `BACKENDS` names them in order of
preference.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..compiling import once_per_trace
from ..spec import Geometry

BACKENDS = {
    "triton": "ffkernels.backends.triton",
    "native": "ffkernels.backends.native",
    "eager": "ffkernels.backends.eager",
}
VARIABLE = "FFKERNELS_BACKEND"
# Whose forward takes the weight as a step has left it in `Outputs.rounded`; the others read the weight itself.
TAKES_ROUNDED = ("triton",)
# Which find out by themselves that the second side's rows are copies of the first side's under other labels, any number
# of times over, and share their products.
FINDS_COPIES = ("native",)
# Whose step also makes the goodness and the forward pass after it, which saves calls.
HANDS_OUT_ALL = ("native",)
# Whose forward also leaves the product of what rows share, of float32 operands and beside label fields up to a width.
LEAVES_PRODUCT = {"native": 128}
# Which have `linear_steps_`, for layers on top of each other in one call: its steps bring what
# `prepare(layer, goal, pull, update)` has made of these records, which saves making it again.
PREPARES = ("native",)
# Whose forward leaves the sums over class groups itself, where groups have so many units that they are few in a tile.
SUMS_CLASSES = {"triton": 21}
# Which write by PyTorch's operations, to which tensors of inference mode are read-only outside of it.
WRITES_BY_TORCH = ("eager",)


class Request(NamedTuple):
    """What a backend needs to know of a call to say whether it can run it; a forward pass has no rule.

    `peer`: None, "straight through" or "gated". `forced`: whether this very backend was asked for, which some ways of
    running are kept for. `skips`: whether rows with small coefficients are left out. `shares`: whether the product of
    what rows have in common is given. `geometry`: of a convolution; None for linear layers. `by_places`: whether a
    gradient comes to each place of its maps.
    """

    device: torch.device
    dtype: torch.dtype
    compute_dtype: torch.dtype
    activation: str
    rule: str | None = None
    peer: str | None = None
    forced: bool = False
    skips: bool = False
    shares: bool = False
    geometry: Geometry | None = None
    by_places: bool = False


@cache
def load(name: str) -> ModuleType:
    """The module of a backend. Import errors surface here: a backend that cannot be imported cannot be forced."""
    return import_module(BACKENDS[name])


def verdicts(request: Request) -> dict[str, str | None]:
    """For each backend in order of preference: None where it can run the call, else the reason why not."""
    return {name: load(name).unsupported(request) for name in BACKENDS}


def choose(request: Request, backend: str | None) -> str:
    """The backend for a call: the one forced by `backend` or the environment, else the first that can run it.

    Raises:
        ValueError: where the forced backend does not exist or cannot run the call.
    """
    return _choose(backend, *request) if torch.compiler.is_compiling() else _chosen(backend, request)


@once_per_trace
def _choose(backend: str | None, *fields: Any) -> str:
    return _chosen(backend, Request(*fields))


def _chosen(backend: str | None, request: Request) -> str:
    forced, source = forced_backend(backend)
    # The environment speaks of linear layers too, which more backends run.
    may_give_way = request.geometry is not None and backend is None and forced in BACKENDS
    if may_give_way and load(str(forced)).unsupported(request._replace(forced=True)) is not None:
        forced = None
    if forced is None:
        for name in BACKENDS:
            if load(name).unsupported(request) is None:
                return name
        raise ValueError(f"no backend can run this call: {verdicts(request)}")
    if not isinstance(forced, str) or forced not in BACKENDS:
        raise ValueError(f"{source}={forced!r} is not a backend of this installation; accepted: {', '.join(BACKENDS)}")
    reason = load(forced).unsupported(request._replace(forced=True))
    if reason is not None:
        raise ValueError(f"{source}={forced!r} cannot run this call: {reason}")
    return forced


@once_per_trace
def has_loss(name: str, loss: str) -> bool:
    """Whether a backend runs a whole step with this loss in one call; on others it goes through `functional.stages`."""
    return loss in load(name).LOSSES


def forced_backend(backend: str | None) -> tuple[str | None, str]:
    """The backend that is forced, if any, and where that was said."""
    if backend is not None:
        return backend, "backend"
    return os.environ.get(VARIABLE) or None, VARIABLE
