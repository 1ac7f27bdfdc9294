"""The layer step in closed form, in plain PyTorch: right on every device, and the default where nothing faster is.

It works through the rows in blocks that stay in cache, so that the activities of a large batch are never all there at
once, and through the weight gradient in panels that the optimizer consumes while they are warm.
"""

from ...objectives import LOSSES
from .conv import conv2d_forward, conv2d_forward_like, conv2d_gradients_
from .step import linear_forward_, linear_step_, linear_update_, unsupported

__all__ = [
    "LOSSES", "conv2d_forward", "conv2d_forward_like", "conv2d_gradients_", "linear_forward_", "linear_step_",
    "linear_update_", "unsupported",
]  # fmt: skip
