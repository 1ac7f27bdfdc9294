"""Every wrong call of `wrong_calls.py` meets an error that names what is wrong, and changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import ffkernels as ff

from .steps import problem, state_of
from .wrong_calls import WRONG_CALLS


def test_names_are_one_each():
    names = [wrong.name for wrong in WRONG_CALLS]
    assert len(set(names)) == len(names)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:The PyTorch API of MaskedTensors")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("wrong", WRONG_CALLS, ids=lambda wrong: wrong.name)
def test_wrong_call(wrong):
    layer = problem(optimizer="adam", dtype=torch.float32)
    ff.linear_step_(layer.x_pos, layer.x_neg, layer.weight, layer.bias, layer.optimizer)
    net = ff.FFNetwork([ff.FFLinear(5, 7)])
    p = SimpleNamespace(**layer._asdict(), mean=torch.full((7,), 0.5), net=net)

    def everything():
        kept = {**state_of(layer), **net.state_dict(), "mean": p.mean, "x_pos": p.x_pos, "x_neg": p.x_neg}
        return {name: value.detach().clone() for name, value in kept.items()}

    before = everything()
    with pytest.raises(wrong.error, match=wrong.words):
        wrong.call(p)
    after = everything()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert layer.weight.grad is None and layer.bias.grad is None
