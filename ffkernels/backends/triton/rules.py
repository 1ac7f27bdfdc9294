"""The update rules: their numbers, made ready on the host, and what the kernels do with them on a tile."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ...spec import Numbers, Slot, Update

# What a kernel is given as h0 to h8, by rule. No flag needs a kernel of its own: each is a number that makes a term
# vanish. `sign` is -1 under `maximize`; a correction is `1 - beta^step`, or log(beta) where the step is on the device.
NUMBERS = {
    "sgd": ("sign", "decay", "keep", "take", "gradient_share", "buffer_share", "shrink"),
    "adam": ("sign", "decay", "shrink", "take1", "keep2", "take2", "eps", "correction1", "correction2"),
    "grad": (),
}
SLOTS = 9


@triton.jit
def apply_rule(
    gradient, here,  # a tile, or a vector, and which of its elements there are
    parameter, at, state0, at0, state1, at1,  # pointers and offsets; what a rule does not use may be None
    rounded, at_rounded,  # where the new parameter goes in a narrower dtype, or None
    lr, lr_pointer, step_pointer, h0, h1, h2, h3, h4, h5, h6, h7, h8,
    RULE: tl.constexpr,
):  # fmt: skip
    """Updates parameter and state by `spec.Rule`, as `torch.optim` does; "grad" stores the gradient to state0."""
    if RULE == "grad":
        tl.store(state0 + at0, gradient, mask=here)
    else:
        if lr_pointer is not None:
            lr = tl.load(lr_pointer).to(tl.float32)
        p = tl.load(parameter + at, mask=here, other=0.0)
        g = h0 * gradient + h1 * p
        if RULE == "sgd":
            if state0 is not None:
                buffer = h2 * tl.load(state0 + at0, mask=here, other=0.0) + h3 * g
                tl.store(state0 + at0, buffer, mask=here)
                g = h4 * g + h5 * buffer
            p = p * (1.0 - lr * h6) - lr * g
        else:
            tl.static_assert(RULE == "adam" or RULE == "adam, small beta1")
            correction1 = h7
            correction2 = h8
            if step_pointer is not None:
                # In float64: after the first step 1 - beta2^1 is a difference of nearly equal numbers.
                steps = tl.load(step_pointer).to(tl.float64)
                correction1 = (1.0 - tl.exp(steps * h7)).to(tl.float32)
                correction2 = (1.0 - tl.exp(steps * h8)).to(tl.float32)
            first = tl.load(state0 + at0, mask=here, other=0.0)
            second = tl.load(state1 + at1, mask=here, other=0.0)
            if RULE == "adam":
                first += h3 * (g - first)
            else:
                # From the other end, where a gradient that is small beside `first` would be lost.
                first = (1.0 - h3) * first + h3 * g
            second = h4 * second + h5 * (g * g)
            tl.store(state0 + at0, first, mask=here)
            tl.store(state1 + at1, second, mask=here)
            denominator = tl.sqrt_rn(second / correction2) + h6
            p = p * (1.0 - lr * h2) - (lr / correction1) * (first / denominator)
        tl.store(parameter + at, p, mask=here)
        if rounded is not None:
            tl.store(rounded + at_rounded, p.to(rounded.dtype.element_ty), mask=here)


def compiled(update: Update) -> str:
    """The form of a rule that these numbers need: a beta1 below 1/2 costs Adam's kernels some registers more."""
    rule, *slots = update
    small = any(isinstance(slot.numbers, Numbers) and slot.numbers.beta1 < 0.5 for slot in slots)
    return "adam, small beta1" if rule == "adam" and small else rule


def numbers(name: str, rule: str, slot: Slot) -> dict[str, Any]:
    """The arguments of `apply_rule` that are no tensors of the parameter's shape, prefixed with the parameter's name.

    Adam's step is counted here, before the launch: on the host that costs no synchronisation, and on the device no
    program may read the count while another one writes it.
    """
    lr_pointer = None
    given = slot.numbers or Numbers()
    rate = given.lr
    if slot.lr is not None and on_host(slot.lr):
        rate = float(slot.lr)
    elif slot.lr is not None:
        lr_pointer = slot.lr
    step_pointer = None
    values: dict[str, float] = {}
    decays = {"decay": 0.0 if given.decoupled else given.decay, "shrink": given.decay if given.decoupled else 0.0}
    sign = -1.0 if given.maximize else 1.0
    if rule == "sgd":
        values = {
            "sign": sign,
            **decays,
            "keep": 0.0 if given.first_step else given.momentum,
            "take": 1.0 if given.first_step else 1.0 - given.dampening,
            "gradient_share": 1.0 if given.nesterov else 0.0,
            "buffer_share": given.momentum if given.nesterov else 1.0,
        }
    elif rule == "adam":
        step = slot.state[2].add_(1)
        if on_host(step):
            count = float(step)
            corrections = (1.0 - given.beta1**count, 1.0 - given.beta2**count)
        else:
            step_pointer = step
            corrections = (_log(given.beta1), _log(given.beta2))
        values = {
            "sign": sign,
            **decays,
            "take1": 1.0 - given.beta1,
            "keep2": given.beta2,
            "take2": 1.0 - given.beta2,
            "eps": given.eps,
            "correction1": corrections[0],
            "correction2": corrections[1],
        }
    slots = [values[key] for key in NUMBERS[rule]] + [0.0] * (SLOTS - len(NUMBERS[rule]))
    arguments = {f"{name}_h{slot}": value for slot, value in enumerate(slots)}
    return {f"{name}_lr": rate, f"{name}_lr_pointer": lr_pointer, f"{name}_step_pointer": step_pointer, **arguments}


def on_host(number: torch.Tensor) -> bool:
    """Whether a 0-dim tensor can be read without waiting for a device."""
    return number.device.type == "cpu"


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
