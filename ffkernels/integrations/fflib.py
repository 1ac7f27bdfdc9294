"""fflib 0.3.0 on this package: `accelerate(net)` turns its layers and nets, in place, into faster ones.

Its layer computes `y = act(x / (norm(x) + 1e-4) W^T + b)` and minimises the mean over all rows of
`log(1 + exp(+-(mean y^2 - loss_threshold)))` with an optimizer of its own. Here that is one closed-form step on
the same parameters and optimizer. What a layer cannot do here it does as before, with one warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..objectives import Objective
from ..spec import OutputsOf
from . import common

common.require_version("fflib", "0.3.0")

from fflib.nn import ff_linear, ff_net, ffc  # noqa: E402


def _logistic(t: Tensor) -> Tensor:
    """fflib's own, infinite where exp is: what `goodness` reports must not change."""
    return torch.log(1 + torch.exp(t))


class FFLinear(common.Accelerated, ff_linear.FFLinear):
    """fflib's layer, with its training step and forward pass on this package.

    Arguments are those of fflib's, then `compute_dtype` and `backend` as in `ffkernels.linear_step_`. Activities are
    handed out in the weight's dtype whatever the products run in.

    Raises:
        ValueError: for `bias=False`, which fflib's layer cannot run either.
    """

    LIBRARY = "fflib 0.3.0"
    PARTS = ("activation_fn", "loss_threshold")

    def _trains_here(self) -> bool:
        overridden = common.overridden(self, FFLinear, ("forward", "goodness"))
        return self._runs_here(self._reason() or overridden or common.reason_against_step(self, self.opt))

    def _activity(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, sumsq = functional.linear_forward(x, self.weight, self.bias, **self._options())
        return common.in_dtype_of(self.weight, y), sumsq

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]`; under autograd with a gradient to weight and bias, and to `x` if it wants one."""
        # Only fflib's own writing passes a gradient on to the layer below.
        if common.differentiates(x) or not self._runs_here(self._reason()):
            return super().forward(x)
        return self._activity(x)[0]

    def goodness(
        self, x: Tensor, logistic_fn: Callable[[Tensor], Tensor] = _logistic, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`(logistic_fn(+-(mean y^2 - threshold)) [rows], y [rows, out])`."""
        if common.overridden(self, FFLinear, ("forward",)) or not self._runs_here(self._reason()):
            return super().goodness(x, logistic_fn, inverse)
        y, sumsq = self._activity(x.detach())
        z = sumsq / self.out_features - self.loss_threshold
        return logistic_fn(-z if inverse else z), y

    def run_train(self, x_pos: Tensor, x_neg: Tensor) -> None:
        """One training step on the layer's own optimizer. `.grad` is None afterwards."""
        if self.opt is None or not self._trains_here():
            super().run_train(x_pos, x_neg)
        else:
            self.step(x_pos, x_neg, "none")

    def step(
        self, x_pos: Tensor, x_neg: Tensor, outputs: OutputsOf, input_sumsq: Tensor | None = None
    ) -> functional.StepResult:
        """The step of `run_train`, with `ffkernels.linear_step_`'s result."""
        assert self.opt is not None
        self.opt.zero_grad()
        objective = Objective(threshold=self.loss_threshold, maximize=bool(self.maximize))
        return functional.linear_step_(
            x_pos, x_neg, self.weight, self.bias, self.opt,
            objective=objective, outputs=outputs, input_sumsq=input_sumsq, **self._options(),
        )  # fmt: skip


def _train_combined(layers: Sequence[ff_linear.FFLinear], x_pos: Tensor, x_neg: Tensor) -> None:
    """A step of every layer, each on the updated activities of the one below; the last one's are not computed."""
    sumsq, dtype = None, x_pos.dtype
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        if isinstance(layer, FFLinear) and layer.opt is not None and not common.watched(layer):
            replaced = common.overridden(layer, FFLinear, ("run_train", "__call__"))
            if not replaced and layer._trains_here():
                result = layer.step(x_pos, x_neg, "none" if last else "post", sumsq)
                if last:
                    return
                assert result.pos is not None and result.neg is not None
                x_pos, x_neg, sumsq, dtype = result.pos, result.neg, result.sumsq, layer.weight.dtype
                continue
        # The original path; activities in a compute dtype are handed on in that of the parameters.
        x_pos, x_neg = (x if sumsq is None else x.to(dtype) for x in (x_pos, x_neg))
        layer.run_train(x_pos, x_neg)
        x_pos, x_neg, sumsq = layer(x_pos), layer(x_neg), None


class FFNet(ff_net.FFNet):
    """fflib's net, whose layers hand each other what they know of their activities."""

    def run_train_combined(self, x_pos: Tensor, x_neg: Tensor) -> None:
        """One step of every layer."""
        _train_combined(self.layers, x_pos, x_neg)


class FFC(ffc.FFC):
    """fflib's net with a classifier, whose layers hand each other what they know of their activities."""

    def run_train_combined(self, x_pos: Tensor, x_neg: Tensor) -> None:
        """One step of every layer."""
        _train_combined(self.layers, x_pos, x_neg)

    def train_classifier(self, x_pos: Tensor, y_pos: Tensor) -> None:
        """One step of the classifier; the layers below it are run without a graph, which nothing would use."""
        if self.optimizer is None:
            return super().train_classifier(x_pos, y_pos)
        features = []
        with torch.no_grad():
            for layer in self.layers:
                x_pos = layer(x_pos)
                features.append(x_pos)
        self.optimizer.zero_grad()
        self.criterion(self.classifier(torch.cat(features, dim=1)), y_pos).backward()
        self.optimizer.step()


_OURS: dict[type, type] = {ff_linear.FFLinear: FFLinear, ff_net.FFNet: FFNet, ffc.FFC: FFC}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def accelerate(
    net: nn.Module, *, compute_dtype: torch.dtype | None = None, backend: str | None = None, strict: bool = False
) -> nn.Module:
    """Makes an fflib net or layer run on this package: in place, and returned.

    Parameters, optimizers, hooks and attributes stay the same objects. A layer that cannot run here (a subclass, an
    activation that `linear_step_` does not know) stays what it is, and one warning names all of these.

    Args:
        net: an `FFNet`, `FFC`, a subclass of either, or an `FFLinear`.
        compute_dtype, backend: as in `ffkernels.linear_step_`, for every layer.
        strict: raise instead of warning.

    Raises:
        TypeError: where there is no fflib layer in `net`.
        ValueError: for a layer without bias, which fflib cannot run either; with `strict`, for any that cannot run.
        ValueError, TypeError: for a `compute_dtype` or `backend` that a layer cannot run with.
    """
    layers = _layers(net)
    if not any(isinstance(layer, ff_linear.FFLinear) for layer in layers.values()):
        raise TypeError(f"net is a {type(net).__name__} without FFLinear in it; accepted: fflib's FFNet, FFC, FFLinear")
    options = {"compute_dtype": compute_dtype, "backend": backend}
    common.replace_classes(layers, ff_linear.FFLinear, FFLinear, options, strict)
    if type(net) in _OURS:
        net.__class__ = _OURS[type(net)]
    return net


def restore(net: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place: for a net that is to be pickled for a program without this package."""
    common.restore_classes((net, *_layers(net).values()), _THEIRS)
    return net


def _layers(net: nn.Module) -> dict[str, Any]:
    """The layers of a net by name. `FFC` registers them nowhere but keeps a list, as `FFNet` does too."""
    if isinstance(net, ff_linear.FFLinear):
        return {"layer": net}
    return {f"layers[{i}]": layer for i, layer in enumerate(getattr(net, "layers", None) or [])}
