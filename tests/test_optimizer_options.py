"""Every combination of an optimizer's options: the fused step is what the optimizer's own `step()` does."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop, SparseAdam
from torch.optim import optimizer as torch_optimizer

import ffkernels as ff
from ffkernels import optim, reference
from ffkernels.optim import SGDW

from .steps import assert_same_state, error, problem, state_of

sgd_options = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.4]),
        "maximize": st.booleans(),
    }
).filter(lambda o: not o["nesterov"] or (o["momentum"] and not o["dampening"]))
adam_options = st.fixed_dictionaries(
    {
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.7, 0.0)]),
        "eps": st.sampled_from([1e-2, 1e-1]),
        "weight_decay": st.sampled_from([0.0, 0.4]),
        "maximize": st.booleans(),
        "amsgrad": st.booleans(),
    }
)
made = st.one_of(
    st.tuples(st.just(SGD), sgd_options),
    st.tuples(st.just(SGDW), sgd_options, st.sampled_from([0.0, 0.5])).map(
        lambda t: (t[0], {**t[1], "decoupled": t[2]})
    ),
    st.tuples(st.just(Adam), adam_options),
    st.tuples(st.just(Adam), adam_options).map(lambda t: (t[0], {**t[1], "decoupled_weight_decay": True})),
    st.tuples(st.just(AdamW), adam_options),
)


@given(
    made,
    st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([None, "eager"]),
)
@settings(deadline=None, max_examples=150)
def test_a_fused_step_is_the_optimizers_own(kind_and_options, how, tensor_lr, dtype, backend):
    kind, options = kind_and_options
    if tensor_lr and how.get("foreach"):
        how = {}  # torch refuses a tensor for a learning rate there
    torch.manual_seed(0)
    ours = problem(dtype=dtype)
    theirs = ours.copy()
    runs = []
    for p in (ours, theirs):
        lr = torch.tensor(0.05, dtype=dtype) if tensor_lr else 0.05  # torch itself rounds with a narrower one
        # The bias has a learning rate and a decay of its own.
        groups = [{"params": [p.weight]}, {"params": [p.bias], "lr": 0.02, "weight_decay": options["weight_decay"] / 2}]
        runs.append(p._replace(optimizer=kind(groups, lr=lr, **options, **how)))
    for _ in range(3):
        ff.linear_step_(
            ours.x_pos, ours.x_neg, ours.weight, ours.bias, runs[0].optimizer, outputs="none", backend=backend
        )
        reference.linear_step_(
            *runs[1][3:], theirs.weight, theirs.bias, runs[1].optimizer, objective=ff.Objective(), outputs="none"
        )
    assert_same_state(*runs, 1e-9 if dtype == torch.float64 else 2e-4)


def test_decay_of_one_kind_in_each_group_and_a_number_changed_later():
    """The rule is one for weight and bias, and is asked for at every step."""
    ours = problem()
    theirs = ours.copy()
    runs = []
    for p in (ours, theirs):
        groups = [{"params": [p.weight], "decoupled": 0.5}, {"params": [p.bias], "weight_decay": 0.5}]
        runs.append(p._replace(optimizer=SGDW(groups, lr=0.1)))
    for i in range(3):
        for p, step in zip(runs, (ff.linear_step_, reference.linear_step_), strict=True):
            step(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=ff.Objective())
            if i == 1:
                p.optimizer.param_groups[0].update(decoupled=0.0, weight_decay=0.3)
                assert optim.fused_rule(p.optimizer)[0] == "sgd"
    assert_same_state(*runs, 1e-10)


def test_sgdw_takes_over_the_state_of_an_sgd():
    ours = problem()
    sgd = SGD([ours.weight, ours.bias], lr=0.1, momentum=0.9)
    ff.linear_step_(ours.x_pos, ours.x_neg, ours.weight, ours.bias, sgd)
    sgdw = SGDW([ours.weight, ours.bias], lr=0.3, decoupled=0.5)
    sgdw.load_state_dict(sgd.state_dict())
    assert [sgdw.param_groups[0][key] for key in ("lr", "momentum", "decoupled")] == [0.1, 0.9, 0.5]
    before, buffer = ours.weight.detach().clone(), sgd.state[ours.weight]["momentum_buffer"].clone()
    ours.weight.grad = torch.ones_like(ours.weight)
    sgdw.step()
    assert error(ours.weight, before * (1 - 0.1 * 0.5) - 0.1 * (0.9 * buffer + 1)) < 1e-14


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "old pickle"])
def test_a_copied_sgdw_takes_further_groups(how):
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    other = SGDW([p], lr=0.1, decoupled=0.5)
    if how == "old pickle":
        del other.defaults["decoupled"]  # which kept it beside the defaults, where no pickle looked
    other = copy.deepcopy(other) if how == "deepcopy" else pickle.loads(pickle.dumps(other))
    added = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
    other.add_param_group({"params": [added]})
    added.grad = torch.zeros_like(added)
    other.step()
    assert added.tolist() == pytest.approx([1.9, 1.9])


def test_step_hooks_of_an_sgdw_run_once_a_step():
    """SGD's own step, of which it makes use, would call them again."""
    p = nn.Parameter(torch.ones(3))
    SGD([p])
    calls = []
    optimizer = SGDW([p], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    p.grad = torch.ones(3)
    optimizer.step()
    assert calls == ["before", "after"] and p.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda o, p: o.state[p].pop("exp_avg_sq"), r"\(Adam\) has no 'exp_avg_sq' in its group or state of weight"),
        (lambda o, p: o.state[p].pop("step"), "has no 'step' in"),
        (lambda o, p: o.param_groups[0].pop("betas"), "has no 'betas' in"),
        (lambda o, p: o.load_state_dict(SGD(o.param_groups[0]["params"]).state_dict()), "has no 'betas' in"),
        (lambda o, p: o.param_groups[0]["params"].append(p), "holds weight .* more than once"),
        (lambda o, p: o.param_groups.append({**o.param_groups[0], "params": [p]}), "holds weight .* more than once"),
    ],
)
def test_an_optimizer_that_lacks_something_is_named(spoil, words):
    p = problem(optimizer="adam")
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    spoil(p.optimizer, p.weight)
    before = {key: value.clone() for key, value in state_of(p).items()}
    with pytest.raises(ValueError, match=words):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    assert all(torch.equal(value, before[key]) for key, value in state_of(p).items())


