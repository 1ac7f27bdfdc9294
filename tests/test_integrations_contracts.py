"""The contracts of copied code against those contracts written with autograd."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels.integrations import contracts

from .steps import error
from .test_peer_normalisation import WholeGradient
from .toy_data import mnist_or_toy

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def rows(n: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(n, width, dtype=torch.float64).to(dtype)


def assert_same(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> None:
    mine = dict(ours.named_parameters())
    for name, value in theirs.named_parameters():
        assert error(mine[name], value) <= TOLERANCE[dtype], name


def softplus(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))


def direction(x: Tensor, eps: float) -> Tensor:
    return x / (x.norm(2, 1, keepdim=True) + eps)


class TheirLayer(nn.Linear):
    """The greedy trainer, and FFPytorch's inner loop, by autograd."""

    def __init__(self, like: Any, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(like.in_features, like.out_features, dtype=like.weight.dtype)
        self.load_state_dict(like.state_dict())
        self.epochs = like.num_epochs if isinstance(like, contracts.GreedyLayer) else like.layer_iters
        self.activation, self.threshold = activation, like.threshold
        self.opt = Adam(self.parameters(), lr=0.03)

    def activities(self, x: Tensor) -> Tensor:
        return self.activation(F.linear(direction(x, 1e-4), self.weight, self.bias))

    def learn(self, x_pos: Tensor, x_neg: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.epochs):
            g_pos, g_neg = (self.activities(x).pow(2).mean(1) for x in (x_pos, x_neg))
            loss = softplus(torch.cat([self.threshold - g_pos, g_neg - self.threshold])).mean()
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
        return self.activities(x_pos).detach(), self.activities(x_neg).detach()


@DTYPES
def test_greedy_trainer(dtype):
    ours = [contracts.GreedyLayer(a, b, dtype=dtype, num_epochs=25) for a, b in pairwise([12, 10, 8])]
    theirs = [TheirLayer(layer, F.relu) for layer in ours]
    h, expected = ((rows(9, 12, dtype), rows(9, 12, dtype)),) * 2
    for mine, layer in zip(ours, theirs, strict=True):
        h, expected = mine.train(*h), layer.learn(*expected)
        for a, b in zip(h, expected, strict=True):
            assert error(a, b) <= TOLERANCE[dtype] and not a.requires_grad
        assert_same(mine, layer, dtype)
        assert mine.weight.grad is None
    assert ours[0].opt.state[ours[0].weight]["step"] == 25


def test_greedy_layers_attributes_may_change_and_are_saved():
    layer = contracts.GreedyLayer(12, 10, num_epochs=3)
    layer.threshold, layer.num_epochs = 0.5, 4
    layer.opt = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    theirs = TheirLayer(layer, F.relu)
    theirs.opt = SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    x_pos, x_neg = rows(6, 12, torch.float32), rows(5, 12, torch.float32)
    theirs.learn(x_pos, x_neg)
    for each in (layer, copied, pickled):
        each.train(x_pos, x_neg)
        assert_same(each, theirs, torch.float32)
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
    theirs = [TheirLayer(layer, F.gelu) for layer in ours]
    for _ in range(3):
        h, expected = ((rows(9, 12, dtype), rows(9, 12, dtype)),) * 2
        for mine, layer in zip(ours, theirs, strict=True):
            h, expected = mine(*h), layer.learn(*expected)
            for a, b in zip(h, expected, strict=True):
                assert error(a, b) <= TOLERANCE[dtype]
            assert_same(mine, layer, dtype)
    ours.eval()
    x = rows(4, 12, dtype)
    assert error(ours[0](x), theirs[0].activities(x)) <= TOLERANCE[dtype]
    with pytest.raises(TypeError, match=r"input is 2 tensors; accepted: \(x_pos, x_neg\) in training mode"):
        ours[0](x, x)


class TheirModel(nn.Module):
    """loeweX's model: one forward over all layers, one loss, one optimizer."""

    def __init__(self, like: contracts.OneLoopNetwork, strength: float, whole_gradient: bool) -> None:
        super().__init__()
        self.model = nn.ModuleList(nn.Linear(m.in_features, m.out_features, dtype=m.weight.dtype) for m in like.layers)
        head = like.linear_classifier[0]
        self.linear_classifier = nn.Sequential(
            nn.Linear(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)
        )
        self.load_state_dict({name: t for name, t in like.state_dict().items() if "running_mean" not in name})
        self.means = [torch.zeros_like(m.bias) + 0.5 for m in like.layers]
        self.strength, self.momentum = strength, 0.9
        self.activation = WholeGradient.apply if whole_gradient else F.relu

    @staticmethod
    def norm(z: Tensor) -> Tensor:
        return z / (z.pow(2).mean(1, keepdim=True).sqrt() + 1e-8)

    def forward(self, x_pos: Tensor, x_neg: Tensor, neutral: Tensor, classes: Tensor) -> dict[str, Tensor]:
        z = self.norm(torch.cat([x_pos, x_neg]))
        target = (torch.arange(len(z)) < len(x_pos)).to(z.dtype)
        found: dict[str, Tensor] = {}
        total, spread = z.new_zeros(1), z.new_zeros(1)
        for i, layer in enumerate(self.model):
            z = self.activation(layer(z))
            self.means[i] = self.means[i].detach() * self.momentum + z[: len(x_pos)].mean(0) * (1 - self.momentum)
            peer = ((self.means[i].mean() - self.means[i]) ** 2).mean()
            logits = z.pow(2).sum(1) - z.shape[1]
            spread = spread + peer
            total = total + self.strength * peer
            found[f"loss_layer_{i}"] = F.binary_cross_entropy_with_logits(logits, target)
            found[f"ff_accuracy_layer_{i}"] = ((torch.sigmoid(logits) > 0.5) == target).float().mean()
            total = total + found[f"loss_layer_{i}"]
            z = self.norm(z.detach())
        with torch.no_grad():
            h, seen = self.norm(neutral), []
            for layer in self.model:
                h = self.norm(F.relu(layer(h)))
                seen.append(h)
        output = self.linear_classifier(torch.cat(seen[1:], 1))
        found["classification_loss"] = F.cross_entropy(output, classes)
        found["classification_accuracy"] = (output.argmax(1) == classes).float().mean()
        return {"Loss": total + found["classification_loss"], "Peer Normalization": spread, **found}


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
        assert_same(ours, theirs, dtype)
    if chosen is not None:
        for ours_mean, mean in zip(ours.running_means, theirs.means, strict=True):
            assert error(ours_mean, mean) <= TOLERANCE[dtype]


class LinearReLU(nn.Module):
    """What nebuly's layers wrap."""

    def __init__(self, a: int, b: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(a, b, dtype=dtype), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x))


