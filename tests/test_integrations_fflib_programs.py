"""What programs do with nets of fflib before and after `accelerate`: change, subclass and replace; the numbers stay."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .steps import error

pytest.importorskip("fflib")

from fflib.nn import ff_linear, ff_net

from ffkernels.integrations import fflib as ours

from .fflib_nets import EXACT, assert_same, layers, pair, rows

pytestmark = pytest.mark.usefixtures("fresh_warnings")


def begun(net: Any) -> None:
    """Training goes on after it was accelerated, in a net that has momentum already."""
    net.run_train_combined(rows(), rows())


def replaced_optimizer(net: Any) -> None:
    begun(net)
    for layer in net.layers:
        layer.opt = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)


def replaced_step(net: Any) -> None:
    """A program counts steps; every second one is taken twice."""
    for layer in net.layers:
        step, calls = layer.opt.step, []

        def counted(step: Any = step, calls: list[int] = calls) -> None:
            calls.append(1)
            for _ in range(1 + len(calls) % 2):
                step()

        layer.opt.step = counted


def awkward_rows(net: Any) -> None:
    """Sides of other lengths, without rows, of one row; transposed, expanded, with gaps."""
    net.run_train_combined(rows(3), rows(7))
    for n_pos, n_neg in ((0, 0), (0, 2), (1, 0), (1, 1)):
        net.run_train_combined(rows(n_pos), rows(n_neg))
    net.run_train_combined(rows(14, 5).t(), rows(12)[::2])
    net.run_train_combined(rows(1).expand(4, 14), rows(6, 28)[:, ::2])
    assert net(rows(0)).shape == (0,) and net.layers[0](rows(14, 5).t()).shape == (5, 10)


def awkward_memory(net: Any) -> None:
    for layer in net.layers:
        layer.weight.data = layer.weight.data.t().contiguous().t()


def in_evaluation_mode(net: Any) -> None:
    net.eval()


def in_another_dtype(net: Any) -> None:
    net.float()
    net.double()


@pytest.mark.parametrize(
    "change",
    [begun, replaced_optimizer, replaced_step, awkward_rows, awkward_memory, in_evaluation_mode, in_another_dtype],
)
@pytest.mark.parametrize("when", ["before", "after", "twice", "undone"])
def test_what_programs_do_before_and_after_acceleration(change, when):
    a, b = (ff_net.FFNet(layers(), None) for _ in range(2))
    b.load_state_dict(a.state_dict())
    for net in (a, b):
        torch.manual_seed(1)
        if net is a and when != "before":
            ours.accelerate(net)
        change(net)
        if net is a and when != "after":
            (ours.restore if when == "undone" else ours.accelerate)(net)
        for _ in range(3):
            net.run_train_combined(rows(), rows(5))
    assert (type(a) is ff_net.FFNet) == (when == "undone")
    assert_same(a, b)


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_states_go_from_plain_to_accelerated_and_back(accelerated_first):
    nets = [ff_net.FFNet(layers(), None) for _ in range(3)]
    first, second, plain = nets
    for net in nets[1:]:
        net.load_state_dict(first.state_dict())
    ours.accelerate(first if accelerated_first else second)
    batches = [(rows(), rows(5)) for _ in range(6)]
    for batch in batches[:3]:
        first.run_train_combined(*batch)
    second.load_state_dict(first.state_dict())
    for one, other in zip(first.layers, second.layers, strict=True):
        other.opt.load_state_dict(one.opt.state_dict())
    for batch in batches[3:]:
        second.run_train_combined(*batch)
    for batch in batches:
        plain.run_train_combined(*batch)
    assert_same(second, plain)


@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_a_net_cast_after_training_began_is_refused_as_fflib_refuses_it(first, then):
    for net in pair(dtype=first):
        net.run_train_combined(rows().to(first), rows().to(first))
        net.to(then)
        with pytest.raises((ValueError, RuntimeError), match=r"exp_avg is torch\.float|expected dtype"):
            net.run_train_combined(rows().to(then), rows().to(then))


class Doubled(ff_linear.FFLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("what", ["subclass", "activation"])
def test_a_layer_that_cannot_run_here_trains_on_its_original_path_with_one_warning(what):
    theirs = ff_net.FFNet(layers((14, 10, 9, 8)), None)
    if what == "subclass":
        theirs.layers[1].__class__ = Doubled
        message = r"layers\[1\]: it is a Doubled, a subclass of fflib 0.3.0's FFLinear"
    else:
        theirs.layers[1].activation_fn = nn.Tanh()
        message = r"layers\[1\]: activation Tanh\(\) is not one of relu"
    a, b = copy.deepcopy(theirs), theirs
    with pytest.raises(ValueError, match=message):
        ours.accelerate(copy.deepcopy(theirs), strict=True)
    with pytest.warns(UserWarning, match=message) as caught:
        ours.accelerate(a)
    assert len(caught) == 1 and type(a.layers[0]) is ours.FFLinear
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        for _ in range(3):
            x_pos, x_neg = rows(), rows()
            a.run_train_combined(x_pos, x_neg)
            b.run_train_combined(x_pos, x_neg)
    assert not later
    assert_same(a, b)


class Doubling(nn.Module):
    """Stands among fflib's layers, and has neither weight nor bias."""

    def run_train(self, x_pos: Tensor, x_neg: Tensor) -> None:
        pass

    def goodness(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.square().mean(1), 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_a_layer_that_is_not_fflibs_keeps_its_place(compute_dtype):
    first, last = layers(dtype=torch.float32)
    theirs = ff_net.FFNet([first, Doubling(), last], None)
    a = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=r"layers\[1\]: it is a Doubling, not fflib 0.3.0's FFLinear"):
        ours.accelerate(a, compute_dtype=compute_dtype)
    x_pos, x_neg = rows().float(), rows().float()
    for net in (a, theirs):
        net.run_train_combined(x_pos, x_neg)
    assert type(a.layers[2]) is ours.FFLinear
    assert error(a(x_pos), theirs(x_pos)) <= (1e-6 if compute_dtype is None else 1e-2)


