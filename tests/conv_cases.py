"""Convolutional layers as autograd would write them, and random ones to hold ours against."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

import ffkernels as ff
from ffkernels import reference
from ffkernels.objectives import CLASS_GOODNESS, CLASS_LOSSES

from .steps import OPTIMIZERS

RULES = ["sgd-momentum", "sgdw", "adam", "adamw", "rmsprop"]
POOLS: dict[str, Any] = {
    "none": None,
    "max": 2,
    "wide": (3, 2),
    "overlapping": nn.MaxPool2d(3, 2),
    "average": nn.AvgPool2d(2),
    "overlapping average": nn.AvgPool2d((2, 3), 1),
}


IN_FRONT: dict[str | None, Any] = {
    None: lambda channels, height, width: None,
    "batch": lambda channels, height, width: nn.BatchNorm2d(channels),
    "running": lambda channels, height, width: nn.BatchNorm2d(channels),
    "without a line": lambda channels, height, width: nn.BatchNorm2d(channels, affine=False),
    "layer": lambda channels, height, width: nn.LayerNorm([channels, height, width], elementwise_affine=False),
    "group": lambda channels, height, width: nn.GroupNorm(2, channels, affine=False),
}


def margin(goodness: Tensor, labels: Tensor) -> Tensor:
    return F.multi_margin_loss(goodness, labels)


def of_moments(moments: ff.Moments, side: Tensor) -> Tensor:
    spread = moments.second - moments.first.square() / 7
    return ((spread.tanh() + moments.first.tanh()) * (2.0 * side.to(spread.dtype) - 1)[:, None]).mean()


OBJECTIVES = {
    "mean": ff.Objective(threshold=0.5),
    "sum": ff.Objective(goodness="sum", threshold=(3.0, 1.0), reduction="sum_of_means", temperature=2.0),
    "norm": ff.Objective(goodness="norm", maximize=False),
    "symba": ff.Objective(loss="symba"),
    "swish": ff.Objective(loss="swish", goodness="sum", alpha=0.1),
    **{
        f"{loss} {goodness}": ff.Objective(loss=loss, classes=3, goodness=goodness, threshold=0.5)
        for loss in CLASS_LOSSES
        for goodness in CLASS_GOODNESS
    },
    "projection": "projection",
    "prototypes": "prototypes",
    "given goodness": ff.GivenLoss(margin, classes=3),
    "given sides": ff.GivenLoss(lambda g, side: (g * (side.to(g.dtype) - 0.5)).tanh().mean(), goodness="sum"),
    "given moments": ff.GivenLoss(of_moments, reads="moments"),
}


@dataclass
class Case:
    """A layer, its optimizer and a batch."""

    layer: ff.FFConv2d
    optimizer: torch.optim.Optimizer | None
    x: Tensor
    side: Tensor
    sample_weight: Tensor | None

    @property
    def has_labels(self) -> bool:
        return self.layer.objective.classes is not None

    def ours(self, **options: Any) -> ff.StepResult:
        given = {"sample_weight": self.sample_weight, **options}
        if self.has_labels:
            return self.layer.step(self.x, None, self.optimizer, labels=self.side, **given)
        n = int(self.side.sum())
        return self.layer.step(self.x[:n], self.x[n:], self.optimizer, **given)

    def theirs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Activities, goodness and loss, and the step, by autograd."""
        for p in self.layer.parameters():
            p.grad = None
        y = definition(self.layer, self.x)
        goodness, loss = judged(self.layer.objective, y, self.side, self.sample_weight)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return y, goodness, loss

    def copy(self, dtype: torch.dtype | None = None) -> Case:
        """The same in another dtype, its objective's head and optimizer too."""
        dtype = dtype or self.x.dtype
        layer = deepcopy(self.layer).to(dtype)
        optimizer = self.optimizer
        if optimizer is not None:
            optimizer = type(optimizer)(layer.parameters(), lr=0.1)
            optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        weight = None if self.sample_weight is None else self.sample_weight.to(dtype)
        return Case(layer, optimizer, self.x.to(dtype), self.side, weight)

    def state(self) -> dict[str, Tensor]:
        """Parameters, running statistics and every tensor that the optimizer keeps, by name."""
        found = dict(self.layer.state_dict())
        if self.optimizer is None:
            return {name: p.grad for name, p in self.layer.named_parameters()}
        for name, p in self.layer.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}.{key}"] = value
        return found


