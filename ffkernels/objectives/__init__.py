"""What a layer learns: from its activities, or sums of their squares, to a loss and its slopes."""

from .classes import CLASS_GOODNESS, CLASS_LOSSES, class_goodness, class_terms, slopes_by_activity
from .given import AnyObjective, GivenLoss, Moments, any_objective
from .head import ProjectionHead
from .judged import Judged
from .objective import DEFAULT_OBJECTIVE, GOODNESS, LOSSES, REDUCTIONS, Objective, short, silu_slope

__all__ = [
    "CLASS_GOODNESS",
    "CLASS_LOSSES",
    "DEFAULT_OBJECTIVE",
    "GOODNESS",
    "LOSSES",
    "REDUCTIONS",
    "AnyObjective",
    "GivenLoss",
    "Judged",
    "Moments",
    "Objective",
    "ProjectionHead",
    "any_objective",
    "class_goodness",
    "class_terms",
    "short",
    "silu_slope",
    "slopes_by_activity",
]
