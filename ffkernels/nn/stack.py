"""What a network may be made of, and in which order."""

from __future__ import annotations

from torch import nn

from .conv import FFConv2d
from .layer import FFLinear

Layer = FFLinear | FFConv2d
# What may stand between layers: it learns nothing.
BETWEEN = (nn.MaxPool2d, nn.AvgPool2d, nn.Flatten)


def stacked(modules: list[nn.Module]) -> tuple[list[Layer], list[list[nn.Module]]]:
    """The layers of a list, and what stands in front of each; raises for what does not fit."""
    layers: list[Layer] = []
    between: list[list[nn.Module]] = [[]]
    for i, module in enumerate(modules):
        if isinstance(module, BETWEEN):
            between[-1].append(module)
            continue
        if not isinstance(module, Layer):
            raise TypeError(
                f"layers[{i}] is a {type(module).__name__}; accepted: ffkernels.FFLinear or FFConv2d, and between them "
                "nn.MaxPool2d, nn.AvgPool2d, nn.Flatten"
            )
        is_flat = any(isinstance(m, nn.Flatten) for m in between[-1])
        below = layers[-1] if layers else None
        if isinstance(module, FFConv2d):
            if is_flat or isinstance(below, FFLinear):
                raise ValueError(f"layers[{i}] is an FFConv2d behind flat rows; accepted: behind another, or images")
            if below is not None and module.in_channels != below.out_channels:
                raise ValueError(
                    f"layers[{i}] has in_channels={module.in_channels}; accepted: {below.out_channels}, the channels "
                    "of the layer below"
                )
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
        raise ValueError(f"layers[{len(modules) - 1}] comes behind the last layer that learns; accepted: none there")
    return layers, between