def definition(layer: ff.FFConv2d, x: Tensor, behind: bool = True) -> Tensor:
    """What a layer hands on, differentiable."""
    x = reference.normalise(x.flatten(1), layer.norm, layer.eps, layer.eps_mode).view_as(x)
    x = x if layer.input_norm is None else layer.input_norm(x)
    padding = layer.padding
    if layer.padding_mode == "reflect":
        (down, across), padding = padding, 0
        x = F.pad(x, (across, across, down, down), mode="reflect")
    z = F.conv2d(x, layer.weight, layer.bias, layer.stride, padding, 1, layer.groups)
    z = z if layer.product_norm is None else layer.product_norm(z)
    y = reference.ACTIVATIONS[layer.activation](z)
    if isinstance(layer.pool, nn.Module):
        y = layer.pool(y)
    elif layer.pool is not None:
        y = F.max_pool2d(y, layer.pool)
    return layer.batch_norm(y) if layer.batch_norm is not None and behind else y


def sensitivity(case: Case) -> float:
    """How much larger than a rounding error of the activities one behind their standardisation is, at least 1."""
    norm = case.layer.batch_norm
    if norm is None or not norm.training:
        return 1.0
    with torch.no_grad():
        # A copy: a normalisation in front would move its running statistics.
        y = definition(deepcopy(case.layer), case.x, behind=False)
        size = y.abs().amax((0, 2, 3)) / (y.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    return max(1.0, float(size.max()))


def judged(objective: Any, y: Tensor, side: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Goodness and loss of activities `y` `[rows, channels, h, w]`; differentiable."""
    if isinstance(objective, ff.ProjectionHead):
        mean, head = y.mean((2, 3)), objective.weight
        if objective.form == "prototypes":
            mean, head = F.normalize(mean, dim=1), F.normalize(head, dim=1)
        goodness = mean @ head.t()
        return goodness, reference.class_loss_of(goodness, side, objective.objective, weight)
    if objective.classes is None:
        goodness = reference.goodness_of(y.flatten(1), objective.goodness)
    else:
        groups = [group.flatten(1) for group in y.tensor_split(objective.classes, 1)]
        if objective.goodness == "activity":
            goodness = torch.stack([group.mean(1) for group in groups], 1)
        else:
            goodness = torch.stack([reference.goodness_of(group, objective.goodness) for group in groups], 1)
    if isinstance(objective, ff.GivenLoss):
        read = goodness
        if objective.reads == "moments":
            read = ff.Moments(y.sum((2, 3)), y.square().sum((2, 3)))
        return goodness, objective.function(read, side)
    if objective.classes is not None:
        return goodness, reference.class_loss_of(goodness, side, objective, weight)
    return goodness, reference.loss_of(goodness, side, objective, weight)


def of_maps(maps: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """A loss of places, and of rows together: no function of the moments."""
    ramp = torch.linspace(-1, 1, maps.shape[3], dtype=maps.dtype)
    apart = (maps * ramp).tanh() - maps.mean(0, keepdim=True)
    return (apart.square().mean((1, 2, 3)) * (side.to(maps.dtype) - 0.4)).mean()


def made(
    objective: str,
    *,
    rows: int = 6,
    channels: tuple[int, int] = (2, 5),
    maps: tuple[int, int] = (7, 6),
    kernel: tuple[int, int] = (3, 3),
    optimizer: str | None = "sgd-momentum",
    statistics: str | None = None,
    weighted: bool = False,
    ties: bool = False,
    in_front: str | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """A case from the global seed; `ties`: of small whole numbers, among which equal ones are many."""
    of = OBJECTIVES[objective]
    if isinstance(of, str):
        of = ff.ProjectionHead(3, form=of, temperature=0.5)
    behind = None if statistics is None else "behind"
    layer = ff.FFConv2d(*channels, kernel, objective=of, batch_norm=behind, dtype=dtype, **options)
    layer.input_norm = IN_FRONT[in_front](channels[0], *maps)
    layer.to(dtype)
    x = torch.randn(rows, channels[0], *maps, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(1.5)
        if ties:
            x = x.round()
            layer.weight.copy_(torch.randint_like(layer.weight, -1, 2))
            if layer.bias is not None:
                layer.bias.mul_(8).round_().div_(8)
        if layer.batch_norm is not None:
            norm = layer.batch_norm
            norm.weight.copy_(torch.randn(channels[1]))
            norm.weight[0] = 0.0
            norm.bias.copy_(torch.randn(channels[1]))
            norm.running_mean.copy_(torch.randn(channels[1]) / 3)
            norm.running_var.copy_(torch.rand(channels[1]) + 0.5)
            norm.train(statistics == "batch")
        if isinstance(layer.input_norm, nn.BatchNorm2d):
            norm = layer.input_norm
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(channels[0]))
            norm.running_mean.copy_(torch.randn(channels[0]) / 3)
            norm.running_var.copy_(torch.rand(channels[0]) + 0.5)
            norm.train(in_front != "running")
    has_labels = layer.objective.classes is not None
    side = torch.randint(3, (rows,)) if has_labels else torch.arange(rows) < (rows + 1) // 2
    weight = None
    if weighted and not isinstance(of, ff.GivenLoss):
        weight = torch.rand(rows // 2 if of.paired else rows, dtype=dtype) + 0.5
    optimizers = None if optimizer is None else OPTIMIZERS[optimizer](layer.parameters())
    return Case(layer, optimizers, x, side, weight)


@st.composite
def cases(draw) -> dict[str, Any]:
    """Arguments of `made`, and a seed."""
    groups = draw(st.sampled_from([1, 1, 2]))
    objective = draw(st.sampled_from(list(OBJECTIVES)))
    kernel = draw(st.sampled_from([(3, 3), (1, 1), (2, 3), (3, 1)]))
    padding = draw(st.sampled_from([0, 1, (1, 0), (2, 1)]))
    ties = draw(st.booleans())
    norm, eps_mode = draw(st.sampled_from([("none", "add"), ("l2", "add"), ("rms", "inside"), ("l2", "clamp")]))
    in_front = None if ties else draw(st.sampled_from([None, None, *IN_FRONT]))
    rows = draw(st.integers(1, 5))
    if objective in ("symba", "swish"):
        rows += rows % 2
    return {
        "objective": objective,
        "rows": rows,
        "channels": (2 * groups, draw(st.sampled_from([4, 6] if groups == 2 else [3, 4, 5]))),
        "maps": (draw(st.integers(5, 9)), draw(st.integers(5, 9))),
        "kernel": kernel,
        "stride": draw(st.sampled_from([1, 2, (2, 1)])),
        "padding": padding,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect"])),
        "groups": groups,
        "bias": draw(st.booleans()),
        "pool": POOLS[draw(st.sampled_from(list(POOLS)))],
        "activation": draw(st.sampled_from(list(reference.ACTIVATIONS))),
        # A scale rounds equal numbers apart in one of the two orders.
        "norm": "none" if ties or in_front else norm,
        "in_front": in_front,
        "eps_mode": eps_mode,
        "ties": ties,
        "statistics": draw(st.sampled_from([None, "batch", "running"])),
        "weighted": draw(st.booleans()),
        "optimizer": draw(st.sampled_from(RULES)),
        "seed": draw(st.integers(0, 2**16)),
    }


def drawn_case(drawn: dict[str, Any], **changes: Any) -> Case:
    """The case of what `cases` draws, its seed set; gives up one that PyTorch refuses, or whose numbers have no
    variance."""
    torch.manual_seed(drawn.pop("seed"))
    try:
        case = made(**{**drawn, **changes})
        shape = definition(case.layer, case.x, behind=False).shape
    except RuntimeError:  # PyTorch's own, of maps that a kernel or pool does not fit in
        assume(False)
    assume(drawn["statistics"] != "batch" or shape[0] * shape[2] * shape[3] > 1)
    return case
