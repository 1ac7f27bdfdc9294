"""The layer step in two launches, in Triton, for NVIDIA (compute capability 8.0 and newer) and AMD GPUs.

Kernels: `forward.py`, `peers.py`, `coefficient.py`, `update.py` and `finish.py` hold one each, in the order of a step;
`slopes.py` those of an update with given slopes, `common.py` and `rules.py` what they share. On the host: `step.py` has
the operators, `launch.py` the launches, `operands.py` makes what these are given, `device.py` and `configs.py` say what
they run on. Between the two: `records.py`.
A convolution's: `conv_forward.py`, `pools.py`, `conv_slopes.py` and `conv_update.py`, on `windows.py`; `conv.py` has
its operators and launches.
Nothing here imports Triton before a call needs it, so the package works where Triton is missing.
"""

from __future__ import annotations

from typing import Any

from .support import LOSSES, unsupported

__all__ = [
    "LOSSES", "conv2d_forward", "conv2d_forward_like", "conv2d_gradients_", "linear_forward_", "linear_step_",
    "linear_update_", "unsupported",
]  # fmt: skip


def linear_forward_(*args: Any) -> None:
    """See `ops.SCHEMAS`."""
    from . import step

    step.linear_forward_(*args)


def linear_step_(*args: Any) -> None:
    """See `ops.SCHEMAS`."""
    from . import step

    step.linear_step_(*args)


def linear_update_(*args: Any) -> None:
    """See `ops.SCHEMAS`."""
    from . import step

    step.linear_update_(*args)


def conv2d_forward(*args: Any) -> Any:
    """See `ops.SCHEMAS`."""
    from . import conv

    return conv.conv2d_forward(*args)


def conv2d_forward_like(*args: Any) -> Any:
    """What `conv2d_forward` returns, of tensors without numbers."""
    from . import conv

    return conv.conv2d_forward_like(*args)


def conv2d_gradients_(*args: Any) -> Any:
    """See `ops.SCHEMAS`."""
    from . import conv

    return conv.conv2d_gradients_(*args)
