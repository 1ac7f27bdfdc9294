"""One convolutional Forward-Forward layer as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional
from .. import validation as check
from ..backends import select
from ..functional import StepResult, in_front
from ..functional.conv import check_share, conv2d_pass, run_conv2d, waits
from ..functional.in_front import InputNorm
from ..functional.maps import (
    ConvOptions,
    PoolOf,
    Size,
    checked_geometry,
    compute_dtype_of,
    conv_tensors,
)
from ..objectives import (
    DEFAULT_OBJECTIVE,
    AnyObjective,
    Moments,
    ProjectionHead,
    any_objective,
    moments_goodness,
)
from ..spec import Activation, EpsMode, Geometry, Norm, OutputsOf, PaddingMode
from .layer import Ran, called_only, watched


class FFConv2d(nn.Conv2d):
    """A convolution `y = pool(act(conv(normalise(x)) + b))` that learns from its own goodness.

    Parameters, their initialisation and their names in `state_dict` are those of `torch.nn.Conv2d`. The options are
    those of `conv2d_step_`, and plain attributes: they can be changed at any time. With `batch_norm="behind"` the
    module `batch_norm`, a `torch.nn.BatchNorm2d`, stands behind the pool: goodness is of what it makes, which the layer
    hands on. With `batch_norm="before"` the module `input_norm`, another, stands in front of the convolution; with
    "between" the module `product_norm`, behind it and in front of the activation. Only a step moves running statistics;
    in train mode a forward pass goes by those of its own rows, so call `eval()` to predict. A step drops activities in
    train mode; a forward pass never does.

    A step calls neither `forward` nor the modules within: where hooks watch them, or a subclass overrides `forward`,
    `activity` or `goodness`, it raises.

    Raises:
        ValueError, TypeError: for an option outside what `conv2d_step_` accepts.
    """

    _plain: ClassVar[type[nn.Module]]
    # Layers pickled by earlier versions lack it.
    backend: str | None = None
    dropout: float = 0.0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        *,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        pool: PoolOf = None,
        objective: AnyObjective | Callable[..., Tensor] = DEFAULT_OBJECTIVE,
        norm: Norm = "none",
        eps: float = 1e-4,
        eps_mode: EpsMode = "add",
        activation: Activation = "relu",
        input_norm: nn.GroupNorm | nn.LayerNorm | None = None,
        outputs: OutputsOf = "pre",
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
        batch_norm: Literal["behind", "between", "before"] | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.layer_options(norm, eps, eps_mode, activation)
        check.one_of("outputs", outputs, ("pre", "none"))
        if backend is not None:
            check.one_of("backend", backend, tuple(select.BACKENDS))
        geometry = checked_geometry(stride, padding, padding_mode, groups, pool)
        super().__init__(
            in_channels, out_channels, kernel_size, geometry.stride, geometry.padding, 1, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        conv_tensors(self.weight, self.bias, geometry)
        compute_dtype_of(compute_dtype, self.weight)
        # A function of goodness and side is a loss of the caller's own.
        self.objective = any_objective(objective)
        if isinstance(self.objective, ProjectionHead):
            self.objective.fit(self.weight)
        check.class_groups(self.objective, out_channels)
        self.pool = pool
        self.norm = norm
        self.eps = eps
        self.eps_mode = eps_mode
        self.activation = activation
        self.outputs = outputs
        self.compute_dtype = compute_dtype
        self.backend = backend
        check_share(dropout)
        self.dropout = dropout
        if batch_norm is not None:
            check.one_of("batch_norm", batch_norm, ("behind", "between", "before"))
        self.batch_norm: nn.BatchNorm2d | None = None
        self.input_norm: InputNorm = input_norm
        self.product_norm: nn.BatchNorm2d | None = None
        if batch_norm == "behind":
            self.batch_norm = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        elif batch_norm == "between":
            self.product_norm = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        elif batch_norm == "before":
            if input_norm is not None:
                raise ValueError("batch_norm='before' came with input_norm; accepted: one of the two")
            self.input_norm = nn.BatchNorm2d(in_channels, device=device, dtype=dtype)
        in_front.check_module(self.input_norm, in_channels, self.weight, norm)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ConvOptions._fields}

    def geometry(self) -> Geometry:
        """The options of the geometry, checked."""
        return ConvOptions(**self._options()).geometry()

    def activity(self, x: Tensor, input_sumsq: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Activities `[rows, out, h, w]` of rows `x` `[rows, in, H, W]`, and their sums of squares `[rows]`.

        `options` go to `ffkernels.conv2d_forward` and override the layer's own.
        """
        y, sumsq, _ = self._activity(x, input_sumsq, **options)
        return y, sumsq

    def _activity(self, x: Tensor, input_sumsq: Tensor | None = None, **options: Any) -> Ran:
        options = {**self._options(), **options}
        norm = self.batch_norm
        if not waits(x, *self.parameters()):
            y, moments = run_conv2d(x, self.weight, self.bias, norm, ConvOptions(**options), input_sumsq)
            return Ran(y, moments.second.sum(1), moments)
        y, sumsq = functional.conv2d_forward(x, self.weight, self.bias, input_sumsq=input_sumsq, **options)
        if norm is None:
            return Ran(y, sumsq)
        of_batch = norm.training or norm.running_mean is None
        running = (None, None) if of_batch else (norm.running_mean, norm.running_var)
        u = F.batch_norm(y.to(self.weight.dtype), *running, norm.weight, norm.bias, of_batch, 0.0, norm.eps)
        return Ran(u.to(y.dtype), u.square().sum((1, 2, 3)))

    def forward(self, input: Tensor) -> Tensor:
        """Activities `[rows, out, h, w]`, channels-last; their gradient reaches the parameters, and not `input`."""
        return self.activity(input)[0]

    def goodness(self, x: Tensor) -> Tensor:
        """Goodness of rows `x` `[rows, in, H, W]`: `[rows]`; `[rows, classes]` where the objective has classes."""
        return self._goodness_of(self._run(x))

    def _goodness_of(self, ran: Ran) -> Tensor:
        """Goodness from what a forward pass has left; activities are read for classes alone, without their moments."""
        y, sumsq, moments = ran
        objective, places = self.objective, y.shape[2] * y.shape[3]
        if objective.classes is None:
            return objective.goodness_of(sumsq, self.out_channels * places)
        if moments is None:
            wide = y.to(sumsq.dtype)
            moments = Moments(wide.sum((2, 3)), wide.square().sum((2, 3)))
        if isinstance(objective, ProjectionHead):
            return objective.scores(moments.first / places)
        return moments_goodness(*moments, objective.classes, objective.goodness, places)

    def step(self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any) -> StepResult:
        """One training step, `ffkernels.conv2d_step_`; `options` go there and override the layer's own."""
        if called_only(self) or any(map(watched, self.children())):
            raise ValueError(
                "the layer is watched by hooks or overridden, which a convolution's step does not call; accepted: a "
                "plain FFConv2d, or a loop of your own with goodness_loss and backward()"
            )
        options = {**self._step_options(), **options}
        return functional.conv2d_step_(x_pos, x_neg, self.weight, self.bias, optimizer, **options)

    def _step_options(self) -> dict[str, Any]:
        own = {"objective": self.objective, "outputs": self.outputs, "batch_norm": self.batch_norm}
        dropout = self.dropout if self.training else 0.0
        return {**own, "dropout": dropout, **self._options()}

    def _hand_on(self, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any) -> StepResult:
        """What `step` returns, without one."""
        options = {"skip_below": 0.0, "only_checks": False, **self._step_options(), **options}
        options["objective"] = any_objective(options["objective"])
        own = ConvOptions(**{name: options.pop(name) for name in ConvOptions._fields})
        return conv2d_pass(x_pos, x_neg, self.weight, self.bias, None, own, learns=False, **options)

    def _run(self, x: Tensor, input_sumsq: Tensor | None = None, **_: Any) -> Ran:
        """`activity`, by a call where one is waited for."""
        if not called_only(self):
            return self._activity(x, input_sumsq)
        y = self(x)
        return Ran(y, y.to(self.weight.dtype).square().sum((1, 2, 3)))

    def _shape_after(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a row's activities, of rows of this shape `[in, H, W]`."""
        kernel = (self.weight.shape[2], self.weight.shape[3])
        return self.out_channels, *self.geometry().maps_of(shape[1], shape[2], kernel)[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}, activation={self.activation}, outputs={self.outputs}"


FFConv2d._plain = FFConv2d
