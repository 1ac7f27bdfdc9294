"""What programs do with greedy and inner-loop layers: how they make them, what they read, print, save and change.

The numbers are those of the originals' formulas by autograd.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from ffkernels.integrations import contracts

from .copied_code import (
    EXACT,
    LinearReLU,
    Plain,
    assert_same,
    rows,
    softplus,
)
from .steps import error

pytestmark = pytest.mark.usefixtures("fresh_warnings")


# How the originals' classes are made, and what is there afterwards.

INNER_LOOP = [
    ((nn.ReLU(),), {}, {"activation": nn.ReLU}),
    ((nn.GELU(), None, 1.5, 3), {}, {"activation": nn.GELU, "threshold": 1.5, "layer_iters": 3}),
    ((nn.ReLU(), None, 2.0, 10, True, "cpu", torch.float64), {}, {"activation": nn.ReLU, "layer_iters": 10}),
    ((), {"activation": nn.LeakyReLU(), "layer_iters": 4}, {"activation": nn.LeakyReLU, "layer_iters": 4}),
    ((nn.Tanh,), {"threshold": 0.5}, {"activation": nn.Tanh, "threshold": 0.5}),
    ((), {"activation": "silu", "bias": True, "device": None, "dtype": None}, {"activation": nn.SiLU}),
    ((), {}, {"activation": nn.GELU, "threshold": 2.0, "layer_iters": 10}),
]


@pytest.mark.parametrize(("args", "options", "expected"), INNER_LOOP)
def test_inner_loop_layer_is_made_as_the_original_is(args, options, expected):
    layer = contracts.InnerLoopLayer(20, 16, *args, **options)
    for name, value in expected.items():
        assert type(getattr(layer, name)) is value if isinstance(value, type) else getattr(layer, name) == value, name
    assert [name for name, _ in layer.named_children()] == ["activation"] and "(activation)" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.weight.shape == (16, 20)
    assert type(layer.opt) is Adam and layer.opt.param_groups[0]["lr"] == 0.03


GREEDY = [
    ((), {}),
    ((True,), {}),
    ((True, "cpu", torch.float64), {}),
    ((), {"bias": True, "device": None, "dtype": None}),
]


@pytest.mark.parametrize(("args", "options"), GREEDY)
def test_greedy_layer_is_made_as_the_original_is(args, options):
    layer = contracts.GreedyLayer(20, 16, *args, **options)
    assert (layer.threshold, layer.num_epochs, type(layer.opt), type(layer.relu)) == (2.0, 1000, Adam, nn.ReLU)
    assert [name for name, _ in layer.named_children()] == ["relu"] and "(relu): ReLU()" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.opt.param_groups[0]["lr"] == 0.03


MISTAKES = [
    (lambda: contracts.InnerLoopLayer(4, 3, True), "activation=True is not a module or function"),
    (
        lambda: contracts.InnerLoopLayer(4, 3, "tanh"),
        "activation='tanh' is not a module or function, nor one of",
    ),
    (lambda: contracts.InnerLoopLayer(4, 3, optimizer=Adam), "is not an optimizer; accepted: a torch.optim object"),
    (lambda: contracts.GreedyLayer(4, 3, log_interval=0), "log_interval=0 is not an integer >= 1"),
    (lambda: contracts.SignedLayer(12, 10), "missing"),
    (lambda: contracts.SignedLayer(12, "Adam", {}, "alternative_loss_fn"), "layer=12 is not a module"),
    (lambda: contracts.SignedLayer(LinearReLU(3, 3), "Adam", {}), "loss_fn_name='loss_fn' is not here"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# Greedy and inner-loop layers: what a program changes is obeyed.


def made(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    if kind == "greedy":
        return contracts.GreedyLayer(12, 10, dtype=dtype, num_epochs=4, threshold=0.3)
    return contracts.InnerLoopLayer(12, 10, nn.GELU(), None, 0.3, 4, dtype=dtype)


def learn(layer: Any, x_pos: Tensor, x_neg: Tensor) -> tuple[Tensor, Tensor]:
    return layer.train(x_pos, x_neg) if isinstance(layer, contracts.GreedyLayer) else layer(x_pos, x_neg)


def replace_activation(layer: Any, activation: Any) -> None:
    name = layer.PARTS[0]
    if not isinstance(activation, nn.Module):
        delattr(layer, name)  # torch lets no function take the place of a module
    setattr(layer, name, activation)


def capped(layer: Any) -> None:
    act = getattr(layer, layer.PARTS[0])
    act.forward = lambda z: z.clamp(0, 0.2)


def watched(layer: Any) -> None:
    getattr(layer, layer.PARTS[0]).register_forward_hook(lambda module, x, y: 2 * y)


def rescaled(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.opt = Adam(layer.parameters(), lr=0.01)


def its_own_loss_threshold(layer: Any) -> None:
    layer.threshold = torch.tensor(0.7, dtype=torch.float64)


CHANGES = {
    "leaky relu": (lambda layer: replace_activation(layer, nn.LeakyReLU()), None),
    "silu function": (lambda layer: replace_activation(layer, F.silu), None),
    "sgd": (lambda layer: setattr(layer, "opt", SGD(layer.parameters(), lr=0.1, momentum=0.9)), None),
    "threshold": (lambda layer: setattr(layer, "threshold", 1.5), None),
    "steeper leaky relu": (lambda layer: replace_activation(layer, nn.LeakyReLU(0.3)), r"activation LeakyReLU\("),
    "tanh": (lambda layer: replace_activation(layer, nn.Tanh()), r"activation Tanh\(\) is not one of"),
    "activation's own forward": (capped, "activation .* is not one of"),
    "watched activation": (watched, "hooks watch its activation"),
    "mask of a gradient": (
        lambda layer: layer.weight.register_hook(lambda g: g * (g > 0)),
        "weight has gradient hooks",
    ),
    "clamp of a bias": (lambda layer: layer.bias.register_hook(lambda g: g.clamp(max=0)), "bias has gradient hooks"),
    "frozen weight": (lambda layer: layer.weight.requires_grad_(False), "weight is frozen"),
    "frozen bias": (lambda layer: layer.bias.requires_grad_(False), "bias is frozen"),
    "half of the optimizer": (lambda layer: setattr(layer, "opt", SGD([layer.weight], lr=0.1)), "does not hold bias"),
    "weight norm": (rescaled, "weight is frozen or computed from other parameters"),
    "threshold tensor": (its_own_loss_threshold, "threshold tensor.* is not a finite number"),
}


@pytest.mark.parametrize("kind", ["greedy", "inner loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_program_changes_is_obeyed(kind, change):
    ours, theirs = made(kind), made(kind)
    theirs.load_state_dict(ours.state_dict())
    act, message = CHANGES[change]
    for layer in (ours, theirs):
        act(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            x_pos, x_neg = rows(), rows(5)
            h = learn(ours, x_pos, x_neg)
            expected = Plain(theirs).learn(x_pos, x_neg)
            for a, b in zip(h, expected, strict=True):
                assert error(a, b) <= EXACT and not a.requires_grad
    assert [bool(re.search(f"runs on its original path: .*{message}", str(w.message))) for w in caught] == (
        [True] * (message is not None)
    )
    assert_same(ours, theirs)


class Doubled(contracts.GreedyLayer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledPass(contracts.InnerLoopLayer):
    def forward_pass(self, x: Tensor) -> Tensor:
        return 2 * super().forward_pass(x)


@pytest.mark.parametrize("kind", ["subclass", "replaced"])
@pytest.mark.parametrize(
    ("which", "subclass", "name"), [("greedy", Doubled, "forward"), ("inner", DoubledPass, "forward_pass")]
)
def test_an_overridden_or_replaced_forward_is_obeyed(which, subclass, name, kind):
    ours, theirs = made(which), made(which)
    theirs.load_state_dict(ours.state_dict())
    if kind == "subclass":
        ours.__class__ = subclass
    else:
        method = getattr(ours, name)
        setattr(ours, name, lambda x: 2 * method(x))
    plain = Plain(theirs)
    activities = plain.activities
    plain.activities = lambda x: 2 * activities(x)
    x_pos, x_neg = rows(), rows()
    with pytest.warns(UserWarning, match=rf"\.{name} is overridden"):
        h = learn(ours, x_pos, x_neg)
    for a, b in zip(h, plain.learn(x_pos, x_neg), strict=True):
        assert error(a, b) <= EXACT
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["greedy", "inner loop"])
def test_a_layer_cast_to_a_narrow_dtype_trains_as_the_original_does(kind, dtype):
    ours, theirs = (made(kind, torch.float32).to(dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        layer.opt = SGD(layer.parameters(), lr=0.1)
    before = ours.weight.detach().clone()
    x_pos, x_neg = rows().to(dtype), rows().to(dtype)
    with pytest.warns(UserWarning, match=f"weight is {dtype}"):
        h = learn(ours, x_pos, x_neg)
    for a, b in zip(h, Plain(theirs).learn(x_pos, x_neg), strict=True):
        assert error(a, b) <= torch.finfo(dtype).eps
    assert not torch.equal(ours.weight, before)
    assert_same(ours, theirs, torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["greedy", "inner loop"])
def test_saliency_and_backprop_reach_the_input_and_the_layer_below(kind):
    ours, theirs = ([made(kind), contracts.GreedyLayer(10, 7, dtype=torch.float64)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
    x = rows()
    for layer in ours:
        nn.Module.eval(layer)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    h = ours[1](ours[0](a))
    expected = Plain(theirs[1]).activities(Plain(theirs[0]).activities(b))
    assert error(h, expected) <= EXACT
    h.square().sum().backward()
    expected.square().sum().backward()
    assert error(a.grad, b.grad) <= EXACT
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            assert error(p.grad, q.grad) <= EXACT
    tangent = torch.rand_like(x)
    found = torch.func.jvp(lambda x: ours[0](x), (x,), (tangent,))[1]
    assert error(found, torch.func.jvp(Plain(theirs[0]).activities, (x,), (tangent,))[1]) <= EXACT


def test_rows_that_wait_for_a_gradient_in_training_get_it():
    """FFPytorch's steps leave the sum of their gradients in the rows; its outputs hang on them."""
    ours, theirs = made("inner loop"), made("inner loop")
    theirs.load_state_dict(ours.state_dict())
    x, x_neg = rows(), rows()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="x_pos or x_neg waits for a gradient"):
        h = ours(a, x_neg)
    expected = Plain(theirs).learn(b, x_neg)
    (h[0].sum() + h[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    assert error(a.grad, b.grad) <= EXACT
    assert_same(ours, theirs)


def test_greedy_layer_reads_arguments_and_prints_losses_as_pytorch_examples_does(capsys):
    args = SimpleNamespace(epochs=8, lr=0.02, threshold=1.5, log_interval=3)
    layer = contracts.GreedyLayer(
        12, 10, dtype=torch.float64,
        lr=args.lr, threshold=args.threshold, num_epochs=args.epochs, log_interval=args.log_interval,
    )  # fmt: skip
    theirs = copy.deepcopy(layer)
    x_pos, x_neg = rows(), rows()
    expected = []
    for _ in range(8):
        theirs.num_epochs = 1
        with torch.no_grad():
            g = [Plain(theirs).activities(x).pow(2).mean(1) for x in (x_pos, x_neg)]
            expected.append(softplus(torch.cat([1.5 - g[0], g[1] - 1.5])).mean().item())
        Plain(theirs).learn(x_pos, x_neg)
    for hooked in (False, True):
        each = copy.deepcopy(layer)
        if hooked:
            each.weight.register_hook(lambda g: g)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.train(x_pos, x_neg)
        lines = capsys.readouterr().out.splitlines()
        assert [line.rsplit(" ", 1)[0] for line in lines] == ["Loss: "] * 3
        found = [float(line.split()[1]) for line in lines]
        assert found == pytest.approx([expected[i] for i in (0, 3, 6)], rel=1e-12)
        assert_same(each, theirs)
    assert layer.opt.param_groups[0]["lr"] == 0.02


def test_layers_that_the_original_has_pickled_train_on():
    """A pickle has the original's attributes alone, under a name that is this class now."""
    layer = made("greedy")
    old = contracts.GreedyLayer.__new__(contracts.GreedyLayer)
    ours_only = ("compute_dtype", "backend", "log_interval")
    state = copy.deepcopy({k: v for k, v in vars(layer).items() if k not in ours_only})
    old.__setstate__(state)
    copied = pickle.loads(pickle.dumps(old))
    x_pos, x_neg = rows(), rows()
    Plain(layer).learn(x_pos, x_neg)
    for each in (old, copied):
        each.train(x_pos, x_neg)
        assert_same(each, layer)


def test_nets_of_the_originals_stay_theirs():
    """Their Net keeps layers in a list, hands one's activities to the next, and predicts by goodness."""
    layers = [contracts.GreedyLayer(a, b, dtype=torch.float64, num_epochs=3) for a, b in ((12, 10), (10, 8))]
    plain = [Plain(copy.deepcopy(layer)) for layer in layers]
    h, expected = ((rows(), rows()),) * 2
    for layer, other in zip(layers, plain, strict=True):
        h = layer.train(*h)
        expected = other.learn_apart(*expected)
    x = rows(20)
    goodness, total = x, 0
    for layer in layers:
        goodness = layer(goodness)
        total = total + goodness.pow(2).mean(1)
    for other in plain:
        x = other.activities(x)
        total = total - x.pow(2).mean(1)
    assert total.abs().max() <= EXACT
