"""What the integrations share: whether a layer of another library can run here, and the warning where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer

from .. import functional
from .. import validation as check
from ..nn.layer import watched as watched
from ..normalisation import row_sumsq

_FUNCTIONS = {torch.relu: "relu", F.relu: "relu", F.gelu: "gelu", F.silu: "silu", F.leaky_relu: "leaky_relu"}
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}


def require_version(package: str, accepted: str) -> None:
    """Raises ImportError unless this version of a package is installed."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed; accepted: {package}=={accepted}") from None
    if found != accepted:
        raise ImportError(f"{package} {found} is installed; accepted: {package}=={accepted}")


def activation_name(activation: Any) -> str | None:
    """The name under which `linear_step_` knows an activation module or function, or None."""
    kind = type(activation)
    if "forward" in getattr(activation, "__dict__", ()):
        return None  # a program has replaced it
    if kind in _MODULES:
        return _MODULES[kind]
    if kind is nn.LeakyReLU:
        return "leaky_relu" if activation.negative_slope == 0.01 else None
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:
        return None


def reason_against(layer: nn.Linear, activation: Any, threshold: Any) -> str | None:
    """Why a layer's forward cannot run here, in one clause, or None."""
    weight, bias = layer.weight, layer.bias
    if activation_name(activation) is None:
        return f"activation {activation!r} is not one of {', '.join(check.ACTIVATIONS)}"
    if isinstance(activation, nn.Module) and watched(activation):
        return f"hooks watch its activation {activation!r}"
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not abs(threshold) < float("inf"):
        return f"threshold {threshold!r} is not a finite number"
    if weight.dtype not in check.MASTER_DTYPES:
        return f"weight is {weight.dtype} (keep float32 ones; compute_dtype asks for narrower products)"
    if bias is not None and bias.dtype != weight.dtype:
        return "bias is not of the weight's dtype"
    return None


def reason_against_step(layer: nn.Linear, optimizer: object) -> str | None:
    """Why a layer whose forward can run here cannot take a step here, or None."""
    if not isinstance(optimizer, Optimizer):
        return f"its optimizer is a {type(optimizer).__name__}"
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is None:
            continue
        if not (parameter.is_leaf and parameter.requires_grad):
            return f"{name} is frozen or computed from other parameters"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"{name} has gradient hooks"
        if not any(p is parameter for group in optimizer.param_groups for p in group["params"]):
            return f"its optimizer does not hold {name}"
    return None


def overridden(layer: nn.Module, ours: type, names: tuple[str, ...]) -> str | None:
    """Which of these methods of `ours` a subclass or the object itself replaces, as a reason, or None."""
    for name in names:
        if name in vars(layer) or getattr(type(layer), name) is not getattr(ours, name):
            return f"{type(layer).__name__}.{name} is overridden"
    return None


def differentiates(x: Tensor) -> bool:
    """Whether a program asks for the derivative with respect to these rows, backward or forward."""
    backward = x.requires_grad and torch.is_grad_enabled()
    return backward or forward_ad.unpack_dual(x).tangent is not None


def any_waits(*tensors: Any) -> bool:
    """Whether any of what should be tensors waits for a gradient."""
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def require_bias(layer: nn.Module, library: str, name: str = "layer") -> None:
    """Raises ValueError for a layer without bias, which neither library can run: both use it unasked."""
    if layer.bias is None:
        raise ValueError(f"{name} has bias=False, with which {library} cannot run; accepted: bias=True")


