"""What PyTorch would have called is called: hooks on gradients and modules, overridden methods; and frozen layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam, Optimizer, RMSprop

import ffkernels as ff
from ffkernels import reference
from ffkernels.optim import SGDW

from .steps import error

KINDS: dict[str, Callable[[Any], Optimizer | None]] = {
    "none": lambda p: None,
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgdw": lambda p: SGDW(p, lr=0.1, decoupled=0.1),
    "adam": lambda p: Adam(p, lr=0.01, eps=1e-2),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, eps=1e-2),
}


def network(kind: type[ff.FFLinear] = ff.FFLinear, **options: Any) -> ff.FFNetwork:
    torch.manual_seed(1)
    options = {"dtype": torch.float64, "outputs": "post", **options}
    return ff.FFNetwork([kind(a, b, **options) for a, b in pairwise([12, 9, 7])])


def sides(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, 12, dtype=torch.float64), torch.rand(rows, 12, dtype=torch.float64)


def by_autograd(net: ff.FFNetwork, optimizer: Optimizer | None, x_pos: Tensor, x_neg: Tensor) -> list[Tensor]:
    """The step of every layer as a plain PyTorch program has it, each layer called as a module."""
    losses = []
    x, side = torch.cat([x_pos, x_neg]), torch.arange(len(x_pos) + len(x_neg)) < len(x_pos)
    for layer in net:
        net.zero_grad()
        y = layer(x)
        loss = reference.loss_of(y.square().mean(1), side, layer.objective, None)
        if any(p.requires_grad for p in layer.parameters()):
            loss.backward()
            if optimizer is not None:
                optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            x = layer(x)
    return losses


def assert_trained_alike(
    prepare: Callable[[ff.FFNetwork], Any], optimizer: str = "adam", steps: int = 3, **kwargs: Any
):
    """Three steps of a network, prepared by hooks and the like, are those of plain autograd; returns the network."""
    nets = [network(**kwargs), network(**kwargs)]
    for net in nets:
        prepare(net)
    optimizers = [KINDS[optimizer]([p for p in net.parameters() if p.requires_grad]) for net in nets]
    for _ in range(steps):
        x = sides()
        results = nets[0].step(*x, optimizers[0])
        for result, loss in zip(results, by_autograd(nets[1], optimizers[1], *x), strict=True):
            assert error(result.loss, loss) < 1e-9
    for name, value in nets[1].state_dict().items():
        assert error(nets[0].state_dict()[name], value) < 1e-9, name
    return nets[0]


def triple(p: Tensor) -> None:
    p.grad.mul_(3)


@pytest.mark.parametrize("optimizer", [name for name in KINDS if name != "none"])
@pytest.mark.parametrize("how", ["mask", "clamp twice", "in place after", "both parameters"])
def test_gradient_hooks_change_the_gradient(how, optimizer):
    def prepare(net):
        for layer in net:
            mask = (torch.arange(layer.weight.numel()) % 2).view_as(layer.weight).double()
            if how == "mask":
                layer.weight.register_hook(lambda g, mask=mask: g * mask)
            elif how == "clamp twice":
                layer.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
                layer.weight.register_hook(lambda g: g + 1e-3)
            elif how == "in place after":
                layer.bias.register_post_accumulate_grad_hook(triple)
            else:
                torch.autograd.graph.register_multi_grad_hook(
                    [layer.weight, layer.bias], lambda gs: [g.neg_() for g in gs]
                )

    plain = assert_trained_alike(lambda net: None, optimizer)
    hooked = assert_trained_alike(prepare, optimizer)
    assert (
        error(hooked.layers[0].weight, plain.layers[0].weight) + error(hooked.layers[0].bias, plain.layers[0].bias)
        > 1e-6
    )


def test_gradient_hooks_without_an_optimizer():
    """`.grad` holds what the hooks made of it, and an optimizer in the backward pass is one of them."""
    net, other = network(), network()
    x = sides()
    net.step(*x, None)
    unhooked = net.layers[0].weight.grad.clone()
    net.layers[0].weight.register_hook(lambda g: g * 2)
    net.step(*x, None)
    assert torch.equal(net.layers[0].weight.grad, 2 * unhooked)
    for layer in net:
        for p in layer.parameters():
            own = SGD([p], lr=0.1)

            def step(p: Tensor, own: Optimizer = own) -> None:
                own.step()
                own.zero_grad()

            p.register_post_accumulate_grad_hook(step)
    before = net.layers[0].weight.detach().clone()
    net.step(*x, None)
    assert error(net.layers[0].weight, before - 0.1 * 2 * unhooked) < 1e-12
    assert net.layers[0].weight.grad is None
    assert not torch.equal(net.layers[1].weight, other.layers[1].weight)


def test_a_hook_that_was_removed_leaves_the_step_fused():
    layer = ff.FFLinear(5, 4)
    optimizer = Adam(layer.parameters())
    layer.weight.register_hook(lambda g: g).remove()
    layer.register_forward_hook(lambda *_: None).remove()
    layer.step(torch.rand(3, 5), torch.rand(3, 5), optimizer)
    assert layer.weight.grad is None


def zero_first_column(module, args):
    x = args[0].clone()
    x[:, 0] = 0
    return (x,)


MODULE_HOOKS: dict[str, Callable[[ff.FFNetwork], Any]] = {
    "pre": lambda net: net.layers[0].register_forward_pre_hook(zero_first_column),
    "forward": lambda net: net.layers[0].register_forward_hook(lambda m, args, y: y * 0.5 + 0.1),
    "every layer": lambda net: [layer.register_forward_hook(lambda m, args, y: y * 2) for layer in net],
    "prune": lambda net: prune.l1_unstructured(net.layers[1], "weight", amount=0.5),
    "prune bias": lambda net: prune.random_unstructured(net.layers[0], "bias", amount=0.4),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("how", [name for name in MODULE_HOOKS if name != "prune bias"])
def test_hooks_on_a_layer_run_in_steps(how, optimizer):
    net = assert_trained_alike(MODULE_HOOKS[how], optimizer)
    if how == "prune":
        assert bool((net.layers[1].weight == 0).sum() == 32)
        assert not torch.equal(net.layers[1].weight_orig, network().layers[1].weight)


@pytest.mark.parametrize("how", MODULE_HOOKS)
def test_hooks_on_a_layer_run_in_whatever_a_network_reads(how):
    net = network(norm="rms")
    MODULE_HOOKS[how](net)
    if how.startswith("prune"):
        state = {name: torch.randn_like(v) if v.dtype == torch.float64 else v for name, v in net.state_dict().items()}
        for name in list(state):
            if name.endswith("_mask"):
                state[name] = net.state_dict()[name]
        net.load_state_dict(state)
    x, _ = sides()
    y, goodness = x, []
    for layer in net:
        y = layer(y)
        goodness.append(y.square().mean(1))
    assert error(net(x), y) < 1e-12
    assert error(net.goodness(x), torch.stack(goodness, 1)) < 1e-12
    totals = []
    for label in range(3):
        marked = ff.overlay_label(x, torch.full((6,), label), 3)
        totals.append(net.goodness(marked).sum(1))
    assert torch.equal(net.predict(x, 3), torch.stack(totals).argmax(0))
    marked = ff.neutral_label(x, 3)
    expected = reference.normalise(net.layers[1](net.layers[0](marked)), "rms", 1e-4, "add")
    assert error(net.features(x, num_classes=3), expected) < 1e-12


def test_hooks_on_all_modules_and_full_backward_hooks_run():
    seen = []
    net = network()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append((m, y.detach().clone())))
    try:
        x = sides()
        results = net.step(*x, Adam(net.parameters()), keep=True)
    finally:
        handle.remove()
    assert [m for m, _ in seen] == [net.layers[0]] * 2 + [net.layers[1]] * 2, "before and after each update"
    assert torch.equal(seen[1][1], results[0].y) and torch.equal(seen[3][1], results[1].y)

    slopes = []
    net.layers[0].register_full_backward_hook(lambda m, inputs, outputs: slopes.append(outputs[0]))
    y = net.layers[0](torch.cat(x)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that no input of the layer wants a gradient
        net.layers[0].step(*x, None)
    side = torch.arange(12) < 6
    y = y.requires_grad_()
    reference.loss_of(y.square().mean(1), side, net.layers[0].objective, None).backward()
    assert error(slopes[-1], y.grad) < 1e-12


class Scaled(ff.FFLinear):
    def forward(self, input):
        return super().forward(input) * 1.5


class Shifted(ff.FFLinear):
    """With a parameter more."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.shift = nn.Parameter(torch.full((self.out_features,), 0.1, dtype=torch.float64))

    def activity(self, x, input_sumsq=None, **options):
        y, _ = super().activity(x, input_sumsq, **{**options, "keep": True})
        return y + self.shift, (y + self.shift).square().sum(1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_an_overridden_layer_trains_as_it_computes(kind, optimizer):
    net = assert_trained_alike(lambda net: None, optimizer, kind=kind)
    x, _ = sides()
    below = net.layers[0](x)
    y = net.layers[1](below)
    assert error(net.goodness(x)[:, 1], y.square().mean(1)) < 1e-12
    assert error(net.layers[1].goodness(below), y.square().mean(1)) < 1e-12
    if kind is Shifted:
        assert not torch.equal(net.layers[0].shift, network(Shifted).layers[0].shift)


def test_an_overridden_step_or_goodness_is_what_runs():
    class Twice(ff.FFLinear):
        def step(self, x_pos, x_neg, optimizer, **options):
            super().step(x_pos, x_neg, optimizer, **options)
            return super().step(x_pos, x_neg, optimizer, **options)

    class Doubled(ff.FFLinear):
        def goodness(self, x):
            return 2 * super().goodness(x)

    net, other, x = network(Twice), network(), sides()
    net.step(*x, SGD(net.parameters(), lr=0.1))
    optimizer = SGD(other.parameters(), lr=0.1)
    other.layers[0].step(*x, optimizer)
    other.layers[0].step(*x, optimizer)
    assert torch.equal(net.layers[0].weight, other.layers[0].weight)

    net, other = network(Doubled), network(objective=ff.Objective(goodness="mean", threshold=1.0, temperature=0.5))
    assert error(net.goodness(x[0]), 2 * other.goodness(x[0])) < 1e-12
    # softplus(2 g - 2) is softplus((g - 1) / 0.5).
    for n in (net, other):
        n.step(*x, SGD(n.parameters(), lr=0.1))
    for name, value in other.state_dict().items():
        assert error(net.state_dict()[name], value) < 1e-12


@pytest.mark.parametrize(
    "option", [{"peer": ff.PeerNormalisation(), "peer_mean": torch.zeros(9).double()}, {"skip_below": 0.1}]
)
def test_what_a_watched_layer_cannot_do_is_said(option):
    layer = ff.FFLinear(12, 9, dtype=torch.float64)
    layer.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"{next(iter(option))} came to a layer that hooks watch"):
        layer.step(*sides(), SGD(layer.parameters(), lr=0.1), **option)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("frozen", [["0.weight", "0.bias"], ["1.weight", "1.bias"], ["0.bias"], ["1.weight"]])
