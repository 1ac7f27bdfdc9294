"""bioff 1.1.0 on this package: `accelerate(net)` turns the layers of its `Net`, in place, into faster ones.

Its layer computes `y = relu(x / (norm(x) + 1e-4) W^T + b)` and takes `num_epochs` steps on a fixed batch, minimising
`mean(w log(1 + exp(theta - g_pos)) + w log(1 + exp(g_neg - theta)))`, `g = mean y^2`, with one weight `w` for the i-th
positive and the i-th negative row. That is the mean over positives plus the mean over negatives with sample weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import functional
from ..objectives import Objective
from . import common

common.require_version("bioff", "1.1.0")

from bioff import core  # noqa: E402
from bioff.core import Layer as _TheirLayer  # noqa: E402


class Layer(common.Accelerated, _TheirLayer):
    """bioff's layer, with its training loop and forward pass on this package.

    Arguments are those of bioff's, then `compute_dtype` and `backend` as in `ffkernels.linear_step_`.

    Raises:
        ValueError: for `bias=False`, which bioff's layer cannot run either.
    """

    LIBRARY = "bioff 1.1.0"
    PARTS = ("relu", "threshold")

    def _reason(self) -> str | None:
        if self.weight.device.type != torch.device(self.device).type:
            return f"its parameters are on {self.weight.device} and its data goes to {self.device}"
        return super()._reason()

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]`; under autograd with a gradient to weight and bias, and to `x` if it wants one."""
        x = x.to(self.device)
        # Only bioff's own writing passes a gradient on to the layer below.
        if common.differentiates(x) or not self._runs_here(self._reason()):
            return super().forward(x)
        y, _ = functional.linear_forward(x, self.weight, self.bias, **self._options())
        return common.in_dtype_of(self.weight, y)

    def train(self, x_pos: Tensor, x_neg: Tensor, sample_weights: Tensor) -> tuple[Tensor, Tensor]:
        """`num_epochs` steps on this batch, then the activities of both sides. `.grad` is None afterwards.

        Args:
            x_pos, x_neg: `[rows, in]`, equally many.
            sample_weights: `[rows]`, the weight of the i-th positive and of the i-th negative row.
        """
        reason = (
            self._reason()
            or common.overridden(self, Layer, ("forward",))
            or common.reason_against_step(self, self.opt)
            or _reason_against_batch(x_pos, x_neg, sample_weights)
        )
        if not self._runs_here(reason):
            return super().train(x_pos, x_neg, sample_weights)
        x_pos, x_neg = x_pos.detach().to(self.device), x_neg.detach().to(self.device)
        weights = sample_weights.detach().to(self.device, self.weight.dtype)
        objective = Objective(threshold=self.threshold, reduction="sum_of_means")
        options = {"objective": objective, "sample_weight": torch.cat([weights, weights]), **self._options()}
        # The progress bar is the one that bioff shows, and as quiet as a program has made it.
        common.steps_on_batch(x_pos, x_neg, self, self.opt, core.tqdm(range(self.num_epochs)), options)
        with torch.no_grad():
            return self.forward(x_pos), self.forward(x_neg)


def accelerate(
    net: nn.Module, *, compute_dtype: torch.dtype | None = None, backend: str | None = None, strict: bool = False
) -> nn.Module:
    """Makes a `Net` or `Layer` of bioff run on this package: in place, and returned.

    Parameters, optimizers and attributes stay the same objects. A layer that cannot run here (a subclass, another
    activation) stays what it is, and one warning names all of these. `BioFFClassifier` makes its net inside `fit`: use
    `with accelerated()` around that.

    Args:
        net: a `bioff.core.Net`, or a `bioff.core.Layer`.
        compute_dtype, backend: as in `ffkernels.linear_step_`, for every layer.
        strict: raise instead of warning.

    Raises:
        TypeError: where there is no bioff layer in `net`.
        ValueError: for a layer without bias, which bioff cannot run either; with `strict`, for any that cannot run.
        ValueError, TypeError: for a `compute_dtype` or `backend` that a layer cannot run with.
    """
    modules = net.named_modules() if isinstance(net, nn.Module) else ()
    layers = {name or "layer": module for name, module in modules if isinstance(module, _TheirLayer)}
    if not layers:
        raise TypeError(
            f"net is a {type(net).__name__} without bioff layers; accepted: bioff's Net or Layer "
            "(`with accelerated()` around the fit of a BioFFClassifier)"
        )
    options = {"compute_dtype": compute_dtype, "backend": backend}
    common.replace_classes(layers, _TheirLayer, Layer, options, strict)
    return net


def restore(net: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place: for a net that is to be pickled for a program without this package."""
    common.restore_classes(net.modules(), {Layer: _TheirLayer})
    return net


@contextmanager
def accelerated() -> Iterator[None]:
    """While it lasts, nets that bioff makes have accelerated layers: `BioFFClassifier.fit` makes and trains one.

    It holds in this process, not in those that a search over parameters may start.
    """
    before, core.Layer = core.Layer, Layer
    try:
        yield
    finally:
        core.Layer = before


def _reason_against_batch(x_pos: Tensor, x_neg: Tensor, sample_weights: Tensor) -> str | None:
    if x_pos.shape != x_neg.shape or sample_weights.shape != (len(x_pos),):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x_pos, x_neg, sample_weights))
        return f"x_pos, x_neg and sample_weights of shapes {shapes} are not rows, as many rows, and a weight for each"
    waits = common.any_waits(x_pos, x_neg, sample_weights)
    return "x_pos, x_neg or sample_weights wait for a gradient" if waits else None
