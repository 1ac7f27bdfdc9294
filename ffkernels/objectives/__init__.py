"""What a layer learns: from its activities, or sums of their squares, to a loss and its slopes."""

from .batchnorm import (
    Standardised,
    StandardisedMoments,
    joint_statistics,
    move,
    pivot_of,
    standardise,
    standardise_moments,
    summed,
    through,
    through_moments,
)
from .classes import (
    CLASS_GOODNESS,
    CLASS_LOSSES,
    by_unit,
    class_goodness,
    class_terms,
    dense,
    goodness_of_sums,
    moments_goodness,
    slopes_by_activity,
)
from .given import AnyObjective, GivenLoss, Moments, any_objective
from .head import Form, ProjectionHead
from .judged import Judged
from .objective import DEFAULT_OBJECTIVE, GOODNESS, LOSSES, REDUCTIONS, Objective, short, silu_slope, softplus

__all__ = [
    "CLASS_GOODNESS",
    "CLASS_LOSSES",
    "DEFAULT_OBJECTIVE",
    "GOODNESS",
    "LOSSES",
    "REDUCTIONS",
    "AnyObjective",
    "Form",
    "GivenLoss",
    "Judged",
    "Moments",
    "Objective",
    "ProjectionHead",
    "Standardised",
    "StandardisedMoments",
    "any_objective",
    "by_unit",
    "class_goodness",
    "class_terms",
    "dense",
    "goodness_of_sums",
    "joint_statistics",
    "moments_goodness",
    "move",
    "pivot_of",
    "short",
    "silu_slope",
    "slopes_by_activity",
    "softplus",
    "standardise",
    "standardise_moments",
    "summed",
    "through",
    "through_moments",
]