def test_frozen_parameters_stay_and_the_others_learn(frozen, optimizer):
    def prepare(net):
        for name in frozen:
            net.layers.get_parameter(name).requires_grad_(False)

    net = assert_trained_alike(prepare, optimizer)
    for name, value in network().layers.named_parameters():
        assert torch.equal(net.layers.get_parameter(name), value) == (name in frozen)


def test_a_frozen_layer_hands_on_its_activities_and_keeps_its_running_mean():
    net = network(peer=ff.PeerNormalisation(), outputs="pre")
    for p in net.layers[0].parameters():
        p.requires_grad_(False)
    x_pos, x_neg = sides()
    optimizer = Adam(net.layers[1].parameters())
    results = net.step(x_pos, x_neg, optimizer, keep=True)
    assert error(results[0].y, net.layers[0](torch.cat([x_pos, x_neg]))) < 1e-12
    assert error(results[0].goodness, results[0].y.square().mean(1)) < 1e-12
    assert bool((net.layers[0].peer_mean == 0.5).all()) and not bool((net.layers[1].peer_mean == 0.5).all())
    losses = net.train_layerwise(x_pos, x_neg, optimizer, steps=2)
    assert torch.equal(losses[0], results[0].loss.expand(2)) and losses[1][1] != losses[1][0]
    with pytest.raises(ValueError, match="weight has requires_grad=False"):
        net.layers[0].step(x_pos, x_neg, optimizer)


