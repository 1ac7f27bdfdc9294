"""The update rules of `spec.Rule`, applied in place to a parameter or to some of its rows.

They may overwrite the gradient, which is what they have in place of memory of their own: none is asked for once a
parameter is half written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...spec import Numbers, Slot

Rule = Callable[[Tensor, Tensor, list[Tensor], Numbers, float | Tensor], None]


def start(rule: str, state: list[Tensor]) -> None:
    """What happens once a step, before any row is updated: Adam counts it."""
    if rule == "adam":
        state[2].add_(1)


def rows_of(rule: str, state: list[Tensor], rows: slice) -> list[Tensor]:
    """The state that belongs to some rows of a parameter; Adam's step count belongs to all."""
    return [state[0][rows], state[1][rows], state[2]] if rule == "adam" else [tensor[rows] for tensor in state]


def sgd(p: Tensor, gradient: Tensor, state: list[Tensor], numbers: Numbers, lr: float | Tensor) -> None:
    """torch.optim.SGD: `g += decay p; m = momentum m + (1 - dampening) g; p -= lr (m, or g + momentum m)`; with
    decoupled decay, which is `ffkernels.optim.SGDW`, `p *= 1 - lr decay` before it in place of `g += decay p`."""
    decay, momentum = numbers.decay, numbers.momentum
    if numbers.decoupled:
        p.mul_(1 - lr * decay)
        decay = 0.0
    if _has_fused(p, state):
        torch._fused_sgd_(
            [p], [gradient], state, weight_decay=decay, momentum=momentum, lr=float(lr), dampening=numbers.dampening,
            nesterov=bool(numbers.nesterov), maximize=bool(numbers.maximize), is_first_step=bool(numbers.first_step),
        )  # fmt: skip
        return
    g = gradient.neg_() if numbers.maximize else gradient
    if decay:
        g.add_(p, alpha=decay)
    if state:
        buffer = state[0]
        if numbers.first_step:
            buffer.copy_(g)
        else:
            buffer.mul_(momentum).add_(g, alpha=1 - numbers.dampening)
        g = g.add_(buffer, alpha=momentum) if numbers.nesterov else g.copy_(buffer)
    p.sub_(g.mul_(lr))


def adam(p: Tensor, gradient: Tensor, state: list[Tensor], numbers: Numbers, lr: float | Tensor) -> None:
    """torch.optim.Adam (decay added to the gradient) and AdamW (`decoupled`: decay taken off the parameter)."""
    exp_avg, exp_avg_sq, step = state
    beta1, beta2, decay = numbers.beta1, numbers.beta2, numbers.decay
    if _has_fused(p, state[:2]) and step.device == p.device:
        fused = torch._fused_adamw_ if numbers.decoupled else torch._fused_adam_
        fused(
            [p], [gradient], [exp_avg], [exp_avg_sq], [], [step], lr=float(lr), beta1=beta1, beta2=beta2,
            weight_decay=decay, eps=numbers.eps, amsgrad=False, maximize=bool(numbers.maximize),
        )  # fmt: skip
        return
    # A step count on the host costs no synchronisation; one on the device stays there.
    count = step.to(p.dtype) if step.device.type != "cpu" else float(step)
    rate, correction = lr / (1 - beta1**count), 1 - beta2**count
    g = gradient.neg_() if numbers.maximize else gradient
    if decay and numbers.decoupled:
        p.mul_(1 - lr * decay)
    elif decay:
        g.add_(p, alpha=decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = torch.div(exp_avg_sq, correction, out=g).sqrt_().add_(numbers.eps)
    p.sub_(torch.div(exp_avg, denominator, out=g).mul_(rate))


RULES: dict[str, Rule] = {"sgd": sgd, "adam": adam}


def rate(slot: Slot, dtype: torch.dtype) -> float | Tensor:
    """The learning rate as a number, as `torch.optim` takes it; one on a device stays there, in the weight's dtype."""
    if slot.lr is None:
        return slot.numbers[0] if slot.numbers else 0.0
    return float(slot.lr) if slot.lr.device.type == "cpu" else slot.lr.to(dtype)


def step(rule: str, parameter: Tensor, gradient: Tensor, slot: Slot) -> None:
    """Updates a whole parameter of any shape; under the rule "grad" its gradient is written to the state."""
    if rule == "grad":
        slot.state[0].copy_(gradient)
        return
    start(rule, slot.state)
    assert isinstance(slot.numbers, Numbers)
    # The rules walk memory in order, and write over the gradient.
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    RULES[rule](parameter, gradient, slot.state, slot.numbers, rate(slot, parameter.dtype))


def _has_fused(p: Tensor, state: list[Tensor]) -> bool:
    # torch's fused CPU kernels walk memory in order: one pass over parameter, gradient and state.
    return p.device.type == "cpu" and p.is_contiguous() and all(t.is_contiguous() for t in state)
