"""bioff itself before and after `accelerate`: the same numbers."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .steps import error
from .toy_data import mnist_or_toy

pytest.importorskip("bioff")

from bioff import core

from ffkernels.integrations import bioff as ours

EXACT = 1e-10


pytestmark = pytest.mark.usefixtures("fresh_warnings")


def pair(epochs: int = 8, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (9, 8, 7)) -> tuple[Any, Any]:
    """The same net twice, the first accelerated."""
    theirs = core.Net(sizes[0] - 2, sizes[1:], num_classes=2, threshold=0.2, num_epochs=epochs).to(dtype)
    return ours.accelerate(copy.deepcopy(theirs)), theirs


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = EXACT) -> None:
    for (name, value), other in zip(b.named_parameters(), a.parameters(), strict=True):
        assert error(other, value) <= tolerance, name


def rows(n: int = 10) -> Tensor:
    return torch.rand(n, 9, dtype=torch.float64)


def test_training_is_bioffs_own():
    a, b = pair()
    x_pos, x_neg, weights = rows(), rows(), torch.rand(10, dtype=torch.float64) + 0.5
    for _ in range(2):
        for net in (a, b):
            net.train(x_pos, x_neg, weights)
        assert_same(a, b)
    h = [layer.train(x_pos, x_neg, weights) for layer in (a.layers[0], b.layers[0])]
    for mine, theirs in zip(*h, strict=True):
        assert error(mine, theirs) <= EXACT and not mine.requires_grad
    x = rows()[:, :7]
    assert torch.equal(a.predict(x, 2), b.predict(x, 2))
    state = a.layers[0].opt.state[a.layers[0].weight]
    assert state["step"] == 24
    assert error(state["exp_avg"], b.layers[0].opt.state[b.layers[0].weight]["exp_avg"]) <= EXACT


def test_float64_weights_of_rows_go_with_float32_layers():
    a, b = pair(dtype=torch.float32, epochs=3)
    x_pos, x_neg, weights = rows().float(), rows().float(), torch.rand(10, dtype=torch.float64)
    for net in (a, b):
        net.train(x_pos, x_neg, weights)
    assert_same(a, b, 1e-5)


def test_nets_made_inside_the_classifier():
    x, y = torch.rand(40, 7).numpy(), (torch.arange(40) % 3 == 0).long().numpy()
    from bioff import BioFFClassifier

    found = []
    for accelerated in (True, False):
        classifier = BioFFClassifier(hidden_dims=[8, 6], num_epochs=20, threshold=0.2)
        if accelerated:
            with ours.accelerated():
                classifier.fit(x, y)
            assert type(classifier.model.layers[0]) is ours.Layer
        else:
            classifier.fit(x, y)
            assert type(classifier.model.layers[0]) is core.Layer
        found.append(classifier)
    assert_same(found[0].model, found[1].model, 1e-5)
    assert (found[0].predict(x) == found[1].predict(x)).all()


def test_gradients_and_restore():
    a, b = pair()
    x = rows().requires_grad_()
    gradients = []
    for net in (a, b):
        loss = net.layers[1](net.layers[0](x)).sum()
        gradients.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert error(one, other) <= EXACT
    assert {type(layer) for layer in ours.restore(a).layers} == {core.Layer}


def test_directional_derivatives_of_the_input_are_bioffs_own():
    a, b = (net.layers[0] for net in pair())
    x, direction = rows(), rows()
    found, expected = (torch.func.jvp(lambda x, layer=layer: layer(x), (x,), (direction,)) for layer in (a, b))
    assert error(found[0], expected[0]) <= EXACT and error(found[1], expected[1]) <= EXACT


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_train_on(copied):
    a, b = pair()
    x_pos, x_neg, weights = rows(), rows(), torch.rand(10, dtype=torch.float64)
    a.train(x_pos, x_neg, weights)
    a_copy = copied(a)
    for net in (a, a_copy, b, b):
        net.train(x_pos, x_neg, weights)
    assert type(a_copy.layers[0]) is ours.Layer
    assert_same(a, b)
    assert_same(a_copy, b)


def tanh(layer: Any) -> None:
    layer.relu = nn.Tanh()


def frozen(layer: Any) -> None:
    layer.bias.requires_grad_(False)


def watched(layer: Any) -> None:
    layer.relu.register_forward_hook(lambda module, x, y: 2 * y)


def capped(layer: Any) -> None:
    layer.relu.forward = lambda z: z.clamp(0, 0.3)


def masked(layer: Any) -> None:
    layer.weight.register_hook(lambda g: g * (g > 0))


def own_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)


def parametrized(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.opt = torch.optim.Adam(layer.parameters(), lr=0.01)


@pytest.mark.parametrize("change", [tanh, frozen, watched, capped, masked, own_forward, parametrized])
def test_what_cannot_run_here_trains_on_its_original_path_with_one_warning(change):
    a, b = pair()
    for net in (a, b):
        change(net.layers[0])
    x_pos, x_neg, weights = rows(), rows(), torch.rand(10, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for net in (a, b):
            net.train(x_pos, x_neg, weights)
            net.train(x_pos, x_neg, weights)
    assert len(caught) == 1 and "runs on its original path" in str(caught[0].message)
    assert_same(a, b)


def test_rows_that_wait_for_a_gradient_get_it():
    a, b = (net.layers[0] for net in pair())
    x_pos, x_neg, weights = rows(), rows(), torch.ones(10, dtype=torch.float64)
    gradients = []
    for layer in (a, b):
        x = x_pos.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.train(x, x_neg, weights)
        gradients.append(x.grad)
    assert error(*gradients) <= EXACT
    assert_same(a, b)


def test_accelerated_may_be_nested():
    with ours.accelerated():
        with ours.accelerated():
            pass
        assert core.Layer is ours.Layer
    assert core.Layer is core.Net(3, [3]).layers[0].__class__ is not ours.Layer


def test_unequal_sides_run_on_the_original_path():
    a, b = pair()
    weights = torch.ones(1, dtype=torch.float64)
    x_pos, x_neg = rows(4), rows(4)
    with pytest.warns(UserWarning, match=r"sample_weights of shapes \(4, 9\), \(4, 9\), \(1,\) are not rows"):
        a.layers[0].train(x_pos, x_neg, weights)
    b.layers[0].train(x_pos, x_neg, weights)
    assert_same(a, b)


def test_mistakes():
    from bioff import BioFFClassifier

    for wrong in (nn.Linear(3, 3), BioFFClassifier()):
        with pytest.raises(TypeError, match=rf"net is a {type(wrong).__name__} without bioff layers.*accelerated\(\)"):
            ours.accelerate(wrong)
    with pytest.raises(ValueError, match="layer of net has bias=False"):
        ours.accelerate(core.Layer(3, 3, bias=False))
    with pytest.raises(ValueError, match="layer has bias=False"):
        ours.Layer(3, 3, bias=False)


def test_fifty_steps_on_mnist_end_at_the_same_weights():
    """Zeros against ones, as bioff tells two classes apart."""
    mnist = mnist_or_toy()
    two = (mnist.train_labels < 2).nonzero().squeeze(1)[:128]
    x, y = mnist.train_images[two].flatten(1).float() / 255, mnist.train_labels[two].long()
    torch.manual_seed(5)
    theirs = core.Net(784, [120, 100], num_classes=2, num_epochs=50)
    a = ours.accelerate(copy.deepcopy(theirs))
    x_pos, x_neg = (core.inject_label(x, labels, 2) for labels in (y, 1 - y))
    weights = torch.where(y == 0, 1.1, 0.9)
    for net in (a, theirs):
        net.train(x_pos, x_neg, weights)
    assert_same(a, theirs, 1e-5)
