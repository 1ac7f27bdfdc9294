"""ffkernels: fast, exact kernels for the Forward-Forward algorithm."""

from ._version import __version__
from .functional import StepResult, explain, goodness_loss, linear_forward, linear_step_, shared_product
from .given import GivenLoss, Moments
from .negatives import hybrid_images, neutral_label, overlay_label, wrong_label
from .nn import FFLinear, FFNetwork, GraphedStep
from .objective import Objective
from .peer import PeerNormalisation

__all__ = [
    "FFLinear",
    "FFNetwork",
    "GivenLoss",
    "GraphedStep",
    "Moments",
    "Objective",
    "PeerNormalisation",
    "StepResult",
    "__version__",
    "explain",
    "goodness_loss",
    "hybrid_images",
    "linear_forward",
    "linear_step_",
    "neutral_label",
    "overlay_label",
    "shared_product",
    "wrong_label",
]
