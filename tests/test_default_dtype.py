"""`torch.set_default_dtype` changes no number: what a call makes is in the dtype of what it was given."""

from __future__ import annotations

import pytest
import torch

import ffkernels as ff
from ffkernels import negatives
from ffkernels.backends import select
from ffkernels.objectives import GOODNESS, LOSSES

from .steps import problem, state_of

BACKENDS = ["eager", "native"] if select.load("native").library.load().library is not None else ["eager"]


def steps(backend: str) -> list[torch.Tensor]:
    found = []
    for loss in LOSSES:
        for goodness in GOODNESS:
            for optimizer in ("adam", "sgd-momentum", "rmsprop"):
                p = problem(optimizer=optimizer, dtype=torch.float32)
                objective = ff.Objective(goodness=goodness, loss=loss, threshold=(1.0, 3.0), reduction="sum_of_means")
                peer = {"peer": ff.PeerNormalisation(), "peer_mean": torch.full((7,), 0.5, dtype=torch.float32)}
                result = ff.linear_step_(
                    p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, backend=backend, **peer
                )
                # In what dtype RMSprop counts its steps is torch's affair.
                kept = [value for name, value in state_of(p).items() if not name.endswith(".step")]
                found += [*kept, result.y, result.sumsq, result.goodness, result.loss]
    return found


def layers_of_the_api(backend: str) -> list[torch.Tensor]:
    net = ff.FFNetwork([ff.FFLinear(16, 12, backend=backend, dtype=torch.float32) for _ in range(1)])
    x, labels = torch.rand(9, 16, dtype=torch.float32), torch.arange(9) % 4
    y, q = ff.linear_forward(x, torch.randn(5, 16, dtype=torch.float32), activation="gelu")
    goodness = q.detach().requires_grad_()
    loss = ff.goodness_loss(goodness, labels > 1)
    return [
        y, q, loss, *torch.autograd.grad(loss, goodness),
        net.features(x, num_classes=4), net.predict(x, 4), net.goodness(x),
        ff.shared_product(x, net.layers[0].weight, 4),
        negatives.overlay_label(x, labels, 4), negatives.neutral_label(x, 4), negatives.wrong_label(labels, 4),
        negatives.hybrid_images(x), negatives.random_masks(3, 4, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [steps, layers_of_the_api])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits(default, make, backend):
    torch.manual_seed(1)
    expected = make(backend)
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(1)
        found = make(backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), i
