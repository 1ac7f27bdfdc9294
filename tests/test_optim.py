"""The caller's optimizer: its state, its groups, its schedulers, and what does not run fused."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels import optim, reference

from .steps import OPTIMIZERS, Problem, assert_same_state, error, problem

FUSED = [name for name in OPTIMIZERS if name not in ("rmsprop", "adam-amsgrad")]


def step(p: Problem, by=ff.linear_step_, **options):
    return by(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=ff.Objective(), **options)


@pytest.mark.parametrize("name", FUSED)
def test_state_dict_loads_into_a_plain_optimizer(name):
    """Ten steps here, then ten of plain torch on the loaded state, equal twenty of plain torch."""
    ours = problem(optimizer=name)
    theirs = ours.copy()
    for _ in range(10):
        step(ours), step(theirs, reference.linear_step_)
    assert ours.weight.grad is None, "the fused update leaves .grad alone"
    taken_over = ours.copy()
    for _ in range(10):
        step(taken_over, reference.linear_step_), step(theirs, reference.linear_step_)
    assert_same_state(taken_over, theirs, 1e-9)
    for _ in range(10):
        step(ours)
    assert_same_state(ours, theirs, 1e-9)


def test_weight_and_bias_in_groups_of_their_own():
    ours = problem()
    theirs = ours.copy()
    made = [
        p._replace(
            optimizer=SGD([{"params": [p.weight], "weight_decay": 0.1}, {"params": [p.bias], "lr": 0.7}], lr=0.1)
        )
        for p in (ours, theirs)
    ]
    for _ in range(3):
        step(made[0]), step(made[1], reference.linear_step_)
    assert_same_state(*made, 1e-10)


def test_one_optimizer_for_several_layers_moves_only_the_layer_that_steps():
    first, second = problem(), problem(in_features=7)
    parameters = [first.weight, first.bias, second.weight, second.bias]
    for kind in (torch.optim.RMSprop, SGD, Adam):
        optimizer = kind(parameters, lr=0.1)
        second.weight.grad = torch.ones_like(second.weight)
        before = second.weight.detach().clone()
        moved = first.weight.detach().clone()
        step(first._replace(optimizer=optimizer))
        assert torch.equal(second.weight, before)
        assert torch.equal(second.weight.grad, torch.ones_like(before)), "a gradient that waits stays"
        assert not torch.equal(first.weight, moved)
        assert second.weight not in optimizer.state


class Doubled(SGD):
    """A subclass may do anything in `step`."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(2 * p.grad)


def test_decoupled_decay_is_what_it_says():
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = optim.SGDW([p], lr=0.1, momentum=0.5, decoupled=2.0)
    expected, buffer = p.detach().clone(), 0.0
    for _ in range(3):
        p.grad = p.detach().clone() + 1
        buffer = 0.5 * buffer + p.grad
        expected = expected * (1 - 0.1 * 2.0) - 0.1 * buffer
        optimizer.step()
        assert error(p, expected) < 1e-15
    with pytest.raises(ValueError, match="decoupled=-1"):
        optim.SGDW([p], decoupled=-1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    assert optim.fused_rule(optimizer)[0] == "grad"


def test_subclasses_and_hooks_run_their_own_step():
    ours = problem()
    before = ours.weight.detach().clone()
    step(ours._replace(optimizer=Doubled([ours.weight, ours.bias], lr=0.1)))
    assert error(before - 2 * ours.weight.grad, ours.weight) < 1e-15

    hooked = problem()
    calls = []
    hooked.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step(hooked)
    assert calls == [1]
    assert optim.fused_rule(hooked.optimizer)[0] == "grad"


def test_a_replaced_step_runs():
    """Unless it is a scheduler's, which only notes that it was called."""
    p = problem(optimizer="sgd", dtype=torch.float32)
    torch.optim.lr_scheduler.StepLR(p.optimizer, 1)
    assert optim.fused_rule(p.optimizer)[0] == "sgd"
    calls = []
    p.optimizer.step = lambda: calls.append(p.weight.grad)
    before = p.weight.detach().clone()
    step(p)
    assert len(calls) == 1 and calls[0].abs().sum() > 0 and torch.equal(p.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["sgd-momentum", "adam"])
@pytest.mark.parametrize("how", ["cast", "other shape", "other device"])
def test_state_that_is_not_like_its_parameter_is_refused(how, name, dtype):
    """A backend would read and write beyond it, or take its bits for other numbers."""
    p = problem(optimizer=name, dtype=dtype)
    step(p)
    changed = {
        "cast": lambda t: t.to(torch.float64 if dtype == torch.float32 else torch.float32),
        "other shape": lambda t: t[:, 1:].clone(),
        "other device": lambda t: t.to("meta"),
    }[how]
    state = p.optimizer.state[p.weight]
    key = "momentum_buffer" if name == "sgd-momentum" else "exp_avg_sq"
    state[key] = changed(state[key])
    before = p.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"the optimizer's {key} is torch.float.* accepted: {dtype} \(7, 5\) on cpu"):
        step(p)
    assert torch.equal(p.weight, before)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_step_count_in_float64_counts(backend):
    """torch makes one where float64 is the default dtype, for parameters of any."""
    ours = problem(optimizer="adam", dtype=torch.float32)
    theirs = ours.copy()
    for p, by in ((ours, ff.linear_step_), (theirs, reference.linear_step_)):
        for i in range(3):
            step(p, by, **({"backend": backend} if by is ff.linear_step_ else {}))
            for parameter in (p.weight, p.bias):
                state = p.optimizer.state[parameter]
                state["step"] = state["step"].double()
                assert state["step"] == i + 1
    assert_same_state(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_a_failed_step_leaves_everything_as_it_was(name, monkeypatch):
    from ffkernels.backends.eager import gradient

    p = problem(optimizer=name)
    step(p)
    kept = {key: value.clone() for key, value in _everything(p).items()}

    def fail(self, *args):
        raise MemoryError("no more")

    monkeypatch.setattr(gradient.Gradient, "_panel", fail)
    with pytest.raises(MemoryError):
        step(p)
    fresh = problem(optimizer=name)
    with pytest.raises(MemoryError):
        step(fresh)
    assert not fresh.optimizer.state
    assert all(torch.equal(value, kept[key]) for key, value in _everything(p).items())


def _everything(p: Problem):
    from .steps import state_of

    return state_of(p)


def test_updates_bump_the_version_counter():
    """Autograd must notice that a tensor saved for backward has been written."""
    p = problem()
    before = p.weight._version
    step(p)
    assert p.weight._version > before
