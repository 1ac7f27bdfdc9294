"""The training steps people write today in plain PyTorch, and how to ask this package for the same.

An original is a forward, `(x [rows, in], weight [out, in], bias [out] or None) -> y [rows, out]`, a loss over both
sides, and an optimizer, from its published formulas; autograd does the rest. The losses take
the function that stands for log(1 + e^t): the original's own, or a stable one for tests. Peer normalisation is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import ffkernels as ff
from ffkernels.spec import OutputsOf

Activation = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor], Tensor]
Softplus = Callable[[Tensor], Tensor]
Outcome = tuple[Tensor, Tensor, Tensor]


def naive_softplus(t: Tensor) -> Tensor:
    """log(1 + e^t) as most of the codes write it: infinite from t = 89 in float32."""
    return torch.log(1 + torch.exp(t))


def stable_softplus(t: Tensor) -> Tensor:
    """log(1 + e^t) at any t; `F.softplus` drops e^-t from t = 20 on, which float64 sees."""
    return torch.logaddexp(t, torch.zeros_like(t))


class HintonSGD(Optimizer):
    """The update of Hinton's Matlab code: `a <- m a + (1 - m) grad; p <- p - lr (a + decay p)`.

    The average `a` starts at zero and the decay stays outside it. `weight_decay` acts on parameters of two or
    more dimensions: biases do not decay.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure is not supported; accepted: None, with gradients in .grad")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                if p.dim() > 1:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average, alpha=group["lr"])


# Forward: a layer's activities [rows, out] from x [rows, in].


def _relu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return F.relu(F.linear(norm(x), weight, bias))


