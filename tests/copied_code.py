"""Code that programs copy, by its formulas and autograd: what `ffkernels.integrations.contracts` is held against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffkernels.integrations import contracts

from .steps import error
from .test_peer_normalisation import WholeGradient

EXACT = 1e-10


def rows(n: int = 6, width: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, width, dtype=torch.float64).to(dtype)


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = EXACT) -> None:
    mine = dict(a.named_parameters())
    for name, value in b.named_parameters():
        assert error(mine[name], value) <= tolerance, name


def softplus(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))


def direction(x: Tensor, eps: float) -> Tensor:
    return x / (x.norm(2, 1, keepdim=True) + eps)


class Plain:
    """The greedy and the inner-loop layer by autograd, on a module's weights, optimizer and attributes."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.greedy = isinstance(layer, contracts.GreedyLayer)

    def activities(self, x: Tensor) -> Tensor:
        act = self.layer.relu if self.greedy else self.layer.activation
        return act(direction(x, 1e-4) @ self.layer.weight.t() + self.layer.bias)

    def learn(self, x_pos: Tensor, x_neg: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        for _ in range(layer.num_epochs if self.greedy else layer.layer_iters):
            g_pos, g_neg = (self.activities(x).pow(2).mean(1) for x in (x_pos, x_neg))
            loss = softplus(torch.cat([layer.threshold - g_pos, g_neg - layer.threshold])).mean()
            layer.opt.zero_grad()
            loss.backward(retain_graph=True)
            layer.opt.step()
        return self.activities(x_pos), self.activities(x_neg)

    def learn_apart(self, x_pos: Tensor, x_neg: Tensor) -> tuple[Tensor, Tensor]:
        """`learn`, its activities without gradient."""
        h_pos, h_neg = self.learn(x_pos, x_neg)
        return h_pos.detach(), h_neg.detach()


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
