"""A network steps by the kept plans of its layers: what changes between two steps, the next one heeds or refuses."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import ffkernels as ff
from ffkernels import ops
from ffkernels.backends import select
from ffkernels.functional import plan
from ffkernels.nn import kept

NATIVE = select.load("native").library.load().library is not None
pytestmark = pytest.mark.skipif(not NATIVE, reason="the compiled library is not here")
CHANGE_AT, STEPS = 4, 7


class Steps:
    """A network that steps under options which a change may replace."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer] = lambda p: Adam(p, lr=0.02), **options) -> None:
        torch.manual_seed(5)
        self.net = ff.FFNetwork([ff.FFLinear(width, 6, **options) for width in (8, 6, 6)])
        self.optimizer: Optimizer | Sequence[Optimizer] = make(list(self.net.parameters()))
        self.x = tuple(torch.randn(5, 8, dtype=options.get("dtype")) for _ in range(2))
        self.options: dict = {}

    def step(self) -> list[ff.StepResult]:
        return self.net.step(*self.x, self.optimizer, **self.options)

    def layer(self, index: int = 1) -> ff.FFLinear:
        return self.net.layers[index]

    def numbers(self) -> list[torch.Tensor]:
        optimizers = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        own = [of for o in optimizers for of in o.state.values() if isinstance(of, dict)]
        state = [v for of in own for v in of.values() if isinstance(v, torch.Tensor)]
        return [t.detach().clone() for t in (*self.net.parameters(), *self.net.buffers(), *state)]


def forget(s: Steps) -> None:
    """What a network that keeps nothing has."""
    plan._kept.clear()
    s.net._checked = None


def left_by(results: list[ff.StepResult]) -> list[torch.Tensor]:
    fields = [(r.y, r.sumsq, r.goodness, r.loss) for r in results]
    return [t for of in fields for t in of if t is not None]


@pytest.fixture
def ways(monkeypatch):
    """Whether each step so far went by the kept plans."""
    found: list[bool] = []
    by_plans = kept.step

    def step(*args, **options):
        results = by_plans(*args, **options)
        found.append(results is not None)
        return results

    monkeypatch.setattr(kept, "step", step)
    return found


def group(s: Steps) -> dict:
    return s.optimizer.param_groups[0]


def state(s: Steps, key: str = "exp_avg") -> torch.Tensor:
    return s.optimizer.state[s.layer().weight][key]


def set_data(of: Callable[[Steps], torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]):
    def change(s: Steps) -> None:
        t = of(s)
        t.data = make(t.data)

    return change


def weight(s: Steps) -> torch.Tensor:
    return s.layer().weight


def other_parameter(s: Steps) -> None:
    s.layer().weight = nn.Parameter(s.layer().weight.detach() * 2)
    s.optimizer.add_param_group({"params": [s.layer().weight]})


def other_state(s: Steps) -> None:
    s.optimizer.state[s.layer().weight]["exp_avg"] = state(s) * -1


def swapped(s: Steps) -> None:
    of = s.optimizer.state[s.layer().bias]
    of["exp_avg"], of["exp_avg_sq"] = of["exp_avg_sq"], of["exp_avg"].abs()


def lr_in_place(s: Steps) -> None:
    rate = torch.tensor(0.3)
    group(s).update(lr=rate)
    s.step()
    rate.fill_(0.01)


def betas_in_place(s: Steps) -> None:
    first, second = torch.tensor(0.3), torch.tensor(0.4)
    group(s).update(betas=(first, second))
    s.step()
    first.fill_(0.7)


def rate_of_the_bias(s: Steps) -> None:
    bias, rate = s.layer().bias, torch.tensor(0.2)
    group(s)["params"] = [p for p in group(s)["params"] if p is not bias]
    s.optimizer.add_param_group({"params": [bias], "lr": rate})
    forget(s)
    for _ in range(2):
        s.step()
    rate.fill_(0.9)


