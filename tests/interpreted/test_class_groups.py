"""Steps of class groups and of learned heads through the public functions, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

import ffkernels as ff
from ffkernels.objectives import CLASS_GOODNESS, CLASS_LOSSES

from ..test_class_groups import check
from ..test_projection_head import FORMS
from ..test_projection_head import test_a_step_is_that_of_autograd as check_head


def step_of(objective: ff.Objective, units: int, rows: int = 9, weighted: bool = True, **options) -> dict:
    given = {"norm": "l2", "eps_mode": "add", "activation": "relu", "outputs": "post", **options}
    return {
        "objective": objective, "options": given, "rows": rows, "units": units, "optimizer": "adam",
        "weighted": weighted, "seed": 3,
    }  # fmt: skip


# Groups that do not divide the width, borders inside of tiles, a class alone, one unit for each class; and groups so
# large that the forward sums them up itself.
@pytest.mark.parametrize(("units", "classes"), [(8, 3), (37, 5), (6, 1), (19, 19), (70, 3), (43, 1)])
@pytest.mark.parametrize("goodness", CLASS_GOODNESS)
@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_every_loss_and_goodness(loss, goodness, units, classes):
    objective = ff.Objective(loss=loss, classes=classes, goodness=goodness, threshold=0.5, temperature=0.5)
    check(step_of(objective, units), "triton", torch.float32, 2e-5)


@pytest.mark.parametrize("activation", ["gelu", "leaky_relu"])
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_other_layers(norm, activation):
    objective = ff.Objective(
        loss="cross_entropy", classes=3, goodness="activity", maximize=False, label_smoothing=0.1
    )  # fmt: skip
    drawn = step_of(objective, 20, rows=23, weighted=False, norm=norm, activation=activation, outputs="pre")
    check(drawn, "triton", torch.float32, 2e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("form", FORMS)
def test_learned_heads(form, activation):
    check_head(form, "adam", activation, "triton", torch.float32, 2e-5)
