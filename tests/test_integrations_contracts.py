"""The contracts of copied code against those contracts written with autograd."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels.integrations import contracts

from .copied_code import LinearReLU, Plain, TheirModel, assert_same, direction, rows, signed, their_signed_step
from .steps import error
from .toy_data import mnist_or_toy

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@DTYPES
def test_greedy_trainer(dtype):
    ours = [contracts.GreedyLayer(a, b, dtype=dtype, num_epochs=25) for a, b in pairwise([12, 10, 8])]
    theirs = [Plain(copy.deepcopy(layer)) for layer in ours]
    h, expected = ((rows(9, 12, dtype), rows(9, 12, dtype)),) * 2
    for mine, layer in zip(ours, theirs, strict=True):
        h, expected = mine.train(*h), layer.learn_apart(*expected)
        for a, b in zip(h, expected, strict=True):
            assert error(a, b) <= TOLERANCE[dtype] and not a.requires_grad
        assert_same(mine, layer.layer, TOLERANCE[dtype])
        assert mine.weight.grad is None
    assert ours[0].opt.state[ours[0].weight]["step"] == 25


def test_greedy_layers_attributes_may_change_and_are_saved():
    layer = contracts.GreedyLayer(12, 10, num_epochs=3)
    layer.threshold, layer.num_epochs = 0.5, 4
    layer.opt = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    theirs = contracts.GreedyLayer(12, 10, num_epochs=4, threshold=0.5)
    theirs.load_state_dict(layer.state_dict())
    theirs.opt = SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    x_pos, x_neg = rows(6, 12, torch.float32), rows(5, 12, torch.float32)
    Plain(theirs).learn(x_pos, x_neg)
    for each in (layer, copied, pickled):
        each.train(x_pos, x_neg)
        assert_same(each, theirs, TOLERANCE[torch.float32])
    with pytest.raises(TypeError, match="x_neg is a NoneType"):
        layer.train(x_pos)
    with pytest.raises(TypeError, match=r"x_pos is torch\.int64; accepted: torch\.float32"):
        layer.train(x_pos.long(), x_neg)
    net = nn.Sequential(layer).eval()
    assert not layer.training and net.train()[0].training


@DTYPES
def test_inner_loop_with_gelu(dtype):
    """Ten steps of every layer on each of three batches."""
    ours = nn.ModuleList([contracts.InnerLoopLayer(a, b, dtype=dtype) for a, b in pairwise([12, 10, 8])])
    theirs = [Plain(copy.deepcopy(layer)) for layer in ours]
    for _ in range(3):
        h, expected = ((rows(9, 12, dtype), rows(9, 12, dtype)),) * 2
        for mine, layer in zip(ours, theirs, strict=True):
            h, expected = mine(*h), layer.learn_apart(*expected)
            for a, b in zip(h, expected, strict=True):
                assert error(a, b) <= TOLERANCE[dtype]
            assert_same(mine, layer.layer, TOLERANCE[dtype])
    ours.eval()
    x = rows(4, 12, dtype)
    assert error(ours[0](x), theirs[0].activities(x)) <= TOLERANCE[dtype]
    with pytest.raises(TypeError, match=r"input is 2 tensors; accepted: \(x_pos, x_neg\) in training mode"):
        ours[0](x, x)


@DTYPES
@pytest.mark.parametrize("peer", ["whole gradient", "gated", "none"])
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.RMSprop])
def test_one_loop_model(dtype, peer, optimizer):
    """One SGD with a group for the classifier; an optimizer that does not run fused steps the same."""
    strength = 0.0 if peer == "none" else 0.03
    chosen = None if peer == "none" else ff.PeerNormalisation("loewex", gated=peer == "gated")
    ours = contracts.OneLoopNetwork([14, 12, 10, 9], 4, chosen, dtype=dtype)
    theirs = TheirModel(ours, strength, peer == "whole gradient")

    def optimizer_of(model: Any) -> Any:
        mine = list(model.linear_classifier.parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in mine)]
        options: dict[str, Any] = {"momentum": 0.9} | ({} if optimizer is SGD else {"eps": 1e-3})
        groups = [{"params": rest, "lr": 1e-3, "weight_decay": 3e-4}, {"params": mine, "lr": 1e-2}]
        return optimizer(groups, **options)

    optimizers = [optimizer_of(model) for model in (ours, theirs)]
    for _ in range(25):
        classes = torch.randint(4, (10,))
        x = rows(10, 14, dtype)
        batch = [
            ff.overlay_label(x, classes, 4),
            ff.overlay_label(x, ff.wrong_label(classes, 4), 4),
            ff.neutral_label(x, 4),
        ]
        names = ("pos_images", "neg_images", "neutral_sample")
        inputs = {name: t.view(10, 1, 2, 7) for name, t in zip(names, batch, strict=True)}
        log = ours.train_step(inputs, {"class_labels": classes}, optimizers[0])
        expected = theirs(*batch, classes)
        optimizers[1].zero_grad()
        expected["Loss"].backward()
        optimizers[1].step()
        assert list(log) == list(expected)
        for name in set(expected) - ({"Peer Normalization"} if peer == "none" else set()):
            assert log[name].shape == expected[name].shape and not log[name].requires_grad, name
            assert error(log[name], expected[name]) <= TOLERANCE[dtype], name
        assert_same(ours, theirs, TOLERANCE[dtype])
    if chosen is not None:
        for ours_mean, mean in zip(ours.running_means, theirs.means, strict=True):
            assert error(ours_mean, mean) <= TOLERANCE[dtype]


@DTYPES
def test_signs_in_any_row_order(dtype):
    theirs = LinearReLU(12, 10, dtype)
    ours = signed(copy.deepcopy(theirs))
    optimizer = Adam(theirs.parameters(), lr=0.03)
    for step in range(20):
        x, theta = direction(rows(15, 12, dtype), 1e-8), 1.0 + step / 20
        signs = torch.where(torch.rand(15) < 0.4, 1, -1)
        y, separation = ours.ff_train(x, signs, theta)
        expected, above = their_signed_step(theirs, optimizer, x, signs, theta)
        assert error(y, expected) <= TOLERANCE[dtype] and not y.requires_grad
        for a, side in zip(separation, (1, -1), strict=True):
            assert type(a) is float
            # A difference of goodness and threshold: its rounding is theirs.
            assert error(torch.tensor(a, dtype=dtype), above[signs == side].mean(), theta) <= TOLERANCE[dtype]
        assert_same(ours.layer, theirs, TOLERANCE[dtype])
    y, above = ours.positive_eval(x, 2.0)
    assert error(y, theirs(x)) <= TOLERANCE[dtype] and error(ours(x), y) <= TOLERANCE[dtype]
    assert error(above, y.square().mean(1) - 2) <= TOLERANCE[dtype]
    with pytest.raises(ValueError, match="optimizer_name='Adams' is not in"):
        contracts.SignedLayer(LinearReLU(3, 3), "Adams", {}, "alternative_loss_fn")
    with pytest.raises(ValueError, match="signs holds values other than 1 and -1"):
        ours.ff_train(x, torch.zeros(15), 2.0)


def greedy_on(batches: list[list[Tensor]]) -> tuple[nn.Module, nn.Module]:
    ours = contracts.GreedyLayer(784, 100, num_epochs=50)
    theirs = copy.deepcopy(ours)
    ours.train(*batches[0][:2])
    Plain(theirs).learn(*batches[0][:2])
    return ours, theirs


def inner_loop_on(batches: list[list[Tensor]]) -> tuple[nn.Module, nn.Module]:
    ours = contracts.InnerLoopLayer(784, 100)
    theirs = copy.deepcopy(ours)
    for x_pos, x_neg, *_ in batches[:5]:
        ours(x_pos, x_neg)
        Plain(theirs).learn(x_pos, x_neg)
    return ours, theirs


def one_loop_on(batches: list[list[Tensor]]) -> tuple[nn.Module, nn.Module]:
    ours = contracts.OneLoopNetwork([784, 100, 80])
    theirs = TheirModel(ours, 0.03, whole_gradient=True)
    optimizers = [SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=3e-4) for model in (ours, theirs)]
    for *images, labels in batches:
        inputs = dict(zip(("pos_images", "neg_images", "neutral_sample"), images, strict=True))
        ours.train_step(inputs, {"class_labels": labels}, optimizers[0])
        optimizers[1].zero_grad()
        theirs(*images, labels)["Loss"].backward()
        optimizers[1].step()
    return ours, theirs


def signed_on(batches: list[list[Tensor]]) -> tuple[nn.Module, nn.Module]:
    theirs = LinearReLU(784, 100)
    ours = signed(copy.deepcopy(theirs))
    optimizer = Adam(theirs.parameters(), lr=0.03)
    for x_pos, x_neg, *_ in batches:
        order = torch.randperm(2 * len(x_pos))
        x = direction(torch.cat([x_pos, x_neg])[order], 1e-8)
        signs = torch.where(order < len(x_pos), 1, -1)
        ours.ff_train(x, signs, 2.0)
        their_signed_step(theirs, optimizer, x, signs, 2.0)
    return ours.layer, theirs


@pytest.mark.parametrize("run", [greedy_on, inner_loop_on, one_loop_on, signed_on])
def test_fifty_steps_on_mnist_end_at_the_same_weights(run):
    mnist = mnist_or_toy()
    batches = []
    for at in range(0, 50 * 64, 64):
        labels = mnist.train_labels[at : at + 64].long()
        x = mnist.train_images[at : at + 64].flatten(1).float() / 255
        wrong = ff.wrong_label(labels)
        batches.append([ff.overlay_label(x, labels), ff.overlay_label(x, wrong), ff.neutral_label(x), labels])
    ours, theirs = run(batches)
    assert_same(ours, theirs, TOLERANCE[torch.float32])


@pytest.mark.parametrize("layer", [contracts.GreedyLayer, contracts.InnerLoopLayer])
def test_float32_ends_as_near_to_float64_as_autograd_does(layer):
    """Two runs in float32 drift apart at a network's own widths; each is as far from the run in float64.

    Medians over the starts: from some, rounding grows a hundredfold in either run, and by chance.
    """
    mnist = mnist_or_toy()
    x, labels = mnist.train_images[:100].flatten(1).float() / 255, mnist.train_labels[:100].long()
    sides = ff.overlay_label(x, labels), ff.overlay_label(x, ff.wrong_label(labels))
    distances = []
    for _ in range(5):
        start = [layer(784, 300), layer(300, 300)]
        ends = []
        for kind, dtype in (("ours", torch.float32), ("theirs", torch.float32), ("theirs", torch.float64)):
            h, weights = tuple(t.to(dtype) for t in sides), []
            for each in start:
                mine = copy.deepcopy(each).to(dtype)
                mine.num_epochs = mine.layer_iters = 30
                if kind == "theirs":
                    h = Plain(mine).learn_apart(*h)
                else:
                    h = (mine.train if layer is contracts.GreedyLayer else mine)(*h)
                weights.append(mine.weight.detach())
            ends.append(weights)
        distances.append([[error(a, b) for a, b in zip(end, ends[2], strict=True)] for end in ends[:2]])
    ours, theirs = torch.tensor(distances).median(0).values
    assert (ours <= 2 * theirs).all(), distances
