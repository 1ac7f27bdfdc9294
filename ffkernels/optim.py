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
from functools import cache
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim import optimizer as torch_optimizer

from . import validation as check
from .compiling import once_per_trace
from .spec import Numbers, Rule, Slot, Update


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
                    lr = group["lr"]
                    if isinstance(lr, Tensor):
                        # In the parameter's precision, not in the rate's own.
                        lr = float(lr) if lr.device.type == "cpu" else lr.to(p.dtype)
                    p.mul_(1 - lr * group["decoupled"])
        # SGD.step without what torch wraps it in, which has called the step hooks for this very method already.
        inspect.unwrap(SGD.step)(self)
        return loss


class Part(NamedTuple):
    """One parameter's part of an update.

    Attributes:
        place: the parameter's group, and its place there.
        new_state: what its optimizer does not have yet.
    """

    parameter: Tensor
    slot: Slot
    place: tuple[int, int] = (0, 0)
    new_state: Mapping[str, Tensor] = MappingProxyType({})


class Plan(NamedTuple):
    """How one step will update `weight` and `bias`. Making a plan changes nothing; `finish` publishes new state.

    Attributes:
        record: the update as the operators take it.
        others: likewise, those of the objective's own parameters, one by one.
        held: how many parameters each group of the optimizer holds.
        given: of each group that holds some of these parameters, what their slots' numbers and rates were read from.
    """

    rule: Rule
    parts: tuple[Part, ...]
    record: Update
    others: tuple[Update, ...]
    held: tuple[int, ...]
    given: tuple[tuple[int, tuple[Any, ...]], ...]

    @property
    def makes_state(self) -> bool:
        """Whether the optimizer gets state that it does not have yet."""
        return any(part.new_state for part in self.parts)

    def written(self) -> list[Tensor]:
        """The tensors that the operator writes."""
        parameters = [] if self.rule == "grad" else [part.parameter for part in self.parts]
        return parameters + [tensor for part in self.parts for tensor in part.slot.state]

    def finish(self, optimizer: Optimizer | None) -> None:
        """After the operator has run: hand new state, or the gradients, to the optimizer."""
        if self.rule == "grad":
            self._step_with_gradients(optimizer)
            return
        assert optimizer is not None
        for part in self.parts:
            if part.new_state:
                optimizer.state[part.parameter].update(part.new_state)
        _mark_as_stepped(optimizer)

    def _step_with_gradients(self, optimizer: Optimizer | None) -> None:
        parameters = [part.parameter for part in self.parts]
        gradients = [part.slot.state[0] for part in self.parts]
        if not hooked(*parameters):

            def fill() -> None:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
        else:

            def fill() -> None:
                for parameter in parameters:
                    parameter.grad = None
                # Autograd itself: it alone calls every kind of gradient hook, in its order, and heeds what they return.
                torch.autograd.backward(parameters, gradients)

        step_alone(optimizer, parameters, fill)


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
        fill()
        waiting = [p.grad for p in others]
        try:
            for p in others:
                p.grad = None
            optimizer.step()
        finally:
            for p, gradient in zip(others, waiting, strict=True):
                p.grad = gradient


def step_on_loss(optimizer: Optimizer | None, parameters: Sequence[Tensor], loss: Tensor, alone: bool = True) -> None:
    """`loss.backward()` to these parameters, in place of what `.grad` held, and their optimizer's own step.

    `alone`: to no others, which the loss may hang on as well.
    """

    def fill() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(inputs=parameters if alone else None)

    step_alone(optimizer, parameters, fill)


def check_parameters(optimizer: Optimizer, named: Mapping[str, Tensor]) -> None:
    """Raises ValueError for an optimizer that does not hold one of these, or whose `step()` wants more than `.grad`."""
    for name, parameter in named.items():
        _place_of(optimizer, parameter, name)
    steps_on_gradients(optimizer)


_turns: WeakKeyDictionary[Optimizer, threading.RLock] = WeakKeyDictionary()


def _turn_of(optimizer: Optimizer) -> AbstractContextManager[object]:
    """The lock of an optimizer's own steps; a thread that holds it may step again, from a hook for one."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _turns.setdefault(optimizer, threading.RLock())


def _traced(slot: Slot) -> Slot:
    """The slot; in compiled code with its numbers in a tensor behind the state."""
    if not (slot.numbers and torch.compiler.is_compiling()):
        return slot
    # A product keeps a number that changes between calls a variable of the graph; a tensor made of it would not.
    one = torch.ones((), dtype=torch.float64)
    return Slot([*slot.state, torch.stack([one * number for number in slot.numbers])], (), slot.lr)


@once_per_trace
def _mark_as_stepped(optimizer: Optimizer) -> None:
    """Schedulers warn when they run before the first `optimizer.step()`; a fused step is one.

    torch.compile keeps no change of an optimizer's attributes, but makes this call when it traces the step.
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


