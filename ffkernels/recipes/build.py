"""The network and the optimizers of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import FFConv2d, FFLinear, FFNetwork
from ..optim import SGDW
from .catalogue import Recipe, Rule
from .data import Dataset
from .overlapped import OverlappedNetwork


def network_of(recipe: Recipe, data: Dataset, compute_dtype: torch.dtype | None) -> FFNetwork | OverlappedNetwork:
    """An untrained network for images of this data set, of weights drawn from the default generator."""
    if recipe.overlapped:
        return OverlappedNetwork(recipe, data, compute_dtype)
    classes, (channels, height, width) = data.num_classes, data.shape
    options: dict[str, Any] = {
        "norm": recipe.norm, "eps": recipe.eps, "eps_mode": recipe.eps_mode, "activation": recipe.activation,
        "outputs": recipe.outputs, "compute_dtype": compute_dtype,
    }  # fmt: skip
    modules: list[nn.Module] = []
    by_groups = recipe.norm_of_maps == "groups"
    if by_groups:
        modules.append(nn.GroupNorm(1, channels, affine=False))
    for of in recipe.convolutions:
        convolution = FFConv2d(
            channels,
            of.channels,
            of.kernel,
            padding=of.kernel // 2,
            bias=not by_groups,
            groups=classes if of.by_class else 1,
            pool=of.pool if of.pool > 1 and not by_groups else None,
            objective=recipe.objective(of.channels, classes),
            batch_norm=None if by_groups else "behind",
            dropout=recipe.dropped_units,
            **options | {"norm": "none"},
        )
        channels, height, width = of.channels, height // of.pool, width // of.pool
        modules.append(convolution)
        if by_groups:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            modules.append(nn.GroupNorm(classes, channels, affine=False))
            modules += [nn.AvgPool2d(of.pool)] if of.pool > 1 else []
        else:
            assert convolution.batch_norm is not None
            convolution.batch_norm.eps = recipe.eps
    if recipe.convolutions and recipe.hidden:
        modules.append(nn.Flatten())
    fan_in = channels * height * width + (classes if recipe.label == "columns" else 0)
    for units in recipe.hidden:
        layer = FFLinear(fan_in, units, objective=recipe.objective(units, classes), peer=recipe.peer, **options)
        if recipe.init != "torch":
            nn.init.normal_(layer.weight, std=1 / math.sqrt(units if recipe.init == "fan_out" else fan_in))
            nn.init.zeros_(layer.bias)
        fan_in = units
        modules.append(layer)
    while not isinstance(modules[-1], FFLinear | FFConv2d):
        modules.pop()
    return FFNetwork(modules)


def optimizer_of(rule: Rule, module: nn.Module, fused: bool = False) -> Optimizer:
    """The optimizer of a rule for all parameters of a module; `fused`: PyTorch's own step in one call, of Adam."""
    if rule.optimizer == "adam":
        adam = AdamW if rule.decoupled else Adam
        return adam(module.parameters(), lr=rule.lr, weight_decay=rule.weight_decay, fused=fused or None)
    parameters = list(module.parameters())
    options: dict[str, Any] = {
        "lr": rule.lr,
        "momentum": rule.momentum,
        "dampening": rule.momentum if rule.average else 0.0,
    }
    optimizer: SGD
    if rule.decoupled:
        kinds = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]]
        decays = (rule.weight_decay, 0.0)
        groups = [{"params": of_kind, "decoupled": d} for of_kind, d in zip(kinds, decays, strict=True) if of_kind]
        optimizer = SGDW(groups, **options)
    else:
        optimizer = SGD(parameters, weight_decay=rule.weight_decay, **options)
    if rule.average:
        # Without a buffer SGD would start from the first gradient, undamped.
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
