"""The definition of a layer step, by autograd: slow, obvious, and what every backend is held against.

It follows Hinton, "The Forward-Forward Algorithm" (2022), section 2, line by line, in whatever dtype it is given, and
shares no code with the backends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from .functional import StepResult
from .objectives import Objective
from .peer import PeerNormalisation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda z: z,
}


def normalise(x: Tensor, norm: str, eps: float, eps_mode: str) -> Tensor:
    """Rows of `x` `[rows, in]` divided by their norm; rows of zeros stay zero."""
    if norm == "none":
        return x
    square = (x * x).mean(1, keepdim=True) if norm == "rms" else (x * x).sum(1, keepdim=True)
    if eps_mode == "add":
        length = square.sqrt() + eps
    elif eps_mode == "clamp":
        length = torch.maximum(square.sqrt(), torch.full_like(square, eps))
    else:
        length = (square + eps).sqrt()
    return torch.where(square == 0, torch.zeros_like(x), x / length)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str, eps: float, eps_mode: str, activation: str
) -> Tensor:
    """`act(normalise(x) W^T + b)` `[rows, out]`, differentiable."""
    return ACTIVATIONS[activation](_linear(x, weight, bias, norm, eps, eps_mode))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float, eps_mode: str) -> Tensor:
    z = normalise(x, norm, eps, eps_mode) @ weight.T
    return z if bias is None else z + bias


def goodness_of(y: Tensor, goodness: str) -> Tensor:
    """`[rows]` goodness of activities `y` `[rows, out]`."""
    if goodness == "mean":
        return (y * y).mean(1)
    if goodness == "sum":
        return (y * y).sum(1)
    return torch.linalg.vector_norm(y, dim=1)


def loss_of(goodness: Tensor, is_positive: Tensor, objective: Objective, sample_weight: Tensor | None) -> Tensor:
    """The objective's loss of rows with this goodness `[rows]`; differentiable, 0-dim."""
    positive, negative = goodness[is_positive], goodness[~is_positive]
    flip = 1 if objective.maximize else -1
    if objective.loss in ("symba", "swish"):
        logit = -objective.alpha * flip * (positive - negative)
        losses = softplus(logit) if objective.loss == "symba" else F.silu(logit)
        return _mean(losses if sample_weight is None else losses * sample_weight)
    threshold = objective.threshold
    theta = torch.empty_like(goodness)
    if isinstance(threshold, tuple):
        theta[is_positive], theta[~is_positive] = threshold[0], threshold[1]
    else:
        theta[:] = threshold
    losses_pos = softplus(-flip * (positive - theta[is_positive]) / objective.temperature)
    losses_neg = softplus(flip * (negative - theta[~is_positive]) / objective.temperature)
    if sample_weight is not None:
        losses_pos = losses_pos * sample_weight[is_positive]
        losses_neg = losses_neg * sample_weight[~is_positive]
    if objective.reduction == "mean":
        return _mean(torch.cat([losses_pos, losses_neg]))
    return _mean(losses_pos) + _mean(losses_neg)


def class_goodness_of(y: Tensor, objective: Objective) -> Tensor:
    """`[rows, classes]` goodness of activities `y` `[rows, out]`, whose units are divided among the classes."""
    assert objective.classes is not None
    groups = y.tensor_split(objective.classes, dim=1)
    if objective.goodness == "activity":
        return torch.stack([group.mean(1) for group in groups], dim=1)
    return torch.stack([goodness_of(group, objective.goodness) for group in groups], dim=1)