@once_per_trace
def own_step_because(optimizer: Any) -> str:
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
def hooked(*parameters: Any) -> bool:
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


FUSED: dict[type[Optimizer], Rule] = {SGD: "sgd", SGDW: "sgd", Adam: "adam", AdamW: "adam"}
NO_SLOT = Slot([], ())


def fused_rule(optimizer: Optimizer | None, *parameters: Tensor) -> tuple[Rule, str]:
    """The rule that runs fused for this optimizer ("grad" if none does), and why not another.

    Only exact types count: a subclass may override `step`. `parameters`: those that would be updated.
    """
    if optimizer is None:
        return "grad", "no optimizer: the gradient is left in .grad"
    kind = type(optimizer)
    rule = FUSED.get(kind)
    if rule is None:
        return "grad", f"{kind.__name__} runs through .grad and its own step()"
    because = own_step_because(optimizer)
    if because:
        return "grad", because
    if hooked(*parameters):
        return "grad", "a parameter has gradient hooks, which only autograd calls"
    for group in optimizer.param_groups:
        if because := _unfused(group):
            return "grad", f"{because} runs through .grad and the optimizer's own step()"
    return rule, "the update runs fused on the optimizer's state"


def _unfused(group: dict[str, Any]) -> str:
    """Which setting of a group no rule has, or ""."""
    for setting in ("amsgrad", "differentiable"):
        if group.get(setting):
            return f"{setting}=True"
    return "decay of both kinds" if group.get("decoupled") and group["weight_decay"] else ""


def plan(
    optimizer: Optimizer | None,
    weight: Tensor,
    bias: Tensor | None,
    others: Mapping[str, Tensor] = MappingProxyType({}),
) -> Plan:
    """Reads what a step needs from the optimizer of `weight`, `bias` and others by name (None: fill `.grad` alone).

    Raises:
        ValueError: where the optimizer does not hold one of the parameters, cannot step on a gradient alone, or lacks
            a number or state of its own.
    """
    named = {"weight": weight, "bias": bias, **others}
    parameters = {name: parameter for name, parameter in named.items() if parameter is not None}
    rule, _ = fused_rule(optimizer, *parameters.values())
    parts: list[Part] = []
    for name, parameter in parameters.items():
        place = (0, 0) if optimizer is None else _place_of(optimizer, parameter, name)
        if rule == "grad":
            gradient = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            parts.append(Part(parameter, Slot([gradient], ()), place))
            continue
        assert optimizer is not None
        try:
            parts.append(_part(rule, parameter, optimizer, place))
        except KeyError as missing:
            raise ValueError(
                f"optimizer ({type(optimizer).__name__}) has no {missing} in its group or state of {name}; accepted: "
                "one whose groups and state are complete (was a state_dict of another kind loaded?)"
            ) from None
    if optimizer is not None and rule == "grad":
        steps_on_gradients(optimizer)
    return _plan_of(rule, tuple(parts), optimizer, len(others))


def _plan_of(rule: Rule, parts: tuple[Part, ...], optimizer: Optimizer | None, n_others: int) -> Plan:
    slots = [_traced(part.slot) for part in parts]
    own = len(slots) - n_others
    record = Update(rule, slots[0], slots[1] if own > 1 else NO_SLOT)
    others = tuple([Update(rule, slot, NO_SLOT) for slot in slots[own:]])
    if optimizer is None:
        return Plan(rule, parts, record, others, (), ())
    groups = optimizer.param_groups
    held = tuple([len(group["params"]) for group in groups])
    used = () if rule == "grad" else tuple({part.place[0] for part in parts})
    return Plan(rule, parts, record, others, held, tuple([(at, _given(rule, groups[at])) for at in used]))


class Reading:
    """What an optimizer says at one moment of all its parameters; each group is read once.

    Attributes:
        parameters: of each group.
        held: how many.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = optimizer.param_groups
        self.rule: Rule = "grad" if own_step_because(optimizer) else FUSED.get(type(optimizer), "grad")
        self.parameters: list[list[Tensor]] = [group["params"] for group in self._groups]
        self.held = (*map(len, self.parameters),)
        self._given: dict[int, tuple[Any, ...] | None] = {}

    def given(self, at: int) -> tuple[Any, ...] | None:
        """A group's numbers as `_given` has them; None where one is missing, or no rule has its settings."""
        if at not in self._given:
            group = self._groups[at]
            try:
                self._given[at] = None if _unfused(group) else _given(self.rule, group)
            except KeyError:
                return None
        return self._given[at]