class NeedsClosure(SGD):
    def step(self, closure):
        closure()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (LBFGS, "LBFGS, whose step.. cannot be called without closure"),
        (SparseAdam, "SparseAdam, which takes sparse gradients only"),
        (NeedsClosure, "NeedsClosure, whose step.. cannot be called without closure"),
    ],
)
@pytest.mark.parametrize("watched", [False, True])
def test_optimizers_that_want_more_than_gradients_are_refused_before_anything_is_written(kind, words, watched):
    layer = ff.FFLinear(5, 4, peer=None if watched else ff.PeerNormalisation())
    if watched:
        layer.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=words):
        layer.step(torch.rand(3, 5), torch.rand(3, 5), kind(layer.parameters(), lr=0.1))
    assert layer.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_step_that_is_interrupted_gives_back_the_gradients_that_wait():
    first, second = problem(), problem()

    class Interrupted(RMSprop):
        def step(self, closure=None):
            assert second.weight.grad is None
            raise KeyboardInterrupt

    waiting = second.weight.grad = torch.ones_like(second.weight)
    optimizer = Interrupted([first.weight, first.bias, second.weight], lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        ff.linear_step_(first.x_pos, first.x_neg, first.weight, first.bias, optimizer)
    assert second.weight.grad is waiting
    optimizer = RMSprop([first.weight, first.bias, second.weight], lr=0.1)
    ff.linear_step_(first.x_pos, first.x_neg, first.weight, first.bias, optimizer)
    assert second.weight.grad is waiting and second.weight not in optimizer.state


@pytest.mark.parametrize("name", ["rmsprop", "adam", "hooked adam"])
def test_threads_share_an_optimizer_each_with_a_layer_of_its_own(name):
    kind = RMSprop if name == "rmsprop" else Adam
    layers = [ff.FFLinear(12, 8) for _ in range(4)]
    others = copy.deepcopy(layers)
    rows = torch.rand(4, 2, 6, 12)
    shared = kind([p for layer in layers for p in layer.parameters()], lr=0.01)
    alone = [kind(layer.parameters(), lr=0.01) for layer in others]
    if name.startswith("hooked"):
        for layer in (*layers, *others):
            layer.weight.register_hook(lambda g: g * 2)
    failed = []

    def train(layer, x):
        try:
            for _ in range(60):
                layer.step(x[0], x[1], shared)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=pair) for pair in zip(layers, rows, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for other, x, optimizer, layer in zip(others, rows, alone, layers, strict=True):
        for _ in range(60):
            other.step(x[0], x[1], optimizer)
        assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


def test_steps_that_others_wait_for_run_by_name():
    """Hooks on all optimizers, and what a GradScaler says to one."""
    p = problem(optimizer="adam")
    seen = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o))),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", o))),
    ]
    try:
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("before", p.optimizer), ("after", p.optimizer)]
    assert optim.fused_rule(p.optimizer, p.weight)[0] == "adam"
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    assert len(seen) == 2

    p = problem(dtype=torch.float32)
    scaled = p._replace(optimizer=Adam([p.weight, p.bias], lr=0.1, fused=True))
    before = p.weight.detach().clone()
    scaled.optimizer.found_inf = torch.tensor(1.0)
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, scaled.optimizer)
    assert torch.equal(p.weight, before), "a step that overflowed is left out"


def test_explain_names_hooks():
    p = problem(optimizer="adam")
    assert "fused" in ff.explain(p.weight, p.optimizer)
    p.weight.register_hook(lambda g: g)
    assert "gradient hooks" in ff.explain(p.weight, p.optimizer)
    assert p.weight._backward_hooks and isinstance(p.weight._backward_hooks, OrderedDict)
