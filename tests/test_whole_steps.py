"""A network's step is whole or not at all, also for layers that autograd steps because something watches them."""

from __future__ import annotations

import signal

import pytest
import torch

import ffkernels as ff
from ffkernels import interrupts

WATCHED = {
    "watched": lambda layer: layer.register_forward_hook(lambda *_: None),
    "frozen": lambda layer: layer.requires_grad_(False),
}
WANTS = torch.tensor(2.0, requires_grad=True)
UNFIT = {
    "a backend that cannot": {"backend": "triton"},
    "a threshold that wants a gradient": {"objective": ff.Objective(threshold=WANTS)},
}


def network(**options: object) -> ff.FFNetwork:
    return ff.FFNetwork([ff.FFLinear(20, 16), ff.FFLinear(16, 12, **options)])


def values(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("kind", WATCHED)
@pytest.mark.parametrize("why", UNFIT)
def test_an_unfit_second_layer_leaves_the_first_as_it_was(kind, why):
    net = network(**UNFIT[why])
    WATCHED[kind](net.layers[1])
    optimizer, before = torch.optim.SGD(net.layers[0].parameters(), lr=0.1), values(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers\[1\]: "):
            net.step(torch.rand(8, 20), torch.rand(8, 20), [optimizer, None])
    assert all(map(torch.equal, values(net), before))


def test_sides_that_cannot_be_paired_leave_all_layers_as_they_were():
    net = network(objective=ff.Objective(loss="symba"))
    optimizer, before = torch.optim.SGD(net.parameters(), lr=0.1), values(net)
    for marked in (4, 3):
        mask = torch.arange(8) < marked
        if marked == 4:
            net.step(torch.rand(8, 20), None, optimizer, is_positive=mask)
            before = values(net)
            continue
        with pytest.raises(ValueError, match=r"layers\[1\]: is_positive marks 3 positive and 5 negative rows"):
            net.step(torch.rand(8, 20), None, optimizer, is_positive=mask)
    assert all(map(torch.equal, values(net), before))


def spoil_state(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[net.layers[1].weight]["exp_avg"]


def spoil_shape(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[net.layers[1].bias]["exp_avg"] = torch.zeros(3)


def spoil_option(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> None:
    net.layers[1].norm = "l3"


def spoil_dtype(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> None:
    net.layers[1].double()


def spoil_group(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].pop()


def spoil_threshold(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> None:
    net.layers[1].objective = ff.Objective(threshold=torch.ones(5))


@pytest.mark.parametrize("spoil", [spoil_state, spoil_shape, spoil_option, spoil_dtype, spoil_group, spoil_threshold])
def test_what_has_changed_since_the_last_step_is_checked_again(spoil):
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        net.step(torch.rand(8, 20), torch.rand(8, 20), optimizer)
    spoil(net, optimizer)
    before = values(net)
    with pytest.raises((ValueError, TypeError), match=r"layers\[1\]: "):
        net.step(torch.rand(8, 20), torch.rand(8, 20), optimizer)
    assert all(map(torch.equal, values(net), before))


def test_what_a_call_says_of_its_rows_is_checked_again():
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    rows = torch.rand(8, 20), torch.rand(8, 20)
    net.step(*rows, optimizer, sample_weight=torch.ones(16))
    before = values(net)
    for weight in (torch.ones(15), torch.ones(16, requires_grad=True)):
        with pytest.raises(ValueError, match="sample_weight"):
            net.step(*rows, optimizer, sample_weight=weight)
    assert all(map(torch.equal, values(net), before))


def test_a_watched_layer_checks_what_it_does_not_use():
    layer = ff.FFLinear(20, 6)
    layer.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for name, value in (("label_field", 99), ("product", "x"), ("input_sumsq", torch.ones(3))):
        with pytest.raises((ValueError, TypeError), match=name):
            layer.step(torch.rand(8, 20), torch.rand(8, 20), optimizer, **{name: value})


def test_a_watched_layer_steps_in_inference_mode_as_outside_of_it():
    torch.manual_seed(1)
    layers = [ff.FFLinear(20, 6) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    rows, losses = (torch.rand(8, 20), torch.rand(8, 20)), []
    for inference, layer in zip((False, True), layers, strict=True):
        layer.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.Adam(layer.parameters())
        for _ in range(2):
            with torch.inference_mode(inference):
                made = tuple(x.clone() for x in rows)
                losses.append(layer.step(*made, optimizer, sample_weight=torch.rand(16).fill_(0.5)).loss.clone())
    assert torch.equal(torch.stack(losses[:2]), torch.stack(losses[2:]))
    assert all(map(torch.equal, values(layers[0]), values(layers[1])))


def test_ctrl_c_waits_for_a_watched_layers_step():
    layer = ff.FFLinear(20, 6)
    layer.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.Adam(layer.parameters(), foreach=False)
    optimizer.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    before = values(layer)
    with pytest.raises(KeyboardInterrupt):
        layer.step(torch.rand(8, 20), torch.rand(8, 20), optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(values(layer), before, strict=True))
    assert {float(optimizer.state[p]["step"]) for p in layer.parameters()} == {1.0}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_was_saved_during_a_step_still_ends_the_program():
    held = interrupts.hold()
    assert held is not None
    saved = signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.release(held)
    try:
        signal.signal(signal.SIGINT, saved)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
