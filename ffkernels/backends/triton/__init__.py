"""The layer step in two launches, in Triton, for NVIDIA (compute capability 8.0 and newer) and AMD GPUs.

`forward.py`, `coefficient.py` and `update.py` hold a kernel each, `common.py` what they share, `step.py` the operators.
Nothing here imports Triton before a call needs it, so the package works where Triton is missing.
"""

from __future__ import annotations

from typing import Any

from .support import unsupported

__all__ = ["linear_forward", "linear_step_", "unsupported"]


def linear_forward(*args: Any) -> Any:
    """See `ops.SCHEMAS`."""
    from . import step

    return step.linear_forward(*args)


def linear_step_(*args: Any) -> None:
    """See `ops.SCHEMAS`."""
    from . import step

    step.linear_step_(*args)
