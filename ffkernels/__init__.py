"""ffkernels: fast, exact kernels for the Forward-Forward algorithm."""

from .functional import StepResult, explain, linear_forward, linear_step_
from .negatives import hybrid_images, neutral_label, overlay_label, wrong_label
from .nn import FFLinear, FFNetwork
from .objective import Objective

__version__ = "0.1.0"

__all__ = [
    "FFLinear",
    "FFNetwork",
    "Objective",
    "StepResult",
    "explain",
    "hybrid_images",
    "linear_forward",
    "linear_step_",
    "neutral_label",
    "overlay_label",
    "wrong_label",
]
