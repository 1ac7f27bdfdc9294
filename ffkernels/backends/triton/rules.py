"""The update rules: their numbers, made ready on the host, and what the kernels do with them on a tile."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...spec import Numbers, Slot, Update
from .records import Adam, Sgd


@triton.jit
def apply_rule(gradient, here, p, row, column, width, RULE: tl.constexpr):
    """Updates a tile of a `records.Parameter`, and its state, by `spec.Rule`, as `torch.optim` does.

    `gradient`: the tile, of which only what is `here` is there, in `row` and `column`; "grad" stores it to state0. The
    narrower parameter has rows of `width`.
    """
    at = row * p.row + column * p.col
    at0 = row * p.state0_row + column * p.state0_col
    at1 = row * p.state1_row + column * p.state1_col
    if RULE == "grad":
        tl.store(p.state0 + at0, gradient, mask=here)
    else:
        numbers = p.numbers
        lr = numbers.lr
        if numbers.lr_pointer is not None:
            lr = tl.load(numbers.lr_pointer).to(tl.float32)
        value = tl.load(p.parameter + at, mask=here, other=0.0)
        g = numbers.sign * gradient + numbers.decay * value
        if RULE == "sgd":
            if p.state0 is not None:
                buffer = numbers.keep * tl.load(p.state0 + at0, mask=here, other=0.0) + numbers.take * g
                tl.store(p.state0 + at0, buffer, mask=here)
                g = numbers.gradient_share * g + numbers.buffer_share * buffer
            value = value * (1.0 - lr * numbers.shrink) - lr * g
        else:
            tl.static_assert(RULE == "adam" or RULE == "adam, small beta1")
            correction1 = numbers.correction1
            correction2 = numbers.correction2
            if numbers.step_pointer is not None:
                # In float64: after the first step 1 - beta2^1 is a difference of nearly equal numbers.
                steps = tl.load(numbers.step_pointer).to(tl.float64)
                correction1 = (1.0 - tl.exp(steps * numbers.correction1)).to(tl.float32)
                correction2 = (1.0 - tl.exp(steps * numbers.correction2)).to(tl.float32)
            first = tl.load(p.state0 + at0, mask=here, other=0.0)
            second = tl.load(p.state1 + at1, mask=here, other=0.0)
            if RULE == "adam":
                first += numbers.take1 * (g - first)
            else:
                # From the other end, where a gradient that is small beside `first` would be lost.
                first = (1.0 - numbers.take1) * first + numbers.take1 * g
            second = numbers.keep2 * second + numbers.take2 * (g * g)
            tl.store(p.state0 + at0, first, mask=here)
            tl.store(p.state1 + at1, second, mask=here)
            denominator = tl.sqrt_rn(second / correction2) + numbers.eps
            value = value * (1.0 - lr * numbers.shrink) - (lr / correction1) * (first / denominator)
        tl.store(p.parameter + at, value, mask=here)
        if p.rounded is not None:
            tl.store(p.rounded + row * width + column, value.to(p.rounded.dtype.element_ty), mask=here)


def compiled(update: Update) -> str:
    """The form of a rule that these numbers need: a beta1 below 1/2 costs Adam's kernels some registers more."""
    rule, *slots = update
    small = any(isinstance(slot.numbers, Numbers) and slot.numbers.beta1 < 0.5 for slot in slots)
    return "adam, small beta1" if rule == "adam" and small else rule


def numbers(rule: str, slot: Slot) -> Sgd | Adam | None:
    """The rule's numbers as the kernels take them.

    Adam's step is counted here, before the launch: on the host that costs no synchronisation, and on the device no
    program may read the count while another one writes it.
    """
    if rule == "grad":
        return None
    given = slot.numbers or Numbers()
    lr, lr_pointer = given.lr, slot.lr
    if lr_pointer is not None and on_host(lr_pointer):
        lr, lr_pointer = float(lr_pointer), None
    sign = -1.0 if given.maximize else 1.0
    decay, shrink = (0.0, given.decay) if given.decoupled else (given.decay, 0.0)
    if rule == "sgd":
        keep = 0.0 if given.first_step else given.momentum
        take = 1.0 if given.first_step else 1.0 - given.dampening
        shares = (1.0, given.momentum) if given.nesterov else (0.0, 1.0)
        return Sgd(lr, lr_pointer, sign, decay, keep, take, *shares, shrink)
    step, step_pointer = slot.state[2].add_(1), None
    if on_host(step):
        count = float(step)
        corrections = (1.0 - given.beta1**count, 1.0 - given.beta2**count)
    else:
        step_pointer = step
        corrections = (_log(given.beta1), _log(given.beta2))
    moments = (1.0 - given.beta1, given.beta2, 1.0 - given.beta2, given.eps)
    return Adam(lr, lr_pointer, step_pointer, sign, decay, shrink, *moments, *corrections)


def on_host(number: torch.Tensor) -> bool:
    """Whether a 0-dim tensor can be read without waiting for a device."""
    return number.device.type == "cpu"


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
