"""ffkernels: fast, exact kernels for the Forward-Forward algorithm."""

from . import parallel
from ._version import __version__
from .functional import (
    StepResult,
    conv2d_forward,
    conv2d_step_,
    explain,
    goodness_loss,
    linear_forward,
    linear_step_,
    scff_forward,
    scff_step_,
    shared_product,
)
from .negatives import hybrid_images, neutral_label, overlay_label, wrong_label
from .nn import FFConv2d, FFLinear, FFNetwork, GraphedStep, SCFFConv2d, Shortcut
from .objectives import GivenLoss, Moments, Objective, ProjectionHead
from .peer import PeerNormalisation

__all__ = [
    "FFConv2d",
    "FFLinear",
    "FFNetwork",
    "GivenLoss",
    "GraphedStep",
    "Moments",
    "Objective",
    "PeerNormalisation",
    "ProjectionHead",
    "SCFFConv2d",
    "Shortcut",
    "StepResult",
    "__version__",
    "conv2d_forward",
    "conv2d_step_",
    "explain",
    "goodness_loss",
    "hybrid_images",
    "linear_forward",
    "linear_step_",
    "neutral_label",
    "overlay_label",
    "parallel",
    "scff_forward",
    "scff_step_",
    "shared_product",
    "wrong_label",
]