def class_loss_of(goodness: Tensor, labels: Tensor, objective: Objective, sample_weight: Tensor | None) -> Tensor:
    """The loss of rows with this goodness `[rows, classes]`; differentiable, 0-dim."""
    logits = (goodness if objective.maximize else -goodness) / objective.temperature
    if objective.loss == "cross_entropy":
        losses = F.cross_entropy(logits, labels, label_smoothing=objective.label_smoothing, reduction="none")
    elif objective.loss == "cwc":
        power = logits.clamp(-50, 50).exp()
        losses = -((power.gather(1, labels[:, None])[:, 0] + 1e-9) / (power.sum(1) + 1e-9)).log()
    else:
        theta = objective.thresholds()[0] * (1 if objective.maximize else -1) / objective.temperature
        own = F.one_hot(labels, objective.classes or 0).bool()
        losses = softplus(theta - logits[own])
        if objective.classes != 1:
            losses = losses + softplus(logits[~own].view(len(labels), -1).mean(1) - theta)
        losses = losses / (2 if objective.reduction == "mean" else 1)
    return _mean(losses if sample_weight is None else losses * sample_weight)


def peer_loss(
    z: Tensor, y: Tensor, is_positive: Tensor, mean: Tensor, peer: PeerNormalisation
) -> tuple[Tensor, Tensor]:
    """What peer normalisation adds to the loss (0-dim), and the running mean `[out]` after this batch.

    The first is a loss in "loewex" form; in Hinton's, a stand-in whose gradient is what he adds to the gradient.
    """
    if not is_positive.any():
        return z.sum() * 0, mean.clone()
    # Ungated, the activation counts as y in value and as z in slope.
    activity = (y if peer.gated else z + (y - z).detach())[is_positive]
    moved = peer.momentum * mean + (1 - peer.momentum) * activity.mean(0)
    if peer.form == "loewex":
        return peer.strength * ((moved.mean() - moved) ** 2).mean(), moved.detach()
    moved = moved.detach()
    return peer.strength * ((moved - moved.mean()) * activity).sum(1).mean(), moved


def softplus(t: Tensor) -> Tensor:
    """`log(1 + e^t)`, stable and exact to rounding at any `t`."""
    return torch.logaddexp(t, torch.zeros_like(t))


def linear_step_(
    x_pos: Tensor,
    x_neg: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer,
    *,
    objective: Objective,
    norm: str = "l2",
    eps: float = 1e-4,
    eps_mode: str = "add",
    activation: str = "relu",
    outputs: str = "post",
    sample_weight: Tensor | None = None,
    is_positive: Tensor | None = None,
    labels: Tensor | None = None,
    peer: PeerNormalisation | None = None,
    peer_mean: Tensor | None = None,
) -> StepResult:
    """`ffkernels.linear_step_` by `loss.backward()` and `optimizer.step()`, in the weight's dtype."""
    x = x_pos if x_neg is None else torch.cat([x_pos, x_neg])
    side = torch.arange(len(x), device=x.device) < len(x_pos) if is_positive is None else is_positive

    def forward() -> tuple[Tensor, Tensor]:
        z = _linear(x, weight, bias, norm, eps, eps_mode)
        return z, ACTIVATIONS[activation](z)

    z, y = forward()
    if labels is None:
        goodness = goodness_of(y, objective.goodness)
        loss = loss_of(goodness, side, objective, sample_weight)
    else:
        goodness = class_goodness_of(y, objective)
        loss = class_loss_of(goodness, labels, objective, sample_weight)
    weight.grad = None
    if bias is not None:
        bias.grad = None
    if peer is None or peer_mean is None:
        loss.backward()
    else:
        pull, moved = peer_loss(z, y, side, peer_mean, peer)
        (loss + pull).backward()
        peer_mean.copy_(moved)
    optimizer.step()
    with torch.no_grad():
        handed_on = forward()[1] if outputs == "post" else y.detach()
    sumsq = (handed_on * handed_on).sum(1)
    n_pos = len(x_pos) if is_positive is None else None
    y_out = None if outputs == "none" else handed_on
    return StepResult(y_out, sumsq, goodness.detach(), loss.detach(), n_pos, is_positive)


def _mean(losses: Tensor) -> Tensor:
    """The mean; 0 for no rows."""
    return losses.sum() / max(len(losses), 1)
