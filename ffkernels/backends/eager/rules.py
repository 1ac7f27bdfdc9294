"""The update rules of `optim.RULES`, applied in place to a parameter or to some of its rows.

They may overwrite the gradient, which is what they have in place of memory of their own: none is asked for once a
parameter is half written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, list[Tensor], list[float], float | Tensor], None]


def start(rule: str, state: list[Tensor]) -> None:
    """What happens once a step, before any row is updated: Adam counts it."""
    if rule == "adam":
        state[2].add_(1)


def rows_of(rule: str, state: list[Tensor], rows: slice) -> list[Tensor]:
    """The state that belongs to some rows of a parameter; Adam's step count belongs to all."""
    return [state[0][rows], state[1][rows], state[2]] if rule == "adam" else [tensor[rows] for tensor in state]


def sgd(p: Tensor, gradient: Tensor, state: list[Tensor], hyper: list[float], lr: float | Tensor) -> None:
    """torch.optim.SGD: `g += decay p; m = momentum m + (1 - dampening) g; p -= lr (m, or g + momentum m)`."""
    _, momentum, dampening, nesterov, weight_decay, maximize, first_step = hyper
    if _has_fused(p, state):
        torch._fused_sgd_(
            [p], [gradient], state, weight_decay=weight_decay, momentum=momentum, lr=float(lr), dampening=dampening,
            nesterov=bool(nesterov), maximize=bool(maximize), is_first_step=bool(first_step),
        )  # fmt: skip
        return
    g = gradient.neg_() if maximize else gradient
    if weight_decay:
        g.add_(p, alpha=weight_decay)
    if state:
        buffer = state[0]
        if first_step:
            buffer.copy_(g)
        else:
            buffer.mul_(momentum).add_(g, alpha=1 - dampening)
        g = g.add_(buffer, alpha=momentum) if nesterov else g.copy_(buffer)
    p.sub_(g.mul_(lr))


def sgdw(p: Tensor, gradient: Tensor, state: list[Tensor], hyper: list[float], lr: float | Tensor) -> None:
    """`ffkernels.optim.SGDW`: decay taken off the parameter, then `sgd`."""
    p.mul_(1 - lr * hyper[4])
    sgd(p, gradient, state, [*hyper[:4], 0.0, *hyper[5:]], lr)


def adam(p: Tensor, gradient: Tensor, state: list[Tensor], hyper: list[float], lr: float | Tensor) -> None:
    """torch.optim.Adam (decay added to the gradient) and AdamW (`decoupled`: decay taken off the parameter)."""
    exp_avg, exp_avg_sq, step = state
    _, beta1, beta2, eps, weight_decay, decoupled, maximize = hyper
    if _has_fused(p, state[:2]) and step.device == p.device:
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        fused(
            [p], [gradient], [exp_avg], [exp_avg_sq], [], [step], lr=float(lr), beta1=beta1, beta2=beta2,
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=bool(maximize),
        )  # fmt: skip
        return
    # A step count on the host costs no synchronisation; one on the device stays there.
    count = step.to(p.dtype) if step.device.type != "cpu" else float(step)
    rate, correction = lr / (1 - beta1**count), 1 - beta2**count
    g = gradient.neg_() if maximize else gradient
    if weight_decay and decoupled:
        p.mul_(1 - lr * weight_decay)
    elif weight_decay:
        g.add_(p, alpha=weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = torch.div(exp_avg_sq, correction, out=g).sqrt_().add_(eps)
    p.sub_(torch.div(exp_avg, denominator, out=g).mul_(rate))


RULES: dict[str, Rule] = {"sgd": sgd, "sgdw": sgdw, "adam": adam}


def _has_fused(p: Tensor, state: list[Tensor]) -> bool:
    # torch's fused CPU kernels walk memory in order: one pass over parameter, gradient and state.
    return p.device.type == "cpu" and p.is_contiguous() and all(t.is_contiguous() for t in state)
