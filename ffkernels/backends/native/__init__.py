"""The layer step in compiled code for CPUs: `csrc/cpu`, called through ctypes.

Tiles of the forward product get scale, bias, activation and sum of squares while they are in registers; tiles of the
weight gradient go to the optimizer's rule from there. Where the library was not built, calls go to the next backend.
"""

from .maps import conv2d_forward, conv2d_forward_like, conv2d_gradients_
from .step import LOSSES, linear_forward_, linear_step_, linear_steps_, linear_update_, prepare, unsupported

__all__ = [
    "LOSSES", "conv2d_forward", "conv2d_forward_like", "conv2d_gradients_", "linear_forward_", "linear_step_",
    "linear_steps_", "linear_update_", "prepare", "unsupported",
]  # fmt: skip
