"""Modules: a network is its layers' steps, parameters are registered, and objects survive what people do to them."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels import reference

from .steps import error

K = 4


def network(outputs: str = "post", **options: object) -> ff.FFNetwork:
    torch.manual_seed(1)
    widths = [12, 9, 7, 6]
    options = {"dtype": torch.float64, "norm": "rms", **options}
    return ff.FFNetwork([ff.FFLinear(a, b, outputs=outputs, **options) for a, b in pairwise(widths)])


def sides(rows: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, 12, dtype=torch.float64), torch.rand(rows, 12, dtype=torch.float64)


@pytest.mark.parametrize("outputs", ["post", "pre"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_network_step_is_the_definition_layer_by_layer(outputs, mixed):
    net = network(outputs)
    other = copy.deepcopy(net)
    ours, theirs = Adam(net.parameters(), eps=1e-3), Adam(other.parameters(), eps=1e-3)
    for _ in range(3):
        x_pos, x_neg = sides()
        options = {}
        if mixed:
            options = {"is_positive": torch.arange(20) % 3 != 0}
            x_pos, x_neg = torch.cat([x_pos, x_neg]), None
        results = net.step(x_pos, x_neg, ours, **options)
        for i, layer in enumerate(other):
            theirs.zero_grad()
            expected = reference.linear_step_(
                x_pos, x_neg, layer.weight, layer.bias, theirs, objective=layer.objective, norm="rms",
                outputs=outputs, **options,
            )  # fmt: skip
            theirs.zero_grad()
            assert error(results[i].loss, expected.loss) < 1e-10
            assert error(results[i].goodness_pos, expected.goodness_pos) < 1e-10
            x_pos, x_neg = (expected.y, None) if mixed else (expected.pos, expected.neg)
        assert all(result.y is None for result in results)
    for name, value in other.state_dict().items():
        assert error(net.state_dict()[name], value) < 1e-10, name


def test_layerwise_training_is_each_layer_alone():
    net, x = network(), sides()
    other = copy.deepcopy(net)
    losses = net.train_layerwise(*x, [SGD(layer.parameters(), lr=0.5) for layer in net], steps=6)
    pos, neg = x
    for i, layer in enumerate(other):
        optimizer = SGD(layer.parameters(), lr=0.5)
        for k in range(6):
            expected = reference.linear_step_(
                pos,
                neg,
                layer.weight,
                layer.bias,
                optimizer,
                objective=layer.objective,
                norm="rms",
                outputs="post",
            )
            assert error(losses[i][k], expected.loss) < 1e-10
        pos, neg = expected.pos, expected.neg
    assert all(loss[-1] < loss[0] for loss in losses)


def test_goodness_and_activities():
    net, (x, _) = network(), sides()
    goodness = net.goodness(x)
    assert goodness.shape == (10, 3)
    y = x
    for i, layer in enumerate(net):
        y = reference.linear_forward(
            y, layer.weight, layer.bias, norm="rms", eps=1e-4, eps_mode="add", activation="relu"
        )
        assert error(net.activities(x)[i], y) < 1e-12
        assert error(goodness[:, i], y.square().mean(1)) < 1e-12
        assert error(layer.goodness(net.activities(x)[i - 1] if i else x), goodness[:, i]) < 1e-12
    assert error(net(x), y) < 1e-12


@pytest.mark.parametrize("layers", [None, [1, 2], [-1]])
@pytest.mark.parametrize("maximize", [True, False])
def test_predict_is_the_best_label(layers, maximize):
    net, (x, _) = network(objective=ff.Objective(maximize=maximize)), sides(50)
    totals = []
    for label in range(K):
        marked = x.clone()
        marked[:, :K] = 0
        marked[:, label] = 0.7
        goodness = net.goodness(marked)
        totals.append(sum(goodness[:, i] for i in (layers or range(3))))
    stacked = torch.stack(totals, 1)
    expected = stacked.argmax(1) if maximize else stacked.argmin(1)
    assert len(expected.unique()) > 1
    assert torch.equal(net.predict(x, K, layers=layers, label_value=0.7), expected)


def test_no_rows_have_no_labels_activities_or_features():
    net, (x, _) = network(), sides()
    for rows in (x[:0], x[:0].float()):
        labels = net.to(rows.dtype).predict(rows, K)
        assert labels.dtype == torch.int64 and labels.tolist() == []
    assert net.goodness(rows).shape == (0, 3) and net.features(rows, num_classes=K).shape == (0, 13)


def test_layerwise_training_takes_rows_in_any_order():
    net, (x_pos, x_neg) = network(), sides()
    other = copy.deepcopy(net)
    side = torch.arange(20) < 10
    ours = net.train_layerwise(torch.cat([x_pos, x_neg]), None, SGD(net.parameters(), lr=0.1), 2, is_positive=side)
    theirs = other.train_layerwise(x_pos, x_neg, SGD(other.parameters(), lr=0.1), 2)
    assert error(torch.cat(ours), torch.cat(theirs)) < 1e-10
    assert error(net.goodness(x_pos), other.goodness(x_pos)) < 1e-10


def test_layers_that_share_their_parameters_step_as_often():
    layer = ff.FFLinear(12, 12, dtype=torch.float64)
    net, other = ff.FFNetwork([layer, layer]), ff.FFNetwork([copy.deepcopy(layer)])
    x_pos, x_neg = sides()
    optimizers = [Adam(n.parameters(), lr=0.1) for n in (net, other)]
    net.step(x_pos, x_neg, optimizers[0])
    first = other.layers[0].step(x_pos, x_neg, optimizers[1])
    other.layers[0].step(first.pos, first.neg, optimizers[1])
    assert error(layer.weight, other.layers[0].weight) < 1e-12
    assert optimizers[0].state[layer.weight]["step"] == 2


@pytest.mark.parametrize(("layers", "used"), [(None, [1, 2]), ([0, 2], [0, 2])])
def test_features_are_normalised_activities_under_the_neutral_label(layers, used):
    net, (x, _) = network(), sides()
    marked = x.clone()
    marked[:, :K] = 1 / K
    expected = torch.cat([reference.normalise(net.activities(marked)[i], "rms", 1e-4, "add") for i in used], 1)
    assert error(net.features(x, layers, K), expected) < 1e-12
    assert network().features(x, num_classes=K).shape == (10, 13)
    alone = ff.FFNetwork([ff.FFLinear(12, 5, dtype=torch.float64)])
    assert alone.features(x, num_classes=K).shape == (10, 5)


def test_parameters_pickle_deepcopy_state_dict_and_to():
    net, (x_pos, x_neg) = network(), sides()
    assert [name for name, _ in net.named_parameters()][:2] == ["layers.0.weight", "layers.0.bias"]
    net.step(x_pos, x_neg, Adam(net.parameters()))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    loaded = network()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), loaded):
        assert torch.equal(other.goodness(x_pos), net.goodness(x_pos))
    before = net.goodness(x_pos)
    net.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert error(net.goodness(x_pos.float()), before) < 1e-6


def test_options_may_change_between_steps():
    layer, (x_pos, x_neg) = ff.FFLinear(12, 9, dtype=torch.float64), sides()
    optimizer = SGD(layer.parameters(), lr=0.0)
    first = layer.step(x_pos, x_neg, optimizer)
    layer.objective = ff.Objective(threshold=5.0)
    second = layer.step(x_pos, x_neg, optimizer)
    third = layer.step(x_pos, x_neg, optimizer, objective=ff.Objective(), outputs="none")
    assert first.loss == third.loss != second.loss
    assert third.y is None


def test_learning_separates_positive_from_negative_data():
    """On rows that differ in one field only, goodness of unseen positives ends above that of unseen negatives."""
    torch.manual_seed(3)
    net = ff.FFNetwork([ff.FFLinear(20, 32), ff.FFLinear(32, 32)])
    optimizer = Adam(net.parameters(), lr=0.02)

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(rows, 20)
        labels = (x[:, 4:12].sum(1) > x[:, 12:].sum(1)).long()
        return ff.overlay_label(x, labels, 2), ff.overlay_label(x, 1 - labels, 2)

    for _ in range(300):
        net.step(*batch(64), optimizer)
    pos, neg = batch(500)
    assert (net.goodness(pos).sum(1) > net.goodness(neg).sum(1)).float().mean() > 0.75