def no_longer_a_tensor(s: Steps) -> None:
    beta = torch.tensor(0.25)
    group(s).update(betas=(beta, 0.5))
    for _ in range(2):
        s.step()
    beta.fill_(0.75)
    group(s).update(betas=(0.75, 0.5))


def other_owners(s: Steps) -> None:
    one, other = (s.layer(i).weight for i in (1, 2))
    kept_state = dict(s.optimizer.state)
    s.optimizer.state.clear()
    for p, of in kept_state.items():
        s.optimizer.state[other if p is one else one if p is other else p] = of


def a_list_in_place(s: Steps) -> None:
    betas = [0.3, 0.4]
    group(s).update(betas=betas)
    s.step()
    s.step()
    betas[0] = 0.7


def other_group(s: Steps) -> None:
    bias = s.layer().bias
    group(s)["params"] = [p for p in group(s)["params"] if p is not bias]
    s.optimizer.add_param_group({"params": [bias], "lr": 0.1})
    for _ in range(2):
        s.step()
    s.optimizer.param_groups[1]["lr"] = 0.4


def tripled(p: nn.Parameter) -> None:
    p.grad.mul_(3)


def own_method(s: Steps) -> None:
    layer, step = s.layer(), s.layer().step
    layer.step = lambda x_pos, x_neg, optimizer, **options: step(x_pos * 2, x_neg, optimizer, **options)


def with_amsgrad(s: Steps) -> None:
    group(s)["amsgrad"] = True
    for of in s.optimizer.state.values():
        of["max_exp_avg_sq"] = of["exp_avg_sq"].clone()


def peered(s: Steps) -> None:
    s.layer().peer = ff.PeerNormalisation(strength=1.0)
    s.layer().peer_mean = torch.full((6,), 0.5)


def shared(s: Steps) -> None:
    x_pos, x_neg = s.x[0], s.x[0].clone()
    x_neg[:, :2] = 3
    s.x = x_pos, x_neg
    s.options.update(label_field=2, product=s.net.shared_product(x_pos, 2))


