"""What a network may be made of, and in which order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .. import validation as check
from .conv import FFConv2d
from .layer import FFLinear

Layer = FFLinear | FFConv2d


class Shortcut(nn.Module):
    """Joins to what a layer of an `FFNetwork` takes what a convolution below it took, without any gradient.

    Args:
        back: how many layers below that one stands; >= 1.
        join: "add", or "concatenate" for its channels behind those that are there.
        pool: how that one's maps are made smaller first, or None.

    Raises:
        ValueError, TypeError: for a value outside these.
    """

    def __init__(
        self, back: int, join: Literal["add", "concatenate"] = "add", *, pool: nn.AvgPool2d | nn.MaxPool2d | None = None
    ) -> None:
        super().__init__()
        if isinstance(back, bool) or not isinstance(back, int) or back < 1:
            raise ValueError(f"back={back!r} is not an integer >= 1")
        check.one_of("join", join, ("add", "concatenate"))
        if pool is not None and not isinstance(pool, nn.AvgPool2d | nn.MaxPool2d):
            raise TypeError(f"pool is a {type(pool).__name__}; accepted: nn.AvgPool2d, nn.MaxPool2d or None")
        self.back, self.how, self.pool = back, join, pool

    def join(self, x: Tensor, earlier: Tensor) -> Tensor:
        """`x` `[rows, channels, h, w]` and what the layer below took, together."""
        earlier = earlier if self.pool is None else self.pool(earlier)
        return x + earlier if self.how == "add" else torch.cat([x, earlier], 1)

    def extra_repr(self) -> str:
        return f"back={self.back}, join={self.how}"


# What may stand between layers: it learns nothing.
BETWEEN = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.Flatten, nn.GroupNorm, nn.LayerNorm, Shortcut)


def stacked(modules: list[nn.Module]) -> tuple[list[Layer], list[list[nn.Module]]]:
    """The layers of a list, and what stands in front of each; raises for what does not fit."""
    layers: list[Layer] = []
    between: list[list[nn.Module]] = [[]]
    for i, module in enumerate(modules):
        if isinstance(module, BETWEEN):
            if next(module.parameters(), None) is not None:
                raise ValueError(
                    f"layers[{i}] is a {type(module).__name__} with parameters, which nothing would train; accepted: "
                    "affine=False or elementwise_affine=False"
                )
            between[-1].append(module)
            continue
        if not isinstance(module, Layer):
            raise TypeError(
                f"layers[{i}] is a {type(module).__name__}; accepted: ffkernels.FFLinear or FFConv2d, and between them "
                "pools, nn.Flatten, nn.GroupNorm, nn.LayerNorm, ffkernels.Shortcut"
            )
        is_flat = any(isinstance(m, nn.Flatten) for m in between[-1])
        below = layers[-1] if layers else None
        if isinstance(module, FFConv2d):
            if is_flat or isinstance(below, FFLinear):
                raise ValueError(
                    f"layers[{i}] is an FFConv2d behind flat rows; accepted: in front of any FFLinear and nn.Flatten"
                )
            channels = _joined(i, between[-1], layers)
            if channels is not None and module.in_channels != channels:
                raise ValueError(
                    f"layers[{i}] has in_channels={module.in_channels}; accepted: {channels}, the channels of what "
                    "comes from below"
                )
        elif any(isinstance(m, Shortcut) for m in between[-1]):
            raise ValueError(f"layers[{i}] has a Shortcut in front of it; accepted: in front of an FFConv2d")
        elif isinstance(below, FFConv2d):
            if not is_flat or module.in_features % below.out_channels:
                raise ValueError(
                    f"layers[{i}] has in_features={module.in_features} behind {below.out_channels} channels; accepted: "
                    "an nn.Flatten() between them, and a multiple of the channels"
                )
        elif below is not None and module.in_features != below.out_features:
            raise ValueError(
                f"layers[{i}] has in_features={module.in_features}; accepted: {below.out_features}, the width of the "
                "layer below"
            )
        layers.append(module)
        between.append([])
    if not layers:
        raise ValueError("layers is empty; accepted: at least one FFLinear or FFConv2d")
    if between.pop():
        raise ValueError(
            f"layers[{len(modules) - 1}] is a {type(modules[-1]).__name__} behind the last layer that learns; "
            "accepted: nothing there"
        )
    return layers, between


def _joined(i: int, between: list[nn.Module], layers: list[Layer]) -> int | None:
    """How many channels come to the convolution at `i` of a list; None for images, which may have any."""
    below = layers[-1] if layers else None
    channels = below.out_channels if isinstance(below, FFConv2d) else None
    for module in between:
        if not isinstance(module, Shortcut):
            continue
        if module.back > len(layers):
            raise ValueError(
                f"layers[{i}] has a Shortcut from {module.back} layers below, of which there are {len(layers)}; "
                "accepted: fewer"
            )
        earlier = layers[-module.back]
        assert isinstance(earlier, FFConv2d) and channels is not None
        if module.how == "concatenate":
            channels += earlier.in_channels
        elif earlier.in_channels != channels:
            raise ValueError(
                f"layers[{i}] has a Shortcut that adds {earlier.in_channels} channels to {channels}; accepted: as many"
            )
    return channels


def shortcuts(between: list[list[nn.Module]]) -> frozenset[int]:
    """The layers at whose input one begins."""
    found = [i - m.back for i, modules in enumerate(between) for m in modules if isinstance(m, Shortcut)]
    return frozenset(found)