class Ours(ours.FFLinear):
    """A program's own layer on top of the accelerated one."""


class OursDoubled(ours.FFLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "theirs"), [(Ours, ff_linear.FFLinear), (OursDoubled, Doubled)])
def test_subclasses_of_our_own_layer(kind, theirs):
    """They keep their class and take the options; an overridden forward is obeyed, with one warning."""
    a, b = (layers() for _ in range(2))
    a[0].__class__, b[0].__class__ = kind, theirs
    for one, other in zip(a, b, strict=True):
        other.load_state_dict(one.state_dict())
    net, plain = ff_net.FFNet(a, None), ff_net.FFNet(b, None)
    ours.accelerate(net, backend="eager")
    assert type(net.layers[0]) is kind and net.layers[0].backend == "eager"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x_pos, x_neg = rows(), rows()
            for each in (net, plain):
                each.run_train_combined(x_pos, x_neg)
    assert [str(w.message).endswith("OursDoubled.forward is overridden") for w in caught] == [True] * (kind is not Ours)
    assert_same(net, plain)


def frozen(layer: Any) -> None:
    layer.bias.requires_grad_(False)


def hooked(layer: Any) -> None:
    layer.weight.register_hook(lambda g: 2 * g)


def other_optimizer(layer: Any) -> None:
    layer.opt = torch.optim.SGD([layer.weight], lr=0.1)


def own_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)


def learnt_threshold(layer: Any) -> None:
    layer.loss_threshold = torch.tensor(0.3)


def watched_activation(layer: Any) -> None:
    layer.activation_fn = nn.ReLU()
    layer.activation_fn.register_forward_hook(lambda module, x, y: 2 * y)


def own_activation(layer: Any) -> None:
    layer.activation_fn = nn.ReLU()
    layer.activation_fn.forward = lambda z: z.clamp(0, 0.3)


def parametrized(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.opt = torch.optim.Adam(layer.parameters(), lr=0.01)


CHANGES = {
    frozen: "bias is frozen",
    hooked: "weight has gradient hooks",
    other_optimizer: "its optimizer does not hold bias",
    own_forward: "FFLinear.forward is overridden",
    watched_activation: r"hooks watch its activation ReLU\(\)",
    own_activation: r"activation ReLU\(\) is not one of",
    learnt_threshold: r"threshold tensor\(0.3000\) is not a finite number",
    parametrized: "weight is frozen or computed from other parameters",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_later_is_seen(change):
    a, b = pair()
    for net in (a, b):
        change(net.layers[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x_pos, x_neg = rows(), rows()
            for net in (a, b):
                net.run_train_combined(x_pos, x_neg)
    assert len(caught) == 1 and re.search(CHANGES[change], str(caught[0].message))
    for one, other in zip(a.layers, b.layers, strict=True):
        for name, value in other.named_parameters():
            assert error(dict(one.named_parameters())[name], value) <= EXACT, name


class OwnLoop(ff_net.FFNet):
    """A net that a program has subclassed: its layers are accelerated, its own loop runs."""

    def run_train_combined(self, x_pos: Tensor, x_neg: Tensor) -> None:
        super().run_train_combined(x_pos, x_neg)
        super().run_train_combined(x_neg, x_pos)


def test_a_subclassed_net_keeps_its_class():
    theirs = OwnLoop(layers(), None)
    a = ours.accelerate(copy.deepcopy(theirs))
    x_pos, x_neg = rows(), rows()
    a.run_train_combined(x_pos, x_neg)
    theirs.run_train_combined(x_pos, x_neg)
    assert type(a) is OwnLoop and type(a.layers[0]) is ours.FFLinear
    assert_same(a, theirs)


def test_directional_derivatives_of_the_input_are_fflibs_own():
    a, b = (net.layers[0] for net in pair())
    x, direction = rows(), rows()
    found, expected = (torch.func.jvp(lambda x, layer=layer: layer(x), (x,), (direction,)) for layer in (a, b))
    assert error(found[0], expected[0]) <= EXACT and error(found[1], expected[1]) <= EXACT