# Each change, and whether the step after it may go by the kept plans.
CHANGES: dict[str, tuple[Callable[[Steps], object], bool]] = {
    "nothing": (lambda s: None, True),
    "lr": (lambda s: group(s).update(lr=0.5), True),
    "betas": (lambda s: group(s).update(betas=(0.5, 0.6)), True),
    "maximize": (lambda s: group(s).update(maximize=True), True),
    "an lr tensor": (lambda s: group(s).update(lr=torch.tensor(0.3)), True),
    "rows": (lambda s: setattr(s, "x", (s.x[0][:2] * 2, s.x[1][:3])), True),
    "rows with gaps": (lambda s: setattr(s, "x", (torch.randn(5, 16)[:, ::2], s.x[1])), True),
    "sample weight": (lambda s: s.options.update(sample_weight=torch.rand(10)), True),
    "keep": (lambda s: s.options.update(keep=True), False),
    "skip_below": (lambda s: s.options.update(skip_below=0.4), False),
    "label field": (lambda s: setattr(s, "x", (s.x[0], s.x[0].roll(1, 0))) or s.options.update(label_field=8), True),
    "a product": (shared, False),
    "mixed rows": (
        lambda s: setattr(s, "x", (s.x[0], None)) or s.options.update(is_positive=torch.arange(5) % 2 == 0), False,
    ),
    "data": (set_data(weight, lambda w: w * 2), False),
    "data in place": (lambda s: s.layer().weight.data.mul_(2), True),
    "transposed data": (set_data(weight, lambda w: w.t().contiguous().t()), False),
    "bias": (set_data(lambda s: s.layer().bias, lambda b: b + 1), False),
    "state elsewhere": (set_data(state, lambda t: t * 3), False),
    "state transposed": (set_data(state, lambda t: t.t()), False),
    "state in place": (lambda s: state(s).mul_(3), True),
    "other state": (other_state, False),
    "state swapped": (swapped, False),
    "an lr tensor in place": (lr_in_place, True),
    "betas of tensors in place": (betas_in_place, True),
    "a list of betas in place": (a_list_in_place, True),
    "the bias's lr tensor in place": (rate_of_the_bias, True),
    "a beta that was a tensor": (no_longer_a_tensor, True),
    "state by another name": (
        lambda s: s.optimizer.state.update({"epoch": 3}) or s.optimizer.param_groups[0].update(lr=0.1), True,
    ),
    "owners of state": (other_owners, False),
    "another group's lr": (other_group, True),
    "post hook": (
        lambda s: s.layer().weight.register_post_accumulate_grad_hook(tripled), False,
    ),
    "step in float64": (set_data(lambda s: state(s, "step"), lambda t: t.double()), False),
    "loaded": (lambda s: s.optimizer.load_state_dict(deepcopy(s.optimizer.state_dict())), False),
    "parameter": (other_parameter, False),
    "no bias": (lambda s: setattr(s.layer(), "bias", None), False),
    "frozen": (lambda s: s.layer().requires_grad_(False), False),
    "frozen in part": (lambda s: s.layer().bias.requires_grad_(False), False),
    "gradient hook": (lambda s: s.layer().weight.register_hook(lambda g: g * 3), False),
    "forward hook": (lambda s: s.layer().register_forward_hook(lambda m, x, y: y * 2), False),
    "step hook": (lambda s: s.optimizer.register_step_post_hook(lambda *_: s.layer().weight.data.mul_(0.5)), False),
    "pruned": (lambda s: prune.l1_unstructured(s.layer(), "weight", 0.5), False),
    "method": (own_method, False),
    "objective": (lambda s: setattr(s.layer(), "objective", ff.Objective(loss="swish", alpha=2.0)), False),
    "threshold": (
        lambda s: setattr(s.layer(), "objective", ff.Objective(threshold=torch.linspace(0, 1, 10))), False,
    ),
    "own loss": (
        lambda s: setattr(s.layer(), "objective", ff.GivenLoss(lambda g, side: (g * ~side).sum() - (g * side).sum())),
        False,
    ),
    "norm": (lambda s: setattr(s.layer(), "norm", "rms"), False),
    "eps": (lambda s: setattr(s.layer(), "eps", 0.5), False),
    "activation": (lambda s: setattr(s.layer(), "activation", "gelu"), False),
    "outputs": (lambda s: setattr(s.layer(), "outputs", "pre"), False),
    "compute dtype": (lambda s: [setattr(layer, "compute_dtype", torch.bfloat16) for layer in s.net], False),
    "backend": (lambda s: setattr(s.layer(), "backend", "eager"), False),
    "peer": (peered, False),
    "batch norm": (
        lambda s: (
            setattr(s.layer(), "batch_norm", nn.BatchNorm1d(6)), setattr(s.layer(), "outputs", "pre"),
            s.optimizer.add_param_group({"params": list(s.layer().batch_norm.parameters())}),
        ),
        False,
    ),
    "optimizers": (lambda s: setattr(s, "optimizer", [SGD(layer.parameters(), lr=0.1) for layer in s.net]), False),
    "no optimizer": (lambda s: setattr(s, "optimizer", None), False),
    "amsgrad": (with_amsgrad, False),
    "layers": (lambda s: s.net.layers.append(ff.FFLinear(6, 4)) and s.optimizer.add_param_group(
        {"params": list(s.layer(-1).parameters())}
    ), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_heeded(name, ways):
    """The steps after it are those of a network that keeps nothing, bit by bit."""
    change, stays = CHANGES[name]
    found = []
    for keeps in (True, False):
        s = Steps()
        left = []
        ways.clear()
        for at in range(STEPS):
            if at == CHANGE_AT:
                if keeps:
                    assert ways == [False, False, True, True]
                torch.manual_seed(9)
                change(s)
                before = len(ways)
            if not keeps:
                forget(s)
            left.append(left_by(s.step()))
        if keeps:
            assert (ways[before] if len(ways) == before + STEPS - CHANGE_AT else False) == stays
        found.append(([t for of in left for t in of], [] if s.optimizer is None else s.numbers()))
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def in_one_memory(s: Steps) -> None:
    layer, memory = s.layer(), torch.randn(42)
    layer.weight.data, layer.bias.data = memory[:36].view(6, 6), memory[33:39]


REFUSED: dict[str, Callable[[Steps], object]] = {
    "weight in float64": set_data(weight, torch.Tensor.double),
    "weight without columns": set_data(weight, lambda w: w[:, :3].clone()),
    "expanded weight": set_data(weight, lambda w: w[:1].expand(6, 6)),
    "one memory": in_one_memory,
    "state of another shape": set_data(state, lambda t: t[:3].clone()),
    "state in float64": set_data(state, torch.Tensor.double),
    "no state": lambda s: s.optimizer.state[s.layer().weight].pop("exp_avg"),
    "no lr": lambda s: group(s).pop("lr"),
    "lr of two numbers": lambda s: group(s).update(lr=torch.ones(2)),
    "a parameter less": lambda s: group(s)["params"].pop(2),
    "a parameter twice": lambda s: group(s)["params"].append(s.layer().weight),
    "other optimizer": lambda s: setattr(s, "optimizer", Adam(s.layer(0).parameters())),
    "no optimizer": lambda s: setattr(s, "optimizer", "adam"),
    "optimizers": lambda s: setattr(s, "optimizer", [s.optimizer]),
    "eps": lambda s: setattr(s.layer(), "eps", True),
    "norm": lambda s: setattr(s.layer(), "norm", "l1"),
    "objective": lambda s: setattr(s.layer(), "objective", ff.Objective(threshold=torch.rand(3))),
    "peer alone": lambda s: setattr(s.layer(), "peer", ff.PeerNormalisation()),
    "backend": lambda s: setattr(s.layer(), "backend", "none"),
    "compute dtype": lambda s: setattr(s.layer(0), "compute_dtype", torch.bfloat16),
    "nothing handed on": lambda s: setattr(s.layer(), "outputs", "none"),
    "skip_below": lambda s: s.options.update(skip_below=False),
    "unknown option": lambda s: s.options.update(skip=0.5),
    "outputs": lambda s: s.options.update(outputs="pre"),
    "sample weight": lambda s: s.options.update(sample_weight=torch.rand(9)),
    "labels": lambda s: s.options.update(labels=torch.arange(5)),
    "label field": lambda s: s.options.update(label_field=3),
    "columns": lambda s: setattr(s, "x", (s.x[0][:, :7], s.x[1])),
    "dimensions": lambda s: setattr(s, "x", (s.x[0][None], s.x[1])),
    "dtype": lambda s: setattr(s, "x", tuple(x.double() for x in s.x)),
    "device": lambda s: setattr(s, "x", tuple(x.to("meta") for x in s.x)),
    "one side": lambda s: setattr(s, "x", (s.x[0], None)),
    "a list": lambda s: setattr(s, "x", (s.x[0].tolist(), s.x[1])),
    "rows in the weight": lambda s: setattr(s, "x", (s.layer(0).weight.detach(), s.x[1])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_became_wrong_is_refused(name):
    """In the words of a network that keeps nothing, before any layer is written."""
    said = []
    for keeps in (True, False):
        s = Steps()
        for _ in range(CHANGE_AT):
            s.step()
        REFUSED[name](s)
        before = [p.detach().clone() for p in s.net.parameters()]
        for _ in range(2):
            if not keeps:
                forget(s)
            with pytest.raises((ValueError, TypeError)) as refused:
                s.step()
            # An optimizer's numbers are those of all layers: who comes first names itself, or does not.
            said.append((refused.type, str(refused.value).removeprefix("layers[1]: ")))
        assert all(torch.equal(p, old) for p, old in zip(s.net.parameters(), before, strict=True))
    assert len(set(said)) == 1


def test_an_optimizer_that_was_refused_is_taken_when_it_is_mended():
    s, same = Steps(), Steps()
    for _ in range(CHANGE_AT):
        s.step()
        same.step()
    group(s)["lr"] = torch.ones(2)
    with pytest.raises(ValueError, match="lr"):
        s.step()
    group(s)["lr"] = 0.02
    s.step()
    same.step()
    assert all(torch.equal(a, b) for a, b in zip(s.numbers(), same.numbers(), strict=True))


def test_nothing_is_kept_of_parameters_that_are_gone():
    s = Steps()
    for _ in range(CHANGE_AT):
        s.step()
    old = weakref.ref(s.layer().weight)
    for _ in range(3):
        gone = s.layer().weight
        s.layer().weight = nn.Parameter(gone.detach() * 2)
        at = next(i for i, p in enumerate(group(s)["params"]) if p is gone)
        group(s)["params"][at] = s.layer().weight
        del s.optimizer.state[gone], gone
        for _ in range(3):
            s.step()
    gc.collect()
    assert old() is None


def test_pairs_of_unequal_numbers_are_refused():
    s = Steps(objective=ff.Objective(loss="symba"))
    for _ in range(CHANGE_AT):
        s.step()
    s.x = (s.x[0], s.x[1][:3])
    with pytest.raises(ValueError, match="pairs rows but there are 5 positive and 3 negative ones"):
        s.step()


OF_LAYERS: list[dict] = [
    {"outputs": "pre"},
    {"peer": ff.PeerNormalisation()},
    {"compute_dtype": torch.bfloat16},
    {"compute_dtype": torch.float16, "outputs": "pre"},
    {"dtype": torch.float64},
    {"activation": "gelu", "bias": False},
    {"objective": ff.Objective(goodness="norm")},
    {"objective": ff.Objective(goodness="sum"), "outputs": "pre"},
    {"objective": ff.Objective(loss="swish", alpha=0.7)},
]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("options", OF_LAYERS, ids=str)
def test_options_of_layers(options, together, keep, ways, monkeypatch):
    """All layers in one call, and a call for each, leave what layers that are checked anew leave."""
    if not together:
        monkeypatch.setattr(kept, "FEW_ACTIVITIES", 0)
    kept_ones, fresh = Steps(**options), Steps(**options)
    kept_ones.options["keep"] = fresh.options["keep"] = keep
    for _ in range(CHANGE_AT):
        forget(fresh)
        theirs = left_by(fresh.step())
    ways.clear()
    for _ in range(CHANGE_AT):
        ours = left_by(kept_ones.step())
    assert ways[2:] == [True, True]
    assert len(ours) == len(theirs)
    for a, b in zip([*ours, *kept_ones.numbers()], [*theirs, *fresh.numbers()], strict=True):
        assert torch.equal(a, b)


def test_steps_with_many_activities_take_a_call_each(monkeypatch):
    s, calls, native = Steps(), [], select.load("native")
    for _ in range(CHANGE_AT):
        s.step()
    run = native.linear_steps_
    monkeypatch.setattr(native, "linear_steps_", lambda rows, steps: calls.append(run(rows, steps)))
    for few, expected in ((10 * 18, 1), (10 * 18 - 1, 3)):
        monkeypatch.setattr(kept, "FEW_ACTIVITIES", few)
        calls.clear()
        s.step()
        assert len(calls) == expected


def test_a_layer_without_memory_is_named(monkeypatch):
    s = Steps()
    s.net.layers[1] = ff.FFLinear(6, 7)
    s.net.layers[2] = ff.FFLinear(7, 6)
    s.optimizer = Adam(s.net.parameters())
    for _ in range(CHANGE_AT):
        s.step()
    monkeypatch.setattr(select.load("native").library.load().library, "ffk_linear_steps", lambda calls, count: 2)
    with pytest.raises(MemoryError, match="layer step of 7 x 6 on 10 rows"):
        s.step()


def test_classes(ways):
    """Labels are looked at in every step, by every layer that has fewer classes."""
    found = []
    for keeps in (True, False):
        s = Steps(objective=ff.Objective(loss="cross_entropy", classes=3))
        s.layer(2).objective = ff.Objective(loss="cross_entropy", classes=2)
        s.x, s.options = (s.x[0], None), {"labels": torch.arange(5) % 2}
        ways.clear()
        for _ in range(CHANGE_AT):
            if not keeps:
                forget(s)
            results = s.step()
        assert ways[2:] == [keeps, keeps]
        found.append([*left_by(results), *s.numbers()])
        s.options["labels"] = torch.arange(5) % 3
        before = s.numbers()
        with pytest.raises(ValueError, match=r"labels hold 2; accepted: 0\.\.1"):
            s.step()
        assert all(torch.equal(a, b) for a, b in zip(s.numbers(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_modes_and_the_environment_are_seen(ways, monkeypatch):
    s = Steps()
    for _ in range(CHANGE_AT):
        s.step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert s.net.step(*s.x, s.optimizer, keep=True)[0].y.dtype == torch.bfloat16
    with torch.inference_mode():
        s.step()
    for _ in range(2):
        s.step()
    monkeypatch.setenv("FFKERNELS_BACKEND", "eager")
    s.step()
    monkeypatch.setenv("FFKERNELS_BACKEND", "none")
    with pytest.raises(ValueError, match="FFKERNELS_BACKEND='none' is not a backend"):
        s.step()
    assert ways == [False, False, True, True, False, False, False, True, False, False]


def test_a_transform_is_refused():
    s = Steps()
    for _ in range(CHANGE_AT):
        s.step()
    with pytest.raises(ValueError, match=r"torch\.func transform"):
        torch.func.vmap(lambda x_pos, x_neg: s.net.step(x_pos[None], x_neg[None], s.optimizer)[0].loss)(*s.x)


def test_who_watches_operators_sees_each_layer():
    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **kwargs or {})

    s = Steps()
    for _ in range(CHANGE_AT):
        s.step()
    with Seen():
        s.step()
    assert [name for name in names if "linear_step_" in name] == ["ffkernels.linear_step_.default"] * 3


def test_a_step_that_a_program_has_replaced_is_called(monkeypatch):
    s, seen, own = Steps(), [], ff.FFLinear.step
    for _ in range(CHANGE_AT):
        s.step()
    monkeypatch.setattr(
        ff.FFLinear, "step", lambda layer, *args, **options: seen.append(own(layer, *args, **options)) or seen[-1]
    )
    s.step()
    assert len(seen) == 3


def test_versions_and_results_are_those_of_steps():
    s = Steps()
    for _ in range(CHANGE_AT):
        results = s.step()
    versions = [t._version for t in (*s.net.parameters(), state(s))]
    results = s.step()
    assert [t._version for t in (*s.net.parameters(), state(s))] == [version + 1 for version in versions]
    assert all(result.y is None and result.n_pos == 5 and not result.loss.requires_grad for result in results)
    assert torch.is_grad_enabled()


@pytest.fixture
def heeds_ctrl_c():
    """What a shell starts behind its back ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("together", [True, False])
def test_ctrl_c_waits_for_all_layers(together, heeds_ctrl_c, monkeypatch):
    s, same = Steps(), Steps()
    for _ in range(CHANGE_AT):
        s.step()
        same.step()
    if not together:
        monkeypatch.setattr(kept, "FEW_ACTIVITIES", 0)
    name = "linear_steps_" if together else "linear_step_"
    run, calls = getattr(ops, name), []

    def interrupted(*args):
        calls.append(signal.raise_signal(signal.SIGINT) if not calls else None)
        run(*args)

    monkeypatch.setattr(ops, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.step()
    monkeypatch.undo()
    same.step()
    assert all(torch.equal(a, b) for a, b in zip(s.numbers(), same.numbers(), strict=True))
    assert len(calls) == (1 if together else len(s.net))
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