def unfit(layer: ff.FFLinear) -> dict[str, Callable[[], Any]]:
    return {
        "threshold": lambda: setattr(layer, "objective", ff.Objective(threshold=torch.ones(3, dtype=torch.float64))),
        "dtype": lambda: layer.float(),
        "compute_dtype": lambda: setattr(layer, "compute_dtype", "bfloat16"),
        "backend": lambda: setattr(layer, "backend", "x"),
        "norm": lambda: setattr(layer, "norm", "l3"),
        "not held": lambda: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
        "parametrised": lambda: nn.utils.parametrizations.weight_norm(layer),
        "watched": lambda: (setattr(layer, "norm", "l3"), layer.register_forward_hook(lambda *_: None)),
        "not held, frozen bias": lambda: (
            layer.bias.requires_grad_(False), setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("how", unfit(ff.FFLinear(2, 2)))
@pytest.mark.parametrize("call", ["step", "train_layerwise"])
def test_all_layers_are_checked_before_the_first_is_written(how, call):
    net = network()
    optimizer = Adam(net.parameters())
    unfit(net.layers[1])[how]()
    before = copy.deepcopy(net.layers[0].state_dict())
    more = {"steps": 2} if call == "train_layerwise" else {}
    with pytest.raises((ValueError, TypeError), match=r"^layers\[1\]: "):
        getattr(net, call)(*sides(), optimizer, **more)
    assert all(torch.equal(value, before[name]) for name, value in net.layers[0].state_dict().items())
    assert not optimizer.state and net.layers[0].weight.grad is None


def test_a_layer_between_that_hands_nothing_on_is_found_before_the_first_is_written():
    net = ff.FFNetwork([ff.FFLinear(6, 5), ff.FFLinear(5, 4, outputs="none"), ff.FFLinear(4, 3)])
    before = net.layers[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"layers\[1\].outputs='none'"):
        net.step(torch.rand(3, 6), torch.rand(3, 6), SGD(net.parameters(), lr=0.1))
    assert torch.equal(net.layers[0].weight, before)


def test_optimizer_state_of_an_upper_layer_is_checked_first_too():
    net = network()
    optimizer = Adam(net.parameters())
    net.step(*sides(), optimizer)
    del optimizer.state[net.layers[1].weight]["exp_avg"]
    before = net.layers[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"layers\[1\]: optimizer \(Adam\) has no 'exp_avg'"):
        net.step(*sides(), optimizer)
    assert torch.equal(net.layers[0].weight, before)
