"""fflib itself before and after `accelerate`: the same numbers, and what a program can see of a net stays the same."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffkernels.recipes import data

from .steps import error
from .toy_data import mnist_or_toy

pytest.importorskip("fflib")

from fflib.nn import ff_linear, ff_net
from fflib.probes.one_hot import TryAllClasses

from ffkernels.integrations import common
from ffkernels.integrations import fflib as ours

from .fflib_nets import EXACT, assert_same, layers, pair, rows

pytestmark = pytest.mark.usefixtures("fresh_warnings")

ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.LeakyReLU(), torch.relu]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("kind", ["FFNet", "FFC"])
def test_training_is_fflibs_own(kind, maximize, activation):
    a, b = pair(kind, maximize=maximize, activation_fn=activation)
    for step in range(6):
        x_pos, x_neg = rows(), rows(5)
        if step == 3:
            for net in (a, b):
                net.layers[0].set_lr(net.layers[0].get_lr() / 2)
        a.run_train_combined(x_pos, x_neg)
        b.run_train_combined(x_pos, x_neg)
        if kind == "FFC":
            y = nn.functional.one_hot(torch.arange(6) % 4, 4).double()
            a.train_classifier(x_pos, y)
            b.train_classifier(x_pos, y)
        assert_same(a, b)
        x = rows(9)
        assert error(a(x), b(x)) <= EXACT
    assert a.layers[0].get_lr() == 0.01


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers(optimizer):
    a, b = pair(optimizer=optimizer)
    for _ in range(4):
        x_pos, x_neg = rows(), rows()
        a.run_train_combined(x_pos, x_neg)
        b.run_train_combined(x_pos, x_neg)
    assert_same(a, b)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("logistic", [None, torch.sigmoid])
def test_goodness_and_forward_of_a_layer(inverse, logistic):
    a, b = (net.layers[0] for net in pair())
    x = rows()
    options = {"inverse": inverse} if logistic is None else {"inverse": inverse, "logistic_fn": logistic}
    for ours_, theirs in zip(a.goodness(x, **options), b.goodness(x, **options), strict=True):
        assert error(ours_, theirs) <= EXACT and ours_.requires_grad == theirs.requires_grad
    assert error(a(x), b(x)) <= EXACT
    with torch.no_grad():
        assert error(a(x), b(x)) <= EXACT


def test_a_program_that_backpropagates_gets_the_same_gradients():
    """fflib's forward passes a gradient on to its input, and so does the accelerated one."""
    a, b = pair()
    x = rows().requires_grad_()
    for net in (a, b):
        net.layers[1](net.layers[0](x)).square().sum().backward()
        net.gradients = [x.grad, *(p.grad for layer in net.layers for p in layer.parameters())]
        x.grad = None
    for one, other in zip(a.gradients, b.gradients, strict=True):
        assert error(one, other) <= EXACT


@pytest.mark.parametrize("kind", ["FFNet", "FFC"])
def test_hooks_are_called_with_the_same_values(kind):
    seen: dict[int, list] = {}
    nets = pair(kind)
    for net in nets:
        calls = seen.setdefault(id(net), [])
        net.register_hook("layer_activation", "mine", lambda y, i, calls=calls: calls.append((i, y)))
        net.register_hook("layer_goodness", "mine", lambda g, i, calls=calls: calls.append((i, g)))
        net.layers[1].register_forward_hook(lambda m, x, y, calls=calls: calls.append(("forward", y)))
    x_pos, x_neg = rows(), rows()
    for net in nets:
        net.run_train_combined(x_pos, x_neg)
        net(x_pos)
    one, other = (seen[id(net)] for net in nets)
    assert [c[0] for c in one] == [c[0] for c in other] and ("forward" in {c[0] for c in one})
    for a, b in zip(one, other, strict=True):
        assert error(a[1], b[1]) <= EXACT


def test_try_all_classes_predicts_the_same():
    a, b = pair()
    x = rows(20, 10)
    predictions = [
        TryAllClasses(lambda x, y, net=net: net(torch.cat([x, y.double()], 1)), 4).predict(x) for net in (a, b)
    ]
    assert torch.equal(*predictions)