def again(optimizer: Optimizer, reading: Reading, plan: Plan) -> Plan | None:
    """The plan of a further step on the same parameters; None where more has changed than a group's numbers."""
    rule, parameters, state_of = plan.rule, reading.parameters, optimizer.state.get
    if reading.rule != rule or reading.held != plan.held:
        return None
    for parameter, (state, _, _), (at, index), _ in plan.parts:
        if parameters[at][index] is not parameter or hooked(parameter):
            return None
        if state and not all(map(is_, map(state_of(parameter, {}).get, STATE[rule]), state)):
            return None
    is_same, now = True, {}
    for at, given in plan.given:
        numbers = reading.given(at)
        if numbers is None:
            return None
        now[at] = numbers
        is_same = is_same and _same_numbers(numbers, given)
    if is_same:
        return plan
    parts = []
    for part in plan.parts:
        numbers = now[part.place[0]]
        # Momentum that comes or goes brings or takes state.
        if rule == "sgd" and (numbers[1] != 0) != bool(part.slot.state):
            return None
        parts.append(part._replace(slot=Slot(part.slot.state, *_numbers(rule, part.parameter, numbers))))
    return _plan_of(rule, tuple(parts), optimizer, len(plan.others))


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


def _place_of(optimizer: Optimizer, parameter: Tensor, name: str) -> tuple[int, int]:
    found, held = None, 0
    for at, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            held += 1
            if p is parameter:
                if found is not None:
                    raise ValueError(
                        f"optimizer ({type(optimizer).__name__}) holds {name} {tuple(parameter.shape)} more than once, "
                        "and would step on it as often; accepted: each parameter once"
                    )
                found = at, index
    if found is None:
        raise ValueError(
            f"optimizer ({type(optimizer).__name__} of {held} parameters) does not hold {name} "
            f"{tuple(parameter.shape)}; accepted: the optimizer made with this very parameter, or None"
        )
    return found


# What an optimizer keeps for each parameter, in the order of `spec.Slot.state`.
STATE: dict[Rule, tuple[str, ...]] = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq", "step")}


def _part(rule: Rule, parameter: Tensor, optimizer: Optimizer, place: tuple[int, int]) -> Part:
    group, state = optimizer.param_groups[place[0]], optimizer.state.get(parameter, {})
    given = _given(rule, group)
    keys, new = STATE[rule], {}
    if rule == "sgd":
        keys = keys if group["momentum"] != 0 else ()
        if keys and state.get("momentum_buffer") is None:
            state = new = {"momentum_buffer": _zeros_like(parameter)}
    elif not state:
        on_device = group.get("capturable") or group.get("fused")
        step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        state = new = {"step": step, "exp_avg": _zeros_like(parameter), "exp_avg_sq": _zeros_like(parameter)}
    kept = [state[key] for key in keys]
    for key, tensor in zip(keys, kept, strict=True):
        check.optimizer_state(key, tensor, parameter)
    numbers, lr = _numbers(rule, parameter, given)
    if rule == "sgd" and new:
        numbers = numbers._replace(first_step=1.0)
    return Part(parameter, Slot(kept, numbers, lr), place, new)


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()


def _given(rule: Rule, group: dict[str, Any]) -> tuple[Any, ...]:
    """A group's numbers, the learning rate first and as it is; the others' tensors may change in place."""
    if rule == "adam":
        beta1, beta2 = group["betas"]
        others = (
            beta1, beta2, group["eps"], group["weight_decay"], group["maximize"],
            group.get("decoupled_weight_decay", False),
        )  # fmt: skip
    else:
        others = (
            group["momentum"], group["dampening"], group["nesterov"], group["weight_decay"], group["maximize"],
            group.get("decoupled", 0),
        )  # fmt: skip
    return group["lr"], *map(float, others)


def _same_numbers(now: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    if isinstance(now[0], Tensor) or isinstance(given[0], Tensor):
        return now[0] is given[0] and now[1:] == given[1:]
    return now == given


def _numbers(rule: Rule, parameter: Tensor, given: tuple[Any, ...]) -> tuple[Numbers, Tensor | None]:
    """What `_given` says, by name; and the learning rate where it is a tensor."""
    lr, *others = given
    by_tensor = lr if isinstance(lr, Tensor) else None
    if by_tensor is not None:
        check.one_number("lr", by_tensor, parameter)
    rate = 0.0 if by_tensor is not None else float(lr)
    if rule == "adam":
        beta1, beta2, eps, decay, maximize, decoupled = others
        numbers = Numbers(rate, decay, decoupled, maximize, beta1=beta1, beta2=beta2, eps=eps)
    else:
        momentum, dampening, nesterov, decay, maximize, decoupled = others
        is_decoupled = float(decoupled != 0)
        numbers = Numbers(rate, decoupled or decay, is_decoupled, maximize, momentum, dampening, nesterov)
    return numbers, by_tensor
