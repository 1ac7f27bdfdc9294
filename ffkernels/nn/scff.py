"""One self-contrastive convolutional layer as a module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional
from .. import validation as check
from ..functional.maps import Size, checked_geometry, compute_dtype_of, conv_tensors
from ..functional.scff import ScffResult, check_objective
from ..spec import PaddingMode

HandsOn = Literal["triangle", "relu"]
HANDS_ON = ("triangle", "relu")


class SCFFConv2d(nn.Conv2d):
    """A convolution that learns without labels: a pair of an image and itself against one of two images.

    Parameters, their initialisation and their names in `state_dict` are those of `torch.nn.Conv2d`. The definition is
    that of `ffkernels.scff_step_`. What the layer hands on is `pool(act(z))` of the positive pairs, with "triangle"
    `relu(z - mean of z over channels)` (Coates et al., 2011). Layers stand one behind the other in an `nn.Sequential`,
    each trained on what the ones below hand on; another layer standardises what it is given itself.

    Args:
        in_channels, out_channels, kernel_size, stride, bias: as in `torch.nn.Conv2d`.
        padding, padding_mode, thresholds, penalty, compute_dtype: as in `scff_step_`.
        hands_on: "triangle" or "relu".
        pool: any module on maps behind it, such as `nn.MaxPool2d(4, 2, 1, ceil_mode=True)`, or None.

    Raises:
        ValueError, TypeError: for an option outside what `scff_step_` accepts.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        *,
        bias: bool = True,
        padding_mode: PaddingMode = "reflect",
        thresholds: tuple[float, float] = (0.0, 1.0),
        penalty: float = 0.0,
        hands_on: HandsOn = "triangle",
        pool: nn.Module | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = checked_geometry(stride, padding, padding_mode, 1, None)
        check_objective(thresholds, penalty)
        check.one_of("hands_on", hands_on, HANDS_ON)
        if pool is not None and not isinstance(pool, nn.Module):
            raise TypeError(f"pool is a {type(pool).__name__}; accepted: a module on maps, or None")
        super().__init__(
            in_channels, out_channels, kernel_size, geometry.stride, geometry.padding, 1, 1, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        conv_tensors(self.weight, self.bias, geometry)
        compute_dtype_of(compute_dtype, self.weight)
        self.thresholds = thresholds
        self.penalty = penalty
        self.hands_on = hands_on
        self.pool = pool
        self.compute_dtype = compute_dtype

    def _options(self) -> dict[str, Any]:
        names = ("stride", "padding", "padding_mode", "compute_dtype")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: Tensor) -> Tensor:
        """What the layer hands on of rows `[rows, in, H, W]`; its gradient reaches the parameters, and not `input`."""
        return self.hand_on(functional.scff_forward(input, self.weight, self.bias, **self._options()))

    def hand_on(self, z: Tensor) -> Tensor:
        """The same of `z` `[rows, out, h, w]`, that of a step's result."""
        check.one_of("hands_on", self.hands_on, HANDS_ON)
        y = (z - z.mean(1, keepdim=True) if self.hands_on == "triangle" else z).relu()
        y = y if self.pool is None else self.pool(y)
        return y if self.compute_dtype is None else y.to(self.compute_dtype)

    def step(self, x: Tensor, optimizer: Optimizer | None, partners: Tensor | None = None) -> ScffResult:
        """One training step, `ffkernels.scff_step_`, on rows `x` `[rows, in, H, W]`.

        `partners`: `[rows]` int64, which row is paired with each; None: the one so many places on, as many for all,
        drawn from torch's global generator, of at least two rows.
        """
        check.tensor("x", x)
        if check.is_watched(self):
            raise ValueError("the layer has hooks, which its step does not call; accepted: one without")
        if partners is None:
            if len(x) < 2:
                raise ValueError(f"x has {len(x)} rows, of which none has another beside it; accepted: at least 2")
            shift = int(torch.randint(1, len(x), ()))
            partners = torch.arange(len(x), device=x.device).roll(-shift)
        own = {"thresholds": self.thresholds, "penalty": self.penalty, **self._options()}
        return functional.scff_step_(x, partners, self.weight, self.bias, optimizer, **own)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hands_on={self.hands_on}, thresholds={self.thresholds}"
