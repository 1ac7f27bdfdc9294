"""The caller's own optimizer: which update rule runs fused on its state, and how its state is read and written.

`torch.optim.SGD`, `Adam`, `AdamW` and this module's `SGDW` are recognised; their rule runs inside the operator, on the
tensors that the optimizer keeps and with the numbers of its `param_groups`, so that schedulers and `state_dict` work as
always.
Any other optimizer, subclass, hook or setting gets `.grad` filled, through autograd where hooks wait for it, and its
own `.step()` called.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim import optimizer as torch_optimizer

from . import validation as check
from .compiling import once_per_trace

# What each rule's `state` and `hyper` lists hold; `lr` as a tensor comes beside them and overrides the number. Compiled
# code leaves `hyper` empty and brings its numbers as the last tensor of `state`: they would become constants otherwise.
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
        super().__init__(params, lr=lr, **options)
        self.defaults["decoupled"] = decoupled
        self._fill_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickles, and takes over a `state_dict`, which may be that of an SGD: its groups get this one's default."""
        super().__setstate__(state)
        self.defaults.setdefault("decoupled", self.param_groups[0].get("decoupled", 0.0))
        self._fill_groups()

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            group.setdefault("decoupled", self.defaults["decoupled"])

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
        # SGD.step without what torch wraps it in, which has called the step hooks for this very method already.
        inspect.unwrap(SGD.step)(self)
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
        bias: tuple[object, ...] = ([], [], None) if self.bias is None else _operands_of(self.bias)
        return self.rule, *_operands_of(self.weight), *bias

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
        parameters = [slot.parameter for slot in self.slots]
        gradients = [slot.state[0] for slot in self.slots]
        if not _hooked(*parameters):

            def fill() -> None:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
        else:

            def fill() -> None:
                for parameter in parameters:
                    parameter.grad = None
                # Autograd itself: it alone calls every kind of gradient hook, in its order, and heeds what they return.
                torch.autograd.backward(parameters, gradients)

        step_alone(self.optimizer, parameters, fill)


def step_alone(optimizer: Optimizer | None, parameters: Sequence[Tensor], fill: Callable[[], None]) -> None:
    """Has `fill` set the gradients of `parameters`, and their optimizer step on these alone.

    A gradient that waits on another layer's parameter is not applied by this layer's step, and is there afterwards.
    Threads that share an optimizer take turns.
    """
    if optimizer is None:
        fill()
        return
    ours = {id(p) for p in parameters}
    with _turn_of(optimizer):
        others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in ours]
        waiting = [p.grad for p in others]
        try:
            fill()
            for p in others:
                p.grad = None
            optimizer.step()
        finally:
            for p, gradient in zip(others, waiting, strict=True):
                p.grad = gradient


def step_on_loss(optimizer: Optimizer | None, parameters: Sequence[Tensor], loss: Tensor) -> None:
    """`loss.backward()` to these parameters alone, in place of what `.grad` held, and their optimizer's own step."""

    def fill() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(inputs=parameters)

    step_alone(optimizer, parameters, fill)


def check_parameters(optimizer: Optimizer, named: Mapping[str, Tensor]) -> None:
    """Raises ValueError for an optimizer that does not hold one of these, or whose `step()` wants more than `.grad`."""
    for name, parameter in named.items():
        _group_of(optimizer, parameter, name)
    steps_on_gradients(optimizer)


_turns: WeakKeyDictionary[Optimizer, threading.RLock] = WeakKeyDictionary()


def _turn_of(optimizer: Optimizer) -> AbstractContextManager[object]:
    """The lock of an optimizer's own steps; a thread that holds it may step again, from a hook for one."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _turns.setdefault(optimizer, threading.RLock())


def _operands_of(slot: Slot) -> tuple[list[Tensor], list[float], Tensor | None]:
    if not (slot.hyper and torch.compiler.is_compiling()):
        return slot.state, slot.hyper, slot.lr
    # A product keeps a number that changes between calls a variable of the graph; a tensor made of it would not.
    one = torch.ones((), dtype=torch.float64)
    return [*slot.state, torch.stack([one * number for number in slot.hyper])], [], slot.lr


@once_per_trace
def _mark_as_stepped(optimizer: Optimizer) -> None:
    """Schedulers warn when they run before the first `optimizer.step()`; a fused step is one.

    torch.compile keeps no change of an optimizer's attributes, but makes this call when it traces the step.
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


@once_per_trace
def _own_step_because(optimizer: Any) -> str:
    """Why this very object's own `step()` must be called, or ""."""
    own = vars(optimizer)
    if (
        own["_optimizer_step_pre_hooks"] or own["_optimizer_step_post_hooks"]
        or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    ):  # fmt: skip
        return "there are step hooks, which only the optimizer's own step() calls"
    if _has_own_step(optimizer):
        return "the optimizer's step was replaced"
    if own.get("found_inf") is not None or own.get("grad_scale") is not None:
        return "a GradScaler speaks to the optimizer's own step()"
    return ""