def test_identity_of_objects():
    """Acceleration is in place: parameters, optimizers and hooks are the same objects, twice or undone."""
    theirs = ff_net.FFNet(layers(), None)
    before = [(layer, layer.weight, layer.opt) for layer in theirs.layers]
    net = ours.accelerate(ours.accelerate(theirs))
    assert net is theirs and isinstance(net, ff_net.FFNet) and isinstance(net.layers[0], ff_linear.FFLinear)
    assert list(net.state_dict()) == [f"layer_{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    for (layer, weight, optimizer), now in zip(before, net.layers, strict=True):
        assert now is layer and now.weight is weight and now.opt is optimizer
    ours.restore(net)
    assert type(net) is ff_net.FFNet and {type(layer) for layer in net.layers} == {ff_linear.FFLinear}
    assert "compute_dtype" not in vars(net.layers[0])


@pytest.mark.parametrize("how", ["torch.save", "pickle", "deepcopy"])
@pytest.mark.parametrize("kind", ["FFNet", "FFC"])
def test_whole_nets_are_saved_as_fflibs_suites_do(kind, how):
    a, _ = pair(kind)
    a.run_train_combined(rows(), rows())
    if how == "torch.save":
        del a.hooks
        buffer = io.BytesIO()
        torch.save({"net": a}, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)["net"]
        copied._create_hooks_dict()
        a._create_hooks_dict()
    else:
        copied = pickle.loads(pickle.dumps(a)) if how == "pickle" else copy.deepcopy(a)
    x_pos, x_neg = rows(), rows()
    for net in (a, copied):
        net.run_train_combined(x_pos, x_neg)
    assert type(copied) is type(a) and copied.layers[0].weight is not a.layers[0].weight
    assert_same(copied, a, 0.0)
    ours.restore(a)
    assert b"ffkernels" not in pickle.dumps(a)


def test_a_saved_net_trains_on_in_a_fresh_process(tmp_path):
    a, _ = pair()
    a.run_train_combined(rows(), rows())
    batch = rows(), rows()
    torch.save({"net": a, "batch": batch}, tmp_path / "saved.pt")
    code = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
saved["net"].run_train_combined(*saved["batch"])
torch.save([layer.weight.detach() for layer in saved["net"].layers], sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "saved.pt"], check=True)
    a.run_train_combined(*batch)
    for layer, weight in zip(a.layers, torch.load(tmp_path / "saved.pt"), strict=True):
        assert error(weight, layer.weight) <= EXACT


def test_strip_down():
    a, b = pair()
    for net in (a, b):
        net.strip_down()
        assert not hasattr(net, "hooks") and net.layers[0].opt is None and net.layers[0].get_lr() == 1
        for call in (lambda net=net: net.run_train_combined(rows(), rows()), lambda net=net: net.layers[0].set_lr(1)):
            with pytest.raises(ValueError, match="Optimizer is not set!"):
                call()


def test_stale_gradients_are_gone():
    """As after `zero_grad`: those of every parameter that the layer's optimizer holds."""
    first, second = layers()
    first.opt = torch.optim.Adam([*first.parameters(), *second.parameters()])
    ours.accelerate(first)
    before = second.weight.detach().clone()
    for layer in (first, second):
        layer.weight.grad = torch.ones_like(layer.weight)
    first.run_train(rows(), rows())
    assert first.weight.grad is None and second.weight.grad is None and torch.equal(second.weight, before)


def test_our_own_constructor():
    torch.manual_seed(3)
    b = layers()[0]
    torch.manual_seed(3)
    a = ours.FFLinear(14, 10, 0.1, 0.02, dtype=torch.float64, backend="eager")
    for _ in range(3):
        x_pos, x_neg = rows(), rows()
        a.run_train(x_pos, x_neg)
        b.run_train(x_pos, x_neg)
    assert error(a.weight, b.weight) <= EXACT and a.backend == "eager"
    with pytest.raises(ValueError, match=r"layer has bias=False, with which fflib 0\.3\.0 cannot run"):
        ours.FFLinear(14, 10, 0.1, 0.02, bias=False)


