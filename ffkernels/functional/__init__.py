"""The public functions: check the arguments, choose a backend, call the operator, hand back the result."""

from .conv import conv2d_forward, conv2d_step_
from .explanation import explain
from .forward import finds_copies, linear_forward, shared_product
from .loss import goodness_loss
from .result import StepResult
from .scff import ScffResult, scff_forward, scff_step_
from .step import linear_step_

__all__ = [
    "ScffResult",
    "StepResult",
    "conv2d_forward",
    "conv2d_step_",
    "explain",
    "finds_copies",
    "goodness_loss",
    "linear_forward",
    "linear_step_",
    "scff_forward",
    "scff_step_",
    "shared_product",
]