def _has_own_step(optimizer: Any) -> bool:
    """Whether a program has put a `step` of its own on this very object; that of a scheduler only calls the class's."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


@once_per_trace
def _hooked(*parameters: Any) -> bool:
    """Whether gradient hooks wait on a parameter, which autograd alone calls."""
    for p in parameters:
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            if torch.compiler.is_compiling():
                # torch.compile does not see such hooks, and would leave them out without a word.
                raise RuntimeError(
                    "a parameter has gradient hooks, which compiled code does not call; accepted: the step under "
                    "torch.compiler.disable"
                )
            return True
    return False


_FUSED = {SGD: "sgd", SGDW: "sgdw", Adam: "adam", AdamW: "adam"}


def fused_rule(optimizer: Optimizer | None, *parameters: Tensor) -> tuple[str, str]:
    """The rule that runs fused for this optimizer ("grad" if none does), and why not another.

    Only exact types count: a subclass may override `step`. `parameters`: those that would be updated.
    """
    if optimizer is None:
        return "grad", "no optimizer: the gradient is left in .grad"
    kind = type(optimizer)
    rule = _FUSED.get(kind)
    if rule is None:
        return "grad", f"{kind.__name__} runs through .grad and its own step()"
    because = _own_step_because(optimizer)
    if because:
        return "grad", because
    if _hooked(*parameters):
        return "grad", "a parameter has gradient hooks, which only autograd calls"
    decays = set()
    for group in optimizer.param_groups:
        for setting in ("amsgrad", "differentiable"):
            if group.get(setting):
                return "grad", f"{setting}=True runs through .grad and the optimizer's own step()"
        if kind is SGDW:
            decays |= {name for name in ("decoupled", "weight_decay") if group[name]}
    if len(decays) > 1:
        return "grad", "decay of both kinds runs through .grad and the optimizer's own step()"
    return "sgd" if decays == {"weight_decay"} else rule, "the update runs fused on the optimizer's state"


def plan(optimizer: Optimizer | None, weight: Tensor, bias: Tensor | None) -> Plan:
    """Reads what a step on `weight` and `bias` needs from their optimizer (None: fill `.grad`, update nothing).

    Raises:
        ValueError: where the optimizer does not hold one of the parameters, cannot step on a gradient alone, or lacks
            a number or state of its own.
    """
    parameters = (weight,) if bias is None else (weight, bias)
    rule, _ = fused_rule(optimizer, *parameters)
    slots = []
    for name, parameter in zip(("weight", "bias"), parameters, strict=False):
        group = {} if optimizer is None else _group_of(optimizer, parameter, name)
        if rule == "grad":
            slots.append(Slot(parameter, [torch.empty_like(parameter, memory_format=torch.contiguous_format)]))
            continue
        assert optimizer is not None
        try:
            state = optimizer.state.get(parameter, {})
            slots.append((_adam_slot if rule == "adam" else _sgd_slot)(rule, parameter, group, state))
        except KeyError as missing:
            raise ValueError(
                f"optimizer ({type(optimizer).__name__}) has no {missing} in its group or state of {name}; accepted: "
                "one whose groups and state are complete (was a state_dict of another kind loaded?)"
            ) from None
    if optimizer is not None and rule == "grad":
        steps_on_gradients(optimizer)
    return Plan(optimizer, rule, slots[0], slots[1] if bias is not None else None)


def steps_on_gradients(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer whose `step()` wants more than gradients in `.grad`."""
    if _has_own_step(optimizer):
        return
    kind: Any = type(optimizer)
    why = "which takes sparse gradients only" if isinstance(optimizer, SparseAdam) else _why_not_alone(kind)
    if why:
        raise ValueError(f"optimizer is a {kind.__name__}, {why}; accepted: one whose step() runs on .grad alone")


@cache
def _why_not_alone(kind: Any) -> str:
    for name, parameter in list(inspect.signature(kind.step).parameters.items())[1:]:
        if parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
        ):  # fmt: skip
            return f"whose step() cannot be called without {name}"
    return ""


def _group_of(optimizer: Optimizer, parameter: Tensor, name: str) -> dict[str, Any]:
    found, held = None, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            held += 1
            if p is parameter:
                if found is not None:
                    raise ValueError(
                        f"optimizer ({type(optimizer).__name__}) holds {name} {tuple(parameter.shape)} more than once, "
                        "and would step on it as often; accepted: each parameter once"
                    )
                found = group
    if found is None:
        raise ValueError(
            f"optimizer ({type(optimizer).__name__} of {held} parameters) does not hold {name} "
            f"{tuple(parameter.shape)}; accepted: the optimizer made with this very parameter, or None"
        )
    return found


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


def _sgd_slot(rule: str, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Slot:
    kept: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    if group["momentum"] != 0:
        if state.get("momentum_buffer") is None:
            new["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        kept = new or {"momentum_buffer": state["momentum_buffer"]}
    decay = "decoupled" if rule == "sgdw" else "weight_decay"
    keys = ("momentum", "dampening", "nesterov", decay, "maximize")
    hyper = [float(group[key]) for key in keys] + [float("momentum_buffer" in new)]
    return _slot(parameter, kept, group, hyper, new)


def _adam_slot(rule: str, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Slot:
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
