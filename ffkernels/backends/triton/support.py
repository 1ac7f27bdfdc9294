"""Which calls the kernels can run, said without importing Triton."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, get_args

import torch

from ...spec import Activation, Rule

if TYPE_CHECKING:
    from ..select import Request

ACTIVATIONS = get_args(Activation)
# Those that coefficient.py has.
LOSSES = ("logistic", "symba", "swish")
RULES = get_args(Rule)
OLDEST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unsupported(request: Request) -> str | None:
    """Why this backend cannot run a call, in one clause; None where it can."""
    if not _installed():
        return "Triton is not installed"
    if request.dtype != torch.float32:
        return f"{str(request.dtype).removeprefix('torch.')} runs on the eager backend"
    if request.geometry is not None and request.compute_dtype == torch.float16:
        return "a convolution's products in float16, whose sums leave that range: has float32 and bfloat16 ones"
    if request.by_places:
        return "a loss of whole maps: has losses of goodness and moments"
    reason = _unsupported_device(request)
    if reason is not None:
        return reason
    if request.geometry is not None and not request.forced:
        return "its convolutions, which no GPU has run yet, run only where they are forced"
    for kind, name, known in (
        ("activation", request.activation, ACTIVATIONS),
        ("update rule", request.rule, RULES),
    ):
        if name is not None and name not in known:
            return f"{kind} {name!r} has no Triton kernel"
    return None


def _unsupported_device(request: Request) -> str | None:
    kind = request.device.type
    if kind == "cpu":
        if not interpreted():
            return "Triton needs a GPU, or TRITON_INTERPRET=1 to run in its interpreter"
        return None if request.forced else "Triton's interpreter, being slow, runs only where it is forced"
    if kind != "cuda":
        return f"Triton kernels run on CUDA and ROCm devices, not on {kind}"
    if interpreted():
        return "TRITON_INTERPRET is set, which is for CPU tensors"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    return _unsupported_capability(request.device.index)


@lru_cache
def _installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # an entry without a spec in sys.modules
        return False


@lru_cache
def _unsupported_capability(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        wanted, found = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
        return f"the kernels need compute capability {wanted} or newer, this device has {found}"
    return None
