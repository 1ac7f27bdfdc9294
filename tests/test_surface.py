"""Random steps over the whole surface of `linear_step_`, every element within its bound; `make fuzz` draws more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ffkernels as ff
from ffkernels.backends.eager import step as eager_step
from ffkernels.backends.native import library

from .bounds import check_case, check_forward
from .steps import problem
from .surface import cases

BACKENDS = [
    "eager",
    pytest.param("native", marks=pytest.mark.skipif(library.load().library is None, reason=library.load().reason)),
]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_element_is_within_its_bound(backend, data):
    case = data.draw(cases(backend))
    blocks = data.draw(st.booleans()) if backend == "eager" else False
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 8)
            patch.setattr(eager_step, "MIN_BLOCK_ROWS", 3)
            patch.setattr(eager_step, "BLOCK_ELEMENTS", 8)
        check_case(case, backend)
        check_forward(case, backend)


def after_a_large_gradient(backend: str) -> None:
    """With beta1 = 0 Adam's average is the gradient, whatever it was before: also beside one 1e6 times as large."""
    made = problem(dtype=torch.float32)
    gradient = made.copy()
    ff.linear_step_(made.x_pos, made.x_neg, gradient.weight, gradient.bias, None, backend=backend)
    optimizer = torch.optim.Adam([made.weight, made.bias], lr=0.0, betas=(0.0, 0.9))
    for parameter in (made.weight, made.bias):
        moment = torch.full_like(parameter, 1e4)
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": moment, "exp_avg_sq": moment**2}
    ff.linear_step_(made.x_pos, made.x_neg, made.weight, made.bias, optimizer, backend=backend)
    for parameter, other in ((made.weight, gradient.weight), (made.bias, gradient.bias)):
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], other.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_gradient_after_a_large_one(backend):
    after_a_large_gradient(backend)


def after_a_large_mean(backend: str) -> None:
    """Without momentum the mean activity is this batch's, whatever it was before."""
    made = problem(dtype=torch.float32)
    mean = torch.full((len(made.weight),), 1e4)
    peer = ff.PeerNormalisation(momentum=0.0, strength=0.0)
    options = {"outputs": "pre", "activation": "identity", "backend": backend}
    result = ff.linear_step_(made.x_pos, made.x_neg, made.weight, made.bias, None, peer=peer, peer_mean=mean, **options)
    torch.testing.assert_close(mean, result.pos.double().mean(0).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_mean_after_a_large_one(backend):
    after_a_large_mean(backend)