def their_signed_step(
    layer: nn.Module, optimizer: Any, x: Tensor, signs: Tensor, theta: float
) -> tuple[Tensor, Tensor]:
    """nebuly's step by autograd: activities, and goodness minus theta."""
    y = layer(x)
    above = y.square().mean(1) - theta
    loss = softplus(-above[signs == 1]).mean() + softplus(above[signs == -1]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return y, above


def signed(layer: nn.Module, **options: Any) -> contracts.SignedLayer:
    return contracts.SignedLayer(layer, "Adam", {"lr": 0.03}, "alternative_loss_fn", **options)


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
        assert_same(ours.layer, theirs, dtype)
    y, above = ours.positive_eval(x, 2.0)
    assert error(y, theirs(x)) <= TOLERANCE[dtype] and error(ours(x), y) <= TOLERANCE[dtype]
    assert error(above, y.square().mean(1) - 2) <= TOLERANCE[dtype]
    with pytest.raises(ValueError, match="optimizer_name='Adams' is not in"):
        contracts.SignedLayer(LinearReLU(3, 3), "Adams", {}, "alternative_loss_fn")
    with pytest.raises(ValueError, match="signs holds values other than 1 and -1"):
        ours.ff_train(x, torch.zeros(15), 2.0)


def greedy_on(batches: list[list[Tensor]]) -> tuple[nn.Module, nn.Module]:
    ours = contracts.GreedyLayer(784, 100, num_epochs=50)
    theirs = TheirLayer(ours, F.relu)
    ours.train(*batches[0][:2])
    theirs.learn(*batches[0][:2])
    return ours, theirs


def inner_loop_on(batches: list[list[Tensor]]) -> tuple[nn.Module, nn.Module]:
    ours = contracts.InnerLoopLayer(784, 100)
    theirs = TheirLayer(ours, F.gelu)
    for x_pos, x_neg, *_ in batches[:5]:
        ours(x_pos, x_neg)
        theirs.learn(x_pos, x_neg)
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
    assert_same(ours, theirs, torch.float32)


@pytest.mark.parametrize("layer", [contracts.GreedyLayer, contracts.InnerLoopLayer])
def test_float32_ends_as_near_to_float64_as_autograd_does(layer):
    """Two runs in float32 drift apart at a network's own widths; each is as far from the run in float64."""
    mnist = mnist_or_toy()
    x, labels = mnist.train_images[:200].flatten(1).float() / 255, mnist.train_labels[:200].long()
    sides = ff.overlay_label(x, labels), ff.overlay_label(x, ff.wrong_label(labels))
    distances = torch.zeros(2, 2)
    for _ in range(3):
        start = [layer(784, 300), layer(300, 300)]
        ends = []
        for kind, dtype in (("ours", torch.float32), ("theirs", torch.float32), ("theirs", torch.float64)):
            h, weights = tuple(t.to(dtype) for t in sides), []
            for each in start:
                mine = copy.deepcopy(each).to(dtype)
                mine.num_epochs = mine.layer_iters = 30
                act = mine.relu if layer is contracts.GreedyLayer else mine.activation
                mine = mine if kind == "ours" else TheirLayer(mine, act)
                h = (mine.train if hasattr(mine, "relu") else mine)(*h) if kind == "ours" else mine.learn(*h)
                weights.append(mine.weight.detach())
            ends.append(weights)
        distances += torch.tensor([[error(a, b) for a, b in zip(end, ends[2], strict=True)] for end in ends[:2]])
    ours, theirs = distances
    assert (ours <= 2 * theirs).all(), distances
