"""What was checked once is kept until something changes: whatever changes between two steps, the next one heeds it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels import optim
from ffkernels.functional import plan

from .steps import Problem, problem, state_of


class Steps:
    """A layer that steps under options which a change may replace."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        torch.manual_seed(3)
        p = problem(dtype=torch.float32)
        self.weight, self.bias, self.x = p.weight, p.bias, (p.x_pos, p.x_neg)
        self.optimizer = make([p.weight, p.bias])
        self.options: dict = {}

    def step(self) -> ff.StepResult:
        return ff.linear_step_(*self.x, self.weight, self.bias, self.optimizer, **self.options)

    def numbers(self) -> dict[str, torch.Tensor]:
        return state_of(Problem(self.weight, self.bias, self.optimizer, *self.x))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adam(parameters, lr=0.1)


def with_tensors(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adam(parameters, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)), capturable=False)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SGD(parameters, lr=0.1)


def group(s: Steps) -> dict:
    return s.optimizer.param_groups[0]


def set_group(**values: object) -> Callable[[Steps], object]:
    return lambda s: group(s).update(values)


def set_options(**values: object) -> Callable[[Steps], object]:
    return lambda s: s.options.update(values)


def other_state(s: Steps) -> None:
    changed = s.optimizer.state_dict()
    changed["state"] = {
        i: {k: v + 1 for k, v in kept.items() if isinstance(v, torch.Tensor)} for i, kept in changed["state"].items()
    }
    s.optimizer.load_state_dict(changed)


def other_data(s: Steps) -> None:
    s.weight.data = s.weight.data.t().contiguous().t() * 2


def moved_state(s: Steps) -> None:
    average = s.optimizer.state[s.weight]["exp_avg"]
    average.data = average.data * 3


def a_hook(s: Steps) -> None:
    s.weight.register_hook(lambda gradient: gradient * 3)


def a_step_hook(s: Steps) -> None:
    s.optimizer.register_step_post_hook(lambda *_: s.weight.data.mul_(0.5))


def with_peer(s: Steps) -> None:
    s.options = {"peer": ff.PeerNormalisation(strength=1.0), "peer_mean": torch.full((7,), 0.5)}


def other_bias(s: Steps) -> None:
    s.bias = nn.Parameter(torch.full_like(s.bias, 0.3))
    s.optimizer.add_param_group({"params": [s.bias]})


CHANGES = {
    "lr": (adam, set_group(lr=0.5)),
    "betas": (adam, set_group(betas=(0.5, 0.6))),
    "decay": (adam, set_group(weight_decay=0.3)),
    "maximize": (sgd, set_group(maximize=True)),
    "another lr tensor": (with_tensors, set_group(lr=torch.tensor(0.7))),
    "lr tensor in place": (with_tensors, lambda s: group(s)["lr"].fill_(0.7)),
    "betas in place": (with_tensors, lambda s: group(s)["betas"][0].fill_(0.2)),
    "momentum begins": (sgd, set_group(momentum=0.9)),
    "state": (adam, other_state),
    "data": (adam, other_data),
    "state elsewhere": (adam, moved_state),
    "hook": (adam, a_hook),
    "step hook": (adam, a_step_hook),
    "bias": (adam, other_bias),
    "no bias": (adam, lambda s: setattr(s, "bias", None)),
    "activation": (adam, set_options(activation="identity")),
    "eps": (adam, set_options(eps=0.5)),
    "objective": (adam, set_options(objective=ff.Objective(loss="symba"))),
    "outputs": (adam, set_options(outputs="none")),
    "compute dtype": (adam, set_options(compute_dtype=torch.bfloat16)),
    "skip_below": (adam, set_options(skip_below=0.6)),
    "peer": (adam, with_peer),
    "backend": (adam, set_options(backend="eager")),
    "rows": (adam, lambda s: setattr(s, "x", (s.x[0][:2] * 2, s.x[1][:3]))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_heeded(name):
    """The step after it is that of a package that keeps nothing."""
    make, change = CHANGES[name]
    found = []
    for keeps in (True, False):
        s = Steps(make)
        for at in range(5):
            if at == 3:
                before = {key: value.clone() for key, value in s.numbers().items()}
                change(s)
            if not keeps:
                plan._kept.clear()
            result = s.step()
        assert any(not torch.equal(value, before.get(key, value + 1)) for key, value in s.numbers().items())
        found.append({**s.numbers(), "loss": result.loss, "sumsq": result.sumsq})
    kept, fresh = found
    assert kept.keys() == fresh.keys()
    for key in kept:
        assert torch.equal(kept[key], fresh[key]), key


def test_a_threshold_that_changes_in_place():
    losses = []
    for keeps in (True, False):
        s = Steps(adam)
        s.options["objective"] = ff.Objective(threshold=torch.tensor(2.0))
        for at in range(4):
            if at == 3:
                s.options["objective"].threshold.fill_(0.2)
            if not keeps:
                plan._kept.clear()
            result = s.step()
        losses.append(result.loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.weight.requires_grad_(False), "weight has requires_grad=False"),
        (lambda s: setattr(s.weight, "data", s.weight.data.double()), "weight|bias is torch"),
        (lambda s: setattr(s.weight, "data", s.weight.data[:, :3]), "x_pos has 5 columns|exp_avg is"),
        (lambda s: group(s)["params"].pop(0), "does not hold weight"),
        (lambda s: group(s)["params"].append(s.weight), "holds weight .* more than once"),
        (lambda s: group(s).pop("lr"), "has no 'lr' in its group"),
        (lambda s: setattr(s.bias, "data", s.weight.data.view(-1)[:7]), "bias shares memory with weight"),
        (lambda s: s.options.update(eps=True), "eps=True is not a number"),
        (lambda s: s.options.update(eps=torch.ones(3)), "eps="),
        (lambda s: s.options.update(skip_below=False), "skip_below=False is not a number"),
        (lambda s: group(s).update(lr=torch.ones(2)), "lr has shape"),
        (lambda s: setattr(s, "x", (s.weight[:, :5].detach(), s.x[1])), "x_pos shares memory with weight"),
        (lambda s: s.options.update(backend="none"), "backend='none' is not a backend"),
    ],
)
def test_what_became_wrong_is_refused(change, said):
    s = Steps(adam)
    for _ in range(3):
        s.step()
    change(s)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=said):
            s.step()


def test_autocast_and_the_environment_are_seen(monkeypatch):
    s = Steps(adam)
    for _ in range(3):
        assert s.step().y.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert s.step().y.dtype == torch.bfloat16
    assert s.step().y.dtype == torch.float32
    monkeypatch.setenv("FFKERNELS_BACKEND", "none")
    with pytest.raises(ValueError, match="FFKERNELS_BACKEND='none' is not a backend"):
        s.step()


def test_nothing_outlives_its_optimizer():
    s = Steps(adam)
    for _ in range(3):
        s.step()
    seen = [weakref.ref(t) for t in (s.weight, s.bias, s.optimizer)]
    assert plan._kept[s.optimizer]
    del s
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


def test_the_plan_is_kept():
    s = Steps(adam)
    s.step()
    s.step()
    first = plan._kept[s.optimizer][id(s.weight)].plan
    s.step()
    assert plan._kept[s.optimizer][id(s.weight)].plan is first
    assert optim.again(s.optimizer, optim.Reading(s.optimizer), first.update) is first.update
