"""The layers of docs/howto/own-layer.md: they compute what their text says, and they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ffkernels as ff

from .test_docs import DOCS, run
from .toy_data import toy_data


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    torch.manual_seed(0)
    return run(DOCS / "howto" / "own-layer.md")


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "own"), [("Winners", {"k": 40}), ("Windowed", {"window": 200}), ("Strongest", {}), ("Noisy", {})]
)
def test_they_learn_in_a_network(page, name, own) -> None:
    data = toy_data(600, 100)
    objective = ff.Objective(loss="swish", alpha=6.0)
    net = ff.FFNetwork([page[name](784, 100, norm="rms", objective=objective, **own)])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    images, tested = data.train_images / 255, data.test_images / 255
    for rows in torch.randperm(600).repeat(3).split(20):
        x, labels = images[rows], data.train_labels[rows]
        net.step(ff.overlay_label(x, labels), ff.overlay_label(x, ff.wrong_label(labels)), optimizer)
    assert (net.predict(tested) != data.test_labels).float().mean() < 0.3


def test_winners_alone_are_handed_on(page) -> None:
    layer, x = page["Winners"](20, 16, k=5), torch.rand(8, 20)
    whole, y = ff.linear_forward(x, layer.weight, layer.bias)[0], layer(x)
    strongest = whole.topk(5, dim=1)
    assert torch.equal(y, torch.zeros_like(whole).scatter(1, strongest.indices, strongest.values))
    torch.testing.assert_close(layer.goodness(x), y.square().mean(1))


def test_what_a_window_hides_never_moves(page) -> None:
    layer = page["Windowed"](60, 16, window=20, dtype=torch.float64)
    before = layer.weight.detach().clone()
    x = torch.rand(8, 60, dtype=torch.float64)
    layer.step(x[:4], x[4:], torch.optim.SGD(layer.parameters(), lr=0.1))
    moved = layer.weight != before
    assert moved.any() and not moved[~layer.seen].any()
    rows = x / x.square().mean(1, keepdim=True).sqrt()
    for unit in (0, 15):
        seen = layer.seen[unit]
        expected = rows[:, seen] @ layer.weight[unit, seen] + layer.bias[unit]
        torch.testing.assert_close(layer(x)[:, unit], expected.relu(), rtol=1e-10, atol=1e-12)


def test_a_residual_block_steps_as_autograd_does(page) -> None:
    block, objective = page["Residual"](20).double(), ff.Objective(threshold=0.5)
    other = nn.Linear(20, 20, dtype=torch.float64)
    other.load_state_dict(block.linear.state_dict())
    x_pos, x_neg = torch.rand(2, 8, 20, dtype=torch.float64)
    pos, neg = block.step(x_pos, x_neg, torch.optim.SGD(block.parameters(), lr=0.1), objective)
    x = torch.cat([x_pos, x_neg])
    rows = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    g = torch.relu(other(rows)).square().mean(1)
    nn.functional.softplus(torch.cat([0.5 - g[:8], g[8:] - 0.5])).mean().backward()
    optimizer.step()
    torch.testing.assert_close(block.linear.weight, other.weight, rtol=1e-10, atol=1e-12)
    expected = x + torch.relu(other(rows))
    torch.testing.assert_close(torch.cat([pos, neg]), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block(x_pos), expected[:8], rtol=1e-10, atol=1e-12)