class _WholeGradientReLU(torch.autograd.Function):
    """loeweX's ReLU, which lets the gradient of inactive units through (it is zero anyway for goodness)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def _loewex_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x / (x.pow(2).mean(dim=-1, keepdim=True).sqrt() + 1e-8)
    return _WholeGradientReLU.apply(F.linear(x, weight, bias))


def _direction_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = torch.relu, eps: float = 1e-4
) -> Tensor:
    product = torch.mm(x / (x.norm(2, 1, keepdim=True) + eps), weight.T)
    return activation(product if bias is None else product + bias.unsqueeze(0))


_hinton_forward = partial(_relu_forward, norm=lambda x: x / (x.square().mean(1, keepdim=True).sqrt() + math.exp(-100)))
_normalize_forward = partial(_relu_forward, norm=partial(F.normalize, dim=1))
_plain_forward = partial(_relu_forward, norm=lambda x: x)
_rms_forward = partial(_relu_forward, norm=lambda x: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8))
_recurrentff_forward = partial(_relu_forward, norm=lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-8))


# Loss: (layer, x_pos, x_neg, softplus) -> (loss, y_pos, y_neg).


def _hinton_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus) -> Outcome:
    y_pos, y_neg = layer(x_pos), layer(x_neg)
    width = y_pos.shape[1]
    cost_pos = softplus(width - y_pos.square().sum(1)).sum() / len(x_pos)
    cost_neg = softplus(y_neg.square().sum(1) - width).sum() / len(x_neg)
    # His gradient is (1 - p) y: the 2 of the derivative of y^2 is dropped.
    return (cost_pos + cost_neg) / 2, y_pos, y_neg


def _loewex_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus) -> Outcome:
    y = layer(torch.cat([x_pos, x_neg]))
    target = torch.zeros(len(y), dtype=y.dtype, device=y.device)
    target[: len(x_pos)] = 1
    loss = F.binary_cross_entropy_with_logits(y.pow(2).sum(dim=-1) - y.shape[1], target)
    return loss, y[: len(x_pos)], y[len(x_pos) :]


def _joint_mean_loss(
    layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus, threshold: float, maximize: bool = True
) -> Outcome:
    """The loss of mohammadpz and its descendants: one mean over the rows of both sides."""
    y_pos, y_neg = layer(x_pos), layer(x_neg)
    t_pos, t_neg = threshold - y_pos.pow(2).mean(1), y_neg.pow(2).mean(1) - threshold
    if not maximize:
        t_pos, t_neg = -t_pos, -t_neg
    return softplus(torch.cat([t_pos, t_neg])).mean(), y_pos, y_neg


def _nebuly_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus) -> Outcome:
    signs = torch.cat([torch.ones(len(x_pos), device=x_pos.device), -torch.ones(len(x_neg), device=x_pos.device)])
    y = layer(torch.cat([x_pos, x_neg]))
    goodness = torch.square(y).mean(dim=1)
    loss_pos = softplus(2.0 - goodness[signs == 1]).mean()
    loss_neg = softplus(goodness[signs == -1] - 2.0).mean()
    return loss_pos + loss_neg, y[: len(x_pos)], y[len(x_pos) :]


def pair_weights(n_pos: int, n_neg: int) -> Tensor:
    """`[n_pos + n_neg]`: bioff weighs a pair of rows by how rare its class is; here every third is rare."""
    return torch.cat([torch.where(torch.arange(n) % 3 == 0, 1.75, 0.625) for n in (n_pos, n_neg)])


def _bioff_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus) -> Outcome:
    rarity = pair_weights(len(x_pos), 0).to(x_pos)
    y_pos, y_neg = layer(x_pos), layer(x_neg)
    l_pos = rarity * softplus(2.0 - y_pos.pow(2).mean(1))
    l_neg = rarity * softplus(y_neg.pow(2).mean(1) - 2.0)
    return (l_pos + l_neg).mean(), y_pos, y_neg


def _separate_means_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus) -> Outcome:
    y_pos, y_neg = layer(x_pos), layer(x_neg)
    g_pos, g_neg = y_pos.pow(2).mean(1), y_neg.pow(2).mean(1)
    return softplus(2.0 - g_pos).mean() + softplus(g_neg - 2.0).mean(), y_pos, y_neg


def _pair_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus, alpha: float, swish: bool) -> Outcome:
    y_pos, y_neg = layer(x_pos), layer(x_neg)
    t = -alpha * (y_pos.pow(2).mean(1) - y_neg.pow(2).mean(1))
    return (F.silu(t) if swish else softplus(t)).mean(), y_pos, y_neg


def _group_loss(layer: Layer, x: Tensor, labels: Tensor, softplus: Softplus) -> Outcome:
    """Class groups (CwC, Papachristodoulou et al., 2024) in a linear layer: the labels stand where negatives would."""
    y = layer(x)
    goodness = y.pow(2).view(len(y), 10, -1).mean(2)
    return F.cross_entropy(goodness, labels), y, labels


def _head_loss(layer: Layer, x: Tensor, labels: Tensor, softplus: Softplus, head: Tensor) -> Outcome:
    """Mono-Forward (Gong et al., 2025): a learned matrix makes the classes' goodness of a layer's activities."""
    y = layer(x)
    return F.cross_entropy(F.linear(y, head), labels), y, labels


def _barbano_loss(layer: Layer, x_pos: Tensor, x_neg: Tensor, softplus: Softplus) -> Outcome:
    y_pos, y_neg = layer(x_pos), layer(x_neg)
    loss_pos = softplus(10.0 - y_pos.norm(dim=-1)).mean()
    loss_neg = softplus(y_neg.norm(dim=-1) - 10.0).mean()
    return loss_pos + loss_neg, y_pos, y_neg


@dataclass(frozen=True)
class Original:
    """One row of the field: its step by autograd, and the arguments of `ff.linear_step_` that express it."""

    name: str
    forward: Callable[..., Tensor]
    loss: Callable[..., Outcome]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    layer: dict[str, Any]  # norm, eps, eps_mode, activation
    objective: dict[str, Any]  # a missing threshold is the width of the layer
    outputs: OutputsOf = "post"  # what it hands to the next layer
    softplus: Softplus = naive_softplus  # how it writes log(1 + e^t)
    factor: float = 1.0  # of its gradient
    sample_weight: Callable[[int, int], Tensor] | None = None
    equal_rows: bool = False  # its formula needs as many negative as positive rows
    init: Callable[[Tensor], None] | None = None  # of the weight, instead of nn.Linear's own
    has_head: bool = False  # a learned matrix [classes, width] in every layer

    def losses(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *head: Tensor,
        softplus: Softplus | None = None,
    ) -> Outcome:
        """`(loss, y_pos, y_neg)` of one layer, attached to weight and bias, and to its head where it has one."""
        layer = partial(self.forward, weight=weight, bias=bias)
        return self.loss(layer, x_pos, x_neg, softplus or self.softplus, *head)

    @property
    def sides(self) -> int:
        """2: positive and negative rows; 1: rows and their labels."""
        return 1 if "classes" in self.objective else 2

    def objective_for(self, width: int) -> ff.Objective | ff.ProjectionHead:
        """The objective for a layer of `width` units."""
        if self.has_head:
            return ff.ProjectionHead(self.objective["classes"])
        if self.sides == 1:
            return ff.Objective(**self.objective)
        return ff.Objective(**({"threshold": float(width)} | self.objective))

    def weights_for(self, n_pos: int, n_neg: int, dtype: torch.dtype) -> Tensor | None:
        """Sample weights for its factor and its weighting of rows: `[n_pos + n_neg]`, or None for all 1."""
        if self.sample_weight is None and self.factor == 1:
            return None
        rows = torch.ones(n_pos + n_neg) if self.sample_weight is None else self.sample_weight(n_pos, n_neg)
        return (self.factor * rows).to(dtype)


def _fan_out_normal(weight: Tensor) -> None:
    with torch.no_grad():
        weight.normal_(std=weight.shape[0] ** -0.5)


_L2 = {"norm": "l2", "eps": 1e-4, "eps_mode": "add", "activation": "relu"}
_UNIT = {"norm": "l2", "eps": 1e-12, "eps_mode": "clamp", "activation": "relu"}
_RMS = {"norm": "rms", "eps": 1e-8, "eps_mode": "add", "activation": "relu"}
_MEANS: dict[str, Any] = {"goodness": "mean", "threshold": 2.0, "reduction": "sum_of_means"}
_NORMS = _MEANS | {"goodness": "norm", "threshold": 10.0}

# fmt: off
_ALL = [
    Original(
        "hinton", _hinton_forward, _hinton_loss, HintonSGD, _RMS | {"eps": math.exp(-100)},
        {"goodness": "sum", "reduction": "sum_of_means"}, "pre", factor=0.5, init=_fan_out_normal,
    ),
    Original(
        "loewex", _loewex_forward, _loewex_loss, partial(SGD, lr=1e-3, momentum=0.9, weight_decay=3e-4), _RMS,
        {"goodness": "sum"}, "pre", init=_fan_out_normal,
    ),
    Original(
        "mohammadpz", _direction_forward, partial(_joint_mean_loss, threshold=2.0), partial(Adam, lr=0.03), _L2,
        {"threshold": 2.0},
    ),
    Original(
        "ffpytorch", partial(_direction_forward, activation=F.gelu), partial(_joint_mean_loss, threshold=2.0),
        partial(Adam, lr=0.03), _L2 | {"activation": "gelu"}, {"threshold": 2.0},
    ),
    Original(
        "fflib", _direction_forward, partial(_joint_mean_loss, threshold=20.0), partial(Adam, lr=0.02), _L2,
        {"threshold": 20.0},
    ),
    Original(
        "fflib-minimize", _direction_forward, partial(_joint_mean_loss, threshold=20.0, maximize=False),
        partial(Adam, lr=0.02), _L2, {"threshold": 20.0, "maximize": False},
    ),
    Original(
        "nebuly", partial(_direction_forward, eps=1e-8), _nebuly_loss, partial(Adam, lr=0.03), _L2 | {"eps": 1e-8},
        _MEANS, "pre",
    ),
    Original(
        "keras-io", _direction_forward, partial(_joint_mean_loss, threshold=1.5), partial(Adam, lr=0.03, eps=1e-7), _L2,
        {"threshold": 1.5},
    ),
    Original(
        "bioff", _direction_forward, _bioff_loss, partial(Adam, lr=0.01), _L2, _MEANS, sample_weight=pair_weights,
        equal_rows=True,
    ),
    Original(
        "dah33-threshold", _normalize_forward, _separate_means_loss, partial(Adam, lr=0.1), _UNIT, _MEANS,
        softplus=F.softplus,
    ),
    Original(
        "dah33-symba", _normalize_forward, partial(_pair_loss, alpha=4.0, swish=False), partial(Adam, lr=0.35), _UNIT,
        {"loss": "symba", "alpha": 4.0}, softplus=F.softplus, equal_rows=True,
    ),
    Original(
        "dah33-swish", _normalize_forward, partial(_pair_loss, alpha=6.0, swish=True), partial(Adam, lr=0.35), _UNIT,
        {"loss": "swish", "alpha": 6.0}, equal_rows=True,
    ),
    Original("barbano", _normalize_forward, _barbano_loss, partial(Adam, lr=1e-4), _UNIT, _NORMS, "pre"),
    Original(
        "barbano-first-layer", _plain_forward, _barbano_loss, partial(Adam, lr=1e-4), _UNIT | {"norm": "none"}, _NORMS,
        "pre",
    ),
    Original(
        "recurrentff", _recurrentff_forward, partial(_joint_mean_loss, threshold=1.5, maximize=False),
        partial(RMSprop, lr=5e-6), _RMS | {"eps_mode": "inside"}, {"threshold": 1.5, "maximize": False}, "pre",
        softplus=F.softplus,
    ),
    Original(
        "grouped", _rms_forward, _group_loss, partial(Adam, lr=1e-3), _RMS, {"loss": "cross_entropy", "classes": 10},
        "pre",
    ),
    # Adam's own eps would take the sign of gradients that are rounding alone, here of one in a head and below of more.
    Original(
        "mono-forward", _plain_forward, _head_loss, partial(AdamW, lr=1e-3, eps=1e-5), _RMS | {"norm": "none"},
        {"loss": "cross_entropy", "classes": 10}, "pre", has_head=True,
    ),
    # Its layers are in convolutions.py.
    Original(
        "cwc", _plain_forward, _group_loss, partial(Adam, lr=0.01, eps=1e-5), _RMS | {"norm": "none"},
        {"loss": "cross_entropy", "classes": 10}, "pre",
    ),
    # Their layers are in blocks.py.
    Original(
        "trifecta", _plain_forward, _group_loss, partial(Adam, lr=1e-3, eps=1e-2), _RMS | {"norm": "none"},
        {"classes": 10}, "pre",
    ),
    Original(
        "scff", _plain_forward, _group_loss, partial(AdamW, lr=2e-3, weight_decay=1e-4, eps=1e-5),
        _RMS | {"norm": "none"}, {"classes": 10}, "pre",
    ),
]
# fmt: on
ORIGINALS = {original.name: original for original in _ALL}
