"""Losses of the caller's own between the kernels of the forward and of the update."""

from __future__ import annotations

import pytest
import torch

from ..test_given_losses import LITERATURE, check_loss


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("loss", LITERATURE, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_of_the_literature(loss, activation, mixed):
    check_loss(loss, activation, "triton", torch.float32, mixed)