def test_mistakes():
    with pytest.raises(TypeError, match="net is a Linear without FFLinear in it; accepted: fflib's FFNet"):
        ours.accelerate(nn.Linear(3, 3))
    for option in ({"compute_dtype": torch.int8}, {"backend": "cuda"}):
        theirs = ff_net.FFNet(layers(dtype=torch.float32), None)
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))}='?{next(iter(option.values()))}"):
            ours.accelerate(theirs, **option)
        assert type(theirs.layers[0]) is ff_linear.FFLinear
    net = ff_net.FFNet([ff_linear.FFLinear(3, 3, 1.0, 0.1, bias=False)], None)
    with pytest.raises(ValueError, match=r"layers\[0\] of net has bias=False"):
        ours.accelerate(net)
    assert type(net.layers[0]) is ff_linear.FFLinear


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(common.metadata, "version", lambda _: "0.4.0")
    with pytest.raises(ImportError, match=r"fflib 0.4.0 is installed; accepted: fflib==0.3.0"):
        common.require_version("fflib", "0.3.0")
    monkeypatch.undo()
    with pytest.raises(ImportError, match="no-such-package is not installed"):
        common.require_version("no-such-package", "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_where_the_original_overflows_the_accelerated_stays_finite(dtype):
    """log(1 + exp(t)) is infinite from t = 12 in float16 and from 89 in float32."""
    theirs = ff_linear.FFLinear(14, 10, 20.0, 0.02)
    a = ours.accelerate(copy.deepcopy(theirs), compute_dtype=None if dtype == torch.float32 else dtype)
    theirs.to(dtype)
    with torch.no_grad():
        for layer in (theirs, a):
            layer.weight.mul_(200)
    theirs.opt = torch.optim.Adam(theirs.parameters(), lr=0.02)
    x_pos, x_neg = rows().float(), rows().float()
    theirs.run_train(x_pos.to(dtype), x_neg.to(dtype))
    a.run_train(x_pos, x_neg)
    assert theirs.weight.isnan().any()
    assert a.weight.isfinite().all() and a.bias.isfinite().all()


@pytest.mark.parametrize("maximize", [True, False])
def test_a_loss_that_is_infinite_in_float16_is_right_here(maximize):
    """At its threshold of 20 fflib's first loss in float16 is infinite already: e^20 is beyond it."""
    made = layers((14, 10), 20.0, maximize=maximize, dtype=torch.float32)[0]
    half = copy.deepcopy(made).half()
    a = ours.accelerate(copy.deepcopy(made), compute_dtype=torch.float16)
    x_pos, x_neg = rows().half(), rows().half()

    def loss_of(layer: Any, dtype: torch.dtype) -> Tensor:
        sides = ((x_pos, maximize), (x_neg, not maximize))
        return torch.cat([layer.goodness(x.to(dtype), inverse=side)[0] for x, side in sides]).mean()

    exact = loss_of(copy.deepcopy(made).double(), torch.float64)
    assert loss_of(half, torch.float16).isinf()
    half.run_train(x_pos, x_neg)
    assert half.weight.isnan().any()
    assert error(a.step(x_pos.float(), x_neg.float(), "none").loss, exact) <= torch.finfo(torch.float16).eps
    assert a.weight.isfinite().all() and not torch.equal(a.weight, made.weight)


@pytest.mark.parametrize("how", ["compute_dtype", "autocast"])
def test_bfloat16_products_hand_out_the_weights_dtype(how):
    made = ff_net.FFNet(layers(dtype=torch.float32), None)
    a = ours.accelerate(made, compute_dtype=torch.bfloat16 if how == "compute_dtype" else None)
    x = rows().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        a.run_train_combined(x, x.flip(0))
        g, y = a.layers[0].goodness(x)
        assert a.layers[0](x).dtype == y.dtype == g.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return mnist_or_toy()


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("kind", ["FFNet", "FFC"])
def test_fifty_steps_on_mnist_end_at_the_same_weights(kind, maximize, mnist):
    """fflib's example in small: labels concatenated, Adam at 0.02, threshold 20, minibatches of 64."""
    torch.manual_seed(5)
    options = {"dtype": torch.float32, "threshold": 20.0, "maximize": maximize, "widths": (794, 120, 100)}
    a, b = pair(kind, **options)
    x = mnist.train_images.flatten(1).float() / 255
    for step in range(50):
        at = slice(64 * step, 64 * (step + 1))
        labels = mnist.train_labels[at].long()
        wrong = (labels + 1 + torch.arange(len(labels)) % 9) % 10
        x_pos, x_neg = (torch.cat([x[at], nn.functional.one_hot(y, 10).float()], 1) for y in (labels, wrong))
        for net in (a, b):
            net.run_train_combined(x_pos, x_neg)
    for i, (one, other) in enumerate(zip(a.layers, b.layers, strict=True)):
        for name in ("weight", "bias"):
            assert error(getattr(one, name), getattr(other, name)) <= 1e-5, (i, name)
