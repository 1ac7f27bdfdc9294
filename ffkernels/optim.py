"""The caller's own optimizer: which update rule runs fused on its state, and how its state is read and written.

`torch.optim.SGD`, `Adam`, `AdamW` and this module's `SGDW` are recognised; their rule runs inside the operator, on the
tensors that the optimizer keeps and with the numbers of its `param_groups`, so that schedulers and `state_dict` work as
always.
Any other optimizer, subclass, hook or setting gets `.grad` filled and its own `.step()` called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import validation as check
from .compiling import once_per_trace

# What each rule's `state` and `hyper` lists hold; `lr` as a tensor comes beside them and overrides the number.
RULES = {
    "sgd": "state: [momentum_buffer] or []; hyper: lr, momentum, dampening, nesterov, decay, maximize, first_step",
    "sgdw": "as sgd; decay is decoupled: it shrinks the parameter beside the momentum, by lr decay",
    "adam": "state: [exp_avg, exp_avg_sq, step]; hyper: lr, beta1, beta2, eps, decay, decoupled, maximize",
    "grad": "state: [gradient], written instead of the parameter; hyper: []",
}


class SGDW(SGD):
    """`torch.optim.SGD` with decoupled decay: `p <- (1 - lr decoupled) p`, and then SGD's own step.

    `decoupled` is the decay, `>= 0`, an option of each group; the other arguments are SGD's.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, *, decoupled: float = 0.0, **options: Any) -> None:
        if not decoupled >= 0:
            raise ValueError(f"decoupled={decoupled!r} is not a number >= 0")
        self._decoupled = decoupled
        super().__init__(params, lr=lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.setdefault("decoupled", self._decoupled)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and group["decoupled"]:
                    p.mul_(1 - group["lr"] * group["decoupled"])
        super().step()
        return loss


@dataclass
class Slot:
    """One parameter's part of an update: tensors that the rule reads and writes, and its numbers."""

    parameter: Tensor
    state: list[Tensor]
    hyper: list[float] = field(default_factory=list)
    lr: Tensor | None = None
    new_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Plan:
    """How one step will update `weight` and `bias`. Making a plan changes nothing; `finish` publishes new state."""

    optimizer: Optimizer | None
    rule: str
    weight: Slot
    bias: Slot | None

    @property
    def slots(self) -> list[Slot]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def operands(self) -> tuple[object, ...]:
        """The update as the operators take it: `ops.SCHEMAS`."""
        bias = (self.bias.state, self.bias.hyper, self.bias.lr) if self.bias is not None else ([], [], None)
        return self.rule, self.weight.state, self.weight.hyper, self.weight.lr, *bias

    def written(self) -> list[Tensor]:
        """The tensors that the operator writes."""
        parameters = [] if self.rule == "grad" else [slot.parameter for slot in self.slots]
        return parameters + [tensor for slot in self.slots for tensor in slot.state]

    def finish(self) -> None:
        """After the operator has run: hand new state, or the gradients, to the optimizer."""
        if self.rule == "grad":
            self._step_with_gradients()
            return
        assert self.optimizer is not None
        for slot in self.slots:
            self.optimizer.state[slot.parameter].update(slot.new_state)
        _mark_as_stepped(self.optimizer)

    def _step_with_gradients(self) -> None:
        for slot in self.slots:
            slot.parameter.grad = slot.state[0]
        if self.optimizer is None:
            return
        ours = {id(slot.parameter) for slot in self.slots}
        others = [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in ours]
        gradients = [p.grad for p in others]
        # A gradient that waits on another layer's parameter must not be applied by this layer's step.
        for p in others:
            p.grad = None
        try:
            self.optimizer.step()
        finally:
            for p, gradient in zip(others, gradients, strict=True):
                p.grad = gradient


@once_per_trace
def _mark_as_stepped(optimizer: Optimizer) -> None:
    """Schedulers warn when they run before the first `optimizer.step()`; a fused step is one.

    torch.compile keeps no change of an optimizer's attributes, but makes this call when it traces the step.
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


@once_per_trace
def _has_own_step(optimizer: Optimizer) -> bool:
    """Whether a program has put a `step` of its own on this very object; that of a scheduler only calls the class's."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


def fused_rule(optimizer: Optimizer | None) -> tuple[str, str]:
    """The rule that runs fused for this optimizer ("grad" if none does), and why not another.

    Only exact types count: a subclass may override `step`.
    """
    if optimizer is None:
        return "grad", "no optimizer: the gradient is left in .grad"
    if type(optimizer) not in (SGD, SGDW, Adam, AdamW):
        return "grad", f"{type(optimizer).__name__} runs through .grad and its own step()"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "grad", "the optimizer has step hooks, which only its own step() calls"
    if _has_own_step(optimizer):
        return "grad", "the optimizer's step was replaced"
    for group in optimizer.param_groups:
        for setting in ("amsgrad", "differentiable"):
            if group.get(setting):
                return "grad", f"{setting}=True runs through .grad and the optimizer's own step()"
    if type(optimizer) is SGDW and any(
        group["decoupled"] and group["weight_decay"] for group in optimizer.param_groups
    ):
        return "grad", "decay of both kinds runs through .grad and the optimizer's own step()"
    return {SGD: "sgd", SGDW: "sgdw"}.get(type(optimizer), "adam"), "the update runs fused on the optimizer's state"


def plan(optimizer: Optimizer | None, weight: Tensor, bias: Tensor | None) -> Plan:
    """Reads what a step on `weight` and `bias` needs from their optimizer (None: fill `.grad`, update nothing).

    Raises:
        ValueError: where the optimizer does not hold one of the parameters.
    """
    rule, _ = fused_rule(optimizer)
    slots: list[Slot | None] = []
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            slots.append(None)
            continue
        group = {} if optimizer is None else _group_of(optimizer, parameter, name)
        if rule == "grad":
            slots.append(Slot(parameter, [torch.empty_like(parameter, memory_format=torch.contiguous_format)]))
        else:
            assert optimizer is not None
            state = optimizer.state.get(parameter, {})
            slots.append((_adam_slot if rule == "adam" else _sgd_slot)(parameter, group, state))
    assert slots[0] is not None
    return Plan(optimizer, rule, slots[0], slots[1])


def _group_of(optimizer: Optimizer, parameter: Tensor, name: str) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    raise ValueError(
        f"optimizer ({type(optimizer).__name__} of {held} parameters) does not hold {name} "
        f"{tuple(parameter.shape)}; accepted: the optimizer made with this very parameter, or None"
    )


def _slot(
    parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], hyper: list[float], new: dict[str, Tensor]
) -> Slot:
    for key, tensor in state.items():
        check.optimizer_state(key, tensor, parameter)
    lr = group["lr"]
    by_tensor = lr if isinstance(lr, Tensor) else None
    if by_tensor is not None:
        check.one_number("lr", by_tensor, parameter)
    return Slot(parameter, list(state.values()), [0.0 if by_tensor is not None else float(lr), *hyper], by_tensor, new)


def _sgd_slot(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Slot:
    kept: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    if group["momentum"] != 0:
        if state.get("momentum_buffer") is None:
            new["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        kept = new or {"momentum_buffer": state["momentum_buffer"]}
    decay = "decoupled" if "decoupled" in group else "weight_decay"
    keys = ("momentum", "dampening", "nesterov", decay, "maximize")
    hyper = [float(group[key]) for key in keys] + [float("momentum_buffer" in new)]
    return _slot(parameter, kept, group, hyper, new)


def _adam_slot(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Slot:
    new: dict[str, Tensor] = {}
    if not state:
        on_device = group.get("capturable") or group.get("fused")
        new["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        for key in ("exp_avg", "exp_avg_sq"):
            new[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        state = new
    decoupled = group.get("decoupled_weight_decay", False)
    beta1, beta2 = group["betas"]
    hyper = [float(v) for v in (beta1, beta2, group["eps"], group["weight_decay"], decoupled, group["maximize"])]
    kept = {key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    return _slot(parameter, kept, group, hyper, new)