class Accelerated:
    """What accelerated layers share; a base beside the library's own.

    Raises:
        ValueError: for `bias=False`, which neither library can run.
    """

    LIBRARY: str
    PARTS: tuple[str, str]  # the attributes that hold activation and threshold
    compute_dtype: torch.dtype | None = None
    backend: str | None = None

    def __init__(
        self, *args: Any, compute_dtype: torch.dtype | None = None, backend: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        layer: Any = self
        require_bias(layer, self.LIBRARY)
        self.compute_dtype, self.backend = compute_dtype, backend

    def _options(self) -> dict[str, Any]:
        """`y = act(x / (norm(x) + 1e-4) W^T + b)`, the layer of both libraries, as `linear_step_` takes it."""
        activation = activation_name(getattr(self, self.PARTS[0]))
        own = {"compute_dtype": self.compute_dtype, "backend": self.backend}
        return {"norm": "l2", "eps": 1e-4, "activation": activation, **own}

    def _reason(self: Any) -> str | None:
        """Why its forward cannot run here, or None."""
        return reason_against(self, *(getattr(self, part) for part in self.PARTS))

    def _runs_here(self: Any, reason: str | None) -> bool:
        """Whether there is no reason against it; a reason is said, once."""
        if reason is not None:
            warn_once(f"a layer of {self.LIBRARY} ({self.extra_repr()}) runs on its original path: {reason}")
        return reason is None


def replace_classes(
    layers: dict[str, Any], theirs: type[nn.Linear], ours: Any, options: dict[str, Any], strict: bool
) -> None:
    """Gives layers of class `theirs` that can run here the class `ours`, in place; names the others and why.

    Args:
        layers: by the name that messages give them; what is of neither class is left alone too.
        options: `compute_dtype` and `backend`, which become attributes of those that run here.
        strict: raise instead of warning.

    Raises:
        ValueError, TypeError: for a layer without bias, or options that it cannot run with; with `strict`, for one
            that cannot run here.
    """
    left, chosen = [], []
    for name, layer in layers.items():
        if not isinstance(layer, theirs):
            left.append(f"{name}: it is a {type(layer).__name__}, not {ours.LIBRARY}'s {theirs.__name__}")
            continue
        require_bias(layer, ours.LIBRARY, f"{name} of net")
        activation, threshold = (getattr(layer, part) for part in ours.PARTS)
        if not (type(layer) is theirs or isinstance(layer, ours)):
            left.append(f"{name}: it is a {type(layer).__name__}, a subclass of {ours.LIBRARY}'s {theirs.__name__}")
        elif why := reason_against(layer, activation, threshold):
            left.append(f"{name}: {why}")
        else:
            functional.explain(layer.weight, activation=str(activation_name(activation)), **options)
            chosen.append(layer)
    if left:
        message = f"layers of a net of {ours.LIBRARY} that run on their original path: {'; '.join(left)}"
        if strict:
            raise ValueError(message)
        warn_once(message)
    for layer in chosen:
        if type(layer) is theirs:
            layer.__class__ = ours
        vars(layer).update(options)


def restore_classes(modules: Iterable[nn.Module], theirs_of: dict[type, type]) -> None:
    """Gives modules back the class that they had, and removes the options that `accelerate` set on them."""
    for module in modules:
        if type(module) in theirs_of:
            module.__class__ = theirs_of[type(module)]
            for name in ("compute_dtype", "backend"):
                vars(module).pop(name, None)


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Says once in a process that something runs on its original path."""
    warnings.warn(message, UserWarning, stacklevel=4)


def steps_on_batch(
    x_pos: Tensor,
    x_neg: Any,
    layer: nn.Linear,
    optimizer: Optimizer,
    epochs: Iterable[int],
    options: dict[str, Any],
    log: Callable[[int, Tensor], None] | None = None,
) -> None:
    """One step for each of `epochs` on the same rows, whose sums of squares are taken once.

    Args:
        x_pos, x_neg: `[n_pos, in]` and `[n_neg, in]`.
        layer: with weight and bias, which `optimizer` holds.
        options: of `ffkernels.linear_step_`.
        log: is given each of `epochs` and its loss.
    """
    compute = check.compute_dtype_of(options.get("compute_dtype"), layer.weight)
    for name, x in (("x_pos", x_pos), ("x_neg", x_neg)):
        check.rows_of(name, x, layer.weight, compute)
    sumsq = torch.cat([row_sumsq(x, layer.weight.dtype) for x in (x_pos, x_neg)])
    for epoch in epochs:
        optimizer.zero_grad()
        result = functional.linear_step_(
            x_pos, x_neg, layer.weight, layer.bias, optimizer, outputs="none", input_sumsq=sumsq, **options
        )
        if log is not None:
            log(epoch, result.loss)


def in_dtype_of(weight: Tensor, y: Tensor) -> Tensor:
    """Activities as the original layer hands them out: in the weight's dtype whatever the products ran in."""
    return y.to(weight.dtype)
