"""A convolutional layer's forward pass and its step: arguments to records, operators, and the optimizer's rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import interrupts, ops, optim
from .. import validation as check
from ..autograd import is_transformed, without_autocast
from ..backends import select
from ..backends.eager import conv, rules
from ..compiling import never_compiled
from ..objectives import (
    DEFAULT_OBJECTIVE,
    AnyObjective,
    GivenLoss,
    Judged,
    Moments,
    Objective,
    ProjectionHead,
    Standardised,
    StandardisedMoments,
    any_objective,
    by_unit,
    dense,
    move,
    pivot_of,
    standardise_moments,
    through_moments,
)
from ..spec import (
    Activation,
    EpsMode,
    Geometry,
    Layer,
    MapRows,
    Maps,
    MapSlopes,
    Norm,
    OutputsOf,
    PaddingMode,
    Rows,
    Slopes,
)
from . import between, in_front
from .in_front import InputNorm
from .loss import sides_in_order
from .maps import ConvOptions, PoolOf, Size, maps_of, rows_for
from .plan import others_of
from .result import StepResult
from .rows import checked_rows
from .stages import judged_of


def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    padding_mode: PaddingMode = "zeros",
    groups: int = 1,
    pool: PoolOf = None,
    norm: Norm = "none",
    eps: float = 1e-4,
    eps_mode: EpsMode = "add",
    activation: Activation = "relu",
    input_norm: InputNorm = None,
    product_norm: nn.BatchNorm2d | None = None,
    compute_dtype: torch.dtype | None = None,
    input_sumsq: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = pool(act(conv(r x) + b))` `[rows, out, h, w]`, channels-last in the compute dtype, and its rows' sums of
    squares `[rows]`.

    The arguments are those of `conv2d_step_`, but parameters may be frozen. Where they require a gradient, `y` and the
    sums carry one to them, by PyTorch's own operations; none reaches `x`. Running statistics stay as they are.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    options = ConvOptions(
        stride, padding, padding_mode, groups, pool, norm, eps, eps_mode, activation, input_norm, product_norm,
        compute_dtype, backend,
    )  # fmt: skip
    of_norms = [p for norm in (input_norm, product_norm) if isinstance(norm, nn.Module) for p in norm.parameters()]
    if not waits(x, weight, bias, *of_norms):
        y, moments = run_conv2d(x, weight, bias, None, options, input_sumsq)
        return y, moments.second.sum(1)
    rows, layer, geometry, _ = _ready(x, weight, bias, options, input_sumsq)
    with without_autocast(weight.device):
        if product_norm is None:
            p, *_ = conv.activities(rows, layer, geometry)
        else:
            (p, *_), _ = between.activities(rows, layer, geometry, product_norm)
        return p, p.to(weight.dtype).square().sum((1, 2, 3))


def waits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a forward pass of rows `x` must be differentiable by these, or is followed otherwise."""
    if torch.is_grad_enabled() and any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
        return True
    return not torch.compiler.is_compiling() and is_transformed(x, *parameters)


def run_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch_norm: nn.BatchNorm2d | None,
    options: ConvOptions,
    input_sumsq: Tensor | None,
) -> tuple[Tensor, Moments]:
    """`conv2d_forward` without a graph, the batch normalisation behind it included: what it hands on, and its moments.

    Running statistics stay as they are.
    """
    rows, layer, geometry, backend = _ready(x, weight, bias, options, input_sumsq)
    _enough_for_statistics(batch_norm, geometry, weight, x)
    with torch.no_grad(), without_autocast(weight.device):
        maps, _ = _forward(rows, layer, geometry, options.product_norm, batch_norm, backend)
        read = read_maps(maps, batch_norm)
        if read.behind is not None:
            conv.hand_on_(maps, *read.behind.line())
        return maps.p, Moments(read.first, read.second)


def _ready(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, input_sumsq: Tensor | None
) -> tuple[MapRows, Layer, Geometry, str]:
    """The records of a forward pass and its backend; raises for what does not fit."""
    layer, geometry = options.checked(weight, bias)
    maps_of("x", x, weight, layer.compute_dtype, geometry)
    in_front.check_fits(options.input_norm, x, weight, layer.norm)
    in_front.check_enough(options.input_norm, x)
    between.check_module(options.product_norm, weight, options.backend)
    _enough_between(options.product_norm, geometry, weight, x)
    if input_sumsq is not None:
        check.vector("input_sumsq", input_sumsq, len(x), weight.dtype, weight.device)
        input_sumsq = input_sumsq.detach()
    with without_autocast(weight.device):
        x = in_front.normalised(options.input_norm, x.detach(), weight.dtype)
        rows = rows_for(x, layer, geometry, input_sumsq)
    return rows, layer, geometry, backend_of(layer, geometry, None, options.backend)


def _forward(
    rows: MapRows,
    layer: Layer,
    geometry: Geometry,
    product_norm: nn.BatchNorm2d | None,
    batch_norm: nn.BatchNorm2d | None,
    backend: str,
) -> tuple[Maps, Standardised | None]:
    """Maps with their moments, and what a batch normalisation in front of the activation has made."""
    if product_norm is None:
        return ops.conv2d_forward(rows, layer, geometry, *pivot_of(batch_norm), backend), None
    ran, standardised = between.activities(rows, layer, geometry, product_norm)
    return conv.maps_of(*ran, layer.weight, *pivot_of(batch_norm)), standardised


def conv2d_step_(
    x_pos: Tensor,
    x_neg: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer | None,
    *,
    objective: AnyObjective | Callable[..., Tensor] = DEFAULT_OBJECTIVE,
    stride: Size = 1,
    padding: Size = 0,
    padding_mode: PaddingMode = "zeros",
    groups: int = 1,
    pool: PoolOf = None,
    norm: Norm = "none",
    eps: float = 1e-4,
    eps_mode: EpsMode = "add",
    activation: Activation = "relu",
    input_norm: InputNorm = None,
    product_norm: nn.BatchNorm2d | None = None,
    outputs: OutputsOf = "pre",
    compute_dtype: torch.dtype | None = None,
    sample_weight: Tensor | None = None,
    is_positive: Tensor | None = None,
    labels: Tensor | None = None,
    input_sumsq: Tensor | None = None,
    skip_below: float = 0.0,
    batch_norm: nn.BatchNorm2d | None = None,
    dropout: float = 0.0,
    only_checks: bool = False,
    backend: str | None = None,
) -> StepResult:
    """One Forward-Forward step of one convolutional layer: updates `weight` and `bias` in place, without autograd.

    With `r_i` the scale that normalises row `x_i` over all its channels and places: `z = r conv(x) + b`,
    `p = pool(act(z))`. The objective reads two moments of each row and channel, `q1 = sum_places p` and
    `q2 = sum_places p^2`, and hands back the slopes `s1 = dLoss/dq1`, `s2 = dLoss/dq2`. Then `dp = s1 + 2 s2 p`,
    `dz` is `dp act'(z)` where a unit won its window, and `dW` the convolution's weight gradient alone; no gradient of
    `x` is formed. Rows all of whose slopes are exactly zero are left out of it. On the backend "native" both
    convolutions are compiled with what comes before and behind them, or for some shapes PyTorch's between two passes;
    on "triton" they are tiles of an implicit product, with the same around them.

    Args:
        x_pos: `[n_pos, in, H, W]` un-normalised positive rows, in the weight's dtype or the compute dtype. Maps are
            channels-last throughout; others are accepted, and copied to that layout at each call, which costs a pass
            over `x`.
        x_neg: `[n_neg, in, H, W]`, as in `linear_step_`; both sides are copied to one joint batch.
        weight: `[out, in / groups, k, k]` float32 or float64 parameter.
        bias: `[out]` parameter, or None.
        optimizer: as in `linear_step_`.
        objective: as in `linear_step_`. Its units are channels: class groups are groups of consecutive ones, a mean
            goodness is over channels and places, a `ProjectionHead` reads the globally averaged map. A `GivenLoss`
            reads the goodness, the moments, or the maps themselves.
        stride, padding, padding_mode, groups: as in `torch.nn.Conv2d`; padding is an integer or a pair, its mode
            "zeros" or "reflect". Kernels are not dilated.
        pool: None; a size or a pair, that of maximum pooling behind the activation; or an `nn.MaxPool2d` or
            `nn.AvgPool2d` without padding. As in PyTorch, the first of equal units wins.
        norm, eps, eps_mode, activation: as in `linear_step_`.
        input_norm: in place of `norm` a module that normalises the input: a `torch.nn.BatchNorm2d`, whose weight and
            bias the optimizer must hold, and whose gradients come out of the update without one of `x`; or an
            `nn.GroupNorm` or `nn.LayerNorm` over whole rows, without parameters. Statistics are of both sides together.
        product_norm: a `torch.nn.BatchNorm2d` between the convolution and the activation, whose weight and bias the
            optimizer must hold. The step runs in PyTorch then.
        outputs: "pre" or "none". "post" is refused: it would take the convolution again, a third of a step, and no
            published convolutional network hands on activities from after its update.
        compute_dtype: torch.bfloat16: maps and products are rounded to it, moments, slopes and masters stay float32.
            None: autocast's dtype where autocast is on, else the weight's.
        sample_weight, is_positive, labels, input_sumsq, skip_below, only_checks: as in `linear_step_`.
        batch_norm: a `torch.nn.BatchNorm2d` behind the pool: the objective reads the moments of its signed output,
            which the result hands on; the optimizer must hold its weight and bias too. In train mode its statistics
            are those of the batch, both sides together, and the running ones move.
        dropout: what share of the numbers behind a ReLU and the pool, if any, of maximum pooling, is set to 0, drawn
            from torch's global generator, while the others are divided by `1 - dropout`: the objective and the next
            layer see what is left, and the slopes of the others are zero.
        backend: as in `linear_step_`. "native" has no leaky_relu in front of maximum pooling, no windows that overlap
            or have more than 256 places, no float16 and no float64; "triton" has no float64, and is never chosen by
            itself: no GPU has run its convolutions yet. Where the environment alone forces a backend that cannot run
            a convolution, the next that can does.

    Returns:
        `y` `[rows, out, h, w]`, channels-last; `sumsq` `[rows]` over all of a row; goodness and loss as ever.

    Raises:
        ValueError, TypeError: for an argument that does not fit, before anything is written.
    """
    step = _step_never_compiled if torch.compiler.is_compiling() else conv2d_pass
    options = ConvOptions(
        stride, padding, padding_mode, groups, pool, norm, eps, eps_mode, activation, input_norm, product_norm,
        compute_dtype, backend,
    )  # fmt: skip
    return step(
        x_pos, x_neg, weight, bias, optimizer, options, objective=any_objective(objective), outputs=outputs,
        sample_weight=sample_weight, is_positive=is_positive, labels=labels, input_sumsq=input_sumsq,
        skip_below=skip_below, batch_norm=batch_norm, dropout=dropout, only_checks=only_checks,
    )  # fmt: skip


def conv2d_pass(
    x_pos: Tensor,
    x_neg: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    optimizer: Optimizer | None,
    options: ConvOptions,
    *,
    objective: AnyObjective,
    outputs: OutputsOf,
    skip_below: float,
    batch_norm: nn.BatchNorm2d | None,
    only_checks: bool,
    dropout: float = 0.0,
    learns: bool = True,
    **of_rows: Any,
) -> StepResult:
    """`conv2d_step_`; without `learns` all but its update."""
    check.one_of("outputs", outputs, check.OUTPUTS)
    if outputs == "post":
        raise ValueError(
            "outputs='post' came to a convolution, which would have to run again after its update; accepted: 'pre', "
            "'none'"
        )
    layer, geometry = options.checked(weight, bias)
    check.head(objective, weight)
    check.batch_norm(batch_norm, weight, outputs, None, nn.BatchNorm2d)
    check.fraction("skip_below", skip_below)
    check.objective_alone(objective, skip_below, len(weight))
    reads_maps = _reads_maps(objective)
    if reads_maps and batch_norm is not None:
        raise ValueError(
            "objective reads 'activities' but came with batch_norm, which goes by moments; accepted: 'goodness', "
            "'moments', or no batch_norm"
        )
    _check_dropout(dropout, layer, geometry, batch_norm)
    check.optimizer_object(optimizer)
    check.tensor("x_pos", x_pos)
    rows_of = partial(maps_of, geometry=geometry)
    rows = checked_rows(weight, layer.compute_dtype, objective, x_pos, x_neg, rows_of=rows_of, **of_rows)
    if rows.x_neg.shape[1:] != x_pos.shape[1:]:
        raise ValueError(f"x_neg has maps of {tuple(rows.x_neg.shape[1:])}; accepted: {tuple(x_pos.shape[1:])}")
    in_front.check_fits(options.input_norm, x_pos, weight, layer.norm)
    in_front.check_enough(options.input_norm, x_pos, rows.x_neg)
    between.check_module(options.product_norm, weight, options.backend)
    _enough_between(options.product_norm, geometry, weight, x_pos, rows.x_neg)
    _enough_for_statistics(batch_norm, geometry, weight, x_pos, rows.x_neg)
    if is_transformed(x_pos, rows.x_neg, weight, bias):
        raise ValueError(
            "conv2d_step_ was called on tensors of a torch.func transform or with a forward-mode tangent; accepted: "
            "plain tensors, or conv2d_forward and goodness_loss"
        )
    learning = {
        "weight": weight,
        **({} if bias is None else {"bias": bias}),
        **others_of(objective, batch_norm, options.input_norm, options.product_norm),
    }
    update = update_of(optimizer, learning, rows) if learns else None
    for module in (batch_norm, options.input_norm, options.product_norm):
        if module is not None:
            check.writable_here(list(module.buffers()))
    chosen = backend_of(layer, geometry, None if update is None else update.rule, options.backend, reads_maps)
    n_pos = len(x_pos) if rows.is_positive is None else None
    if only_checks:
        nothing = weight.new_empty(0)
        return StepResult(None, nothing, nothing, nothing, n_pos, rows.is_positive)
    held = interrupts.hold()
    try:
        with torch.no_grad(), without_autocast(weight.device):
            x = torch.cat([x_pos, rows.x_neg]) if len(rows.x_neg) else x_pos
            normalised, standardising = in_front.standardising(options.input_norm, x, weight.dtype)
            of_product = rows_for(normalised, layer, geometry, rows.input_sumsq)
            maps, of_between = _forward(of_product, layer, geometry, options.product_norm, batch_norm, chosen)
            if dropout:
                maps = _dropped(maps, dropout)
            read = read_maps(maps, batch_norm)
            seen = maps.p.to(weight.dtype) if reads_maps else None
            judged, by_head = judge_maps(objective, read, rows, skip_below, seen)
            if update is None:
                # What an update would leave in the place of the activities.
                if read.behind is not None:
                    conv.hand_on_(maps, *read.behind.line())
            else:
                slopes, gradients = _slopes(read, judged, outputs == "pre")
                if dropout:
                    # What is dropped is zero, which a ReLU's gradient does not pass.
                    of_all = (slopes.first, slopes.second, slopes.of_place)
                    first, second, of_place = (None if of is None else of / (1 - dropout) for of in of_all)
                    slopes = slopes._replace(first=first, second=second, of_place=of_place)
                line = standardising if in_front.has_line(options.input_norm) else None
                if line is not None:
                    slopes = slopes._replace(by_place=True)
                    # The normalised maps give their memory back first.
                    del normalised, of_product
                    of_product = rows_for(line.standardised(x), layer, geometry, None)
                if of_between is None:
                    dw, db, dz = ops.conv2d_gradients_(of_product, layer, geometry, maps, slopes, chosen)
                else:
                    (dw, db, dz), further = between.gradients(of_product, layer, geometry, maps, slopes, of_between)
                    gradients |= further
                gradients |= {"weight": dw, "bias": db}
                if line is not None:
                    gradients |= in_front.through_line(line.module, dw, dz, of_product, layer, geometry)
                if by_head is not None:
                    gradients["objective.weight"] = by_head
                for name, part in zip(learning, update.parts, strict=True):
                    rules.step(update.rule, part.parameter, gradients[name], part.slot)
                torch.autograd.graph.increment_version(update.written())
                update.finish(optimizer)
            if batch_norm is not None and read.behind is not None:
                move(batch_norm, read.behind)
            if standardising is not None:
                move(standardising.module, standardising)
            if options.product_norm is not None and of_between is not None:
                move(options.product_norm, of_between)
    finally:
        interrupts.release(held)
    assert judged.goodness is not None
    y = maps.p if outputs == "pre" else None
    return StepResult(y, read.sumsq, judged.goodness, judged.loss, n_pos, rows.is_positive)


@never_compiled("a convolution's step writes by the caller's optimizer in its midst")
def _step_never_compiled(*tensors: Any, **options: Any) -> StepResult:
    return conv2d_pass(*tensors, **options)


class Read(NamedTuple):
    """What the objective reads of maps.

    Attributes:
        first, second: `[rows, channels]` sums over places, and of squares.
        sumsq: `[rows]` sums of all squares.
        behind: the batch normalisation that they are of, or None.
    """

    first: Tensor
    second: Tensor
    sumsq: Tensor
    places: int
    behind: StandardisedMoments | None


def _enough_for_statistics(
    batch_norm: nn.BatchNorm2d | None, geometry: Geometry, weight: Tensor, x: Tensor, *others: Tensor
) -> None:
    """Raises where a channel has a single number in the rows of these maps, which has no variance."""
    _, behind = geometry.maps_of(x.shape[2], x.shape[3], (weight.shape[2], weight.shape[3]))
    check.enough_for_statistics(batch_norm, len(x) + sum(map(len, others)), behind[0] * behind[1])


def _enough_between(norm: nn.BatchNorm2d | None, geometry: Geometry, weight: Tensor, *sides: Tensor) -> None:
    """Likewise of what the convolution makes of them."""
    height, width = sides[0].shape[2:]
    before, _ = geometry.maps_of(height, width, (weight.shape[2], weight.shape[3]))
    check.enough_for_statistics(norm, sum(map(len, sides)), before[0] * before[1], "product_norm")


def backend_of(layer: Layer, geometry: Geometry, rule: str | None, backend: str | None, by_places: bool = False) -> str:
    """The backend that runs a convolution; raises where the one asked for cannot."""
    weight = layer.weight
    request = select.Request(
        weight.device, weight.dtype, layer.compute_dtype, layer.activation, rule, geometry=geometry, by_places=by_places
    )
    return select.choose(request, backend)


def _check_dropout(dropout: float, layer: Layer, geometry: Geometry, batch_norm: nn.BatchNorm2d | None) -> None:
    check_share(dropout)
    if not dropout:
        return
    for name, value, is_wrong, accepted in (
        ("activation", layer.activation, layer.activation != "relu", "'relu', which a zero behind it tells"),
        ("pool", geometry.pool, geometry.pool == "average", "none, or that of maximum pooling"),
        ("batch_norm", "BatchNorm2d", batch_norm is not None, "None"),
    ):
        if is_wrong:
            raise ValueError(f"dropout={dropout} came with {name}={value!r}; accepted: {accepted}")


def check_share(dropout: object) -> None:
    """Raises ValueError unless `dropout` is a number from 0 to below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is not a number >= 0 and < 1")


def _dropped(maps: Maps, share: float) -> Maps:
    p = F.dropout(maps.p, share)
    wide = p.to(maps.first.dtype)
    return maps._replace(p=p, first=wide.sum((2, 3)), spread=wide.square().sum((2, 3)))


def read_maps(maps: Maps, batch_norm: nn.BatchNorm2d | None) -> Read:
    places = maps.p.shape[2] * maps.p.shape[3]
    if batch_norm is None:
        return Read(maps.first, maps.spread, maps.spread.sum(1), places, None)
    behind = standardise_moments(maps, batch_norm)
    return Read(behind.first, behind.second, behind.second.sum(1), places, behind)


def _reads_maps(objective: AnyObjective) -> bool:
    return isinstance(objective, GivenLoss) and objective.reads == "activities"


def judge_maps(
    objective: AnyObjective, read: Read, rows: Rows, skip_below: float, maps: Tensor | None
) -> tuple[Judged, Tensor | None]:
    """Loss, goodness and slopes by the moments `[rows, channels]` or `[rows, 1]` or by `maps`; a head's gradient."""
    first, second, sumsq, places, _ = read
    channels = first.shape[1]
    if isinstance(objective, ProjectionHead):
        assert rows.labels is not None
        mean = first / places
        judged, by_head = objective.judge(mean, mean.square().sum(1), rows.labels, rows.sample_weight, skip_below)
        slope = dense(Slopes(mean, judged.first, judged.second, judged.basis), mean) / places
        return Judged(judged.loss, judged.goodness, slope, None), by_head
    back = None
    if rows.is_positive is not None and objective.paired:
        order, n_pos = sides_in_order(rows.is_positive)
        first, second, sumsq, back = first[order], second[order], sumsq[order], order.argsort()
        rows = rows._replace(x_pos=rows.x_pos[:n_pos], x_neg=rows.x_pos[n_pos:], is_positive=None)
    goal = (objective if isinstance(objective, Objective) else DEFAULT_OBJECTIVE).goal(skip_below)
    judged = judged_of(objective, first, rows, goal, sumsq, second=second, places=places, maps=maps)
    goodness = judged.goodness
    if goodness is None:
        goodness = objective.goodness_of(sumsq, channels * places)
    slopes = [None if slope is None else by_unit(slope, channels) for slope in (judged.first, judged.second)]
    if back is not None:
        goodness, slopes = goodness[back], [None if slope is None else slope[back] for slope in slopes]
    return Judged(judged.loss, goodness, *slopes), None


def _slopes(read: Read, judged: Judged, hands_on: bool) -> tuple[MapSlopes, dict[str, Tensor]]:
    """The slopes of activities, by their moments or by themselves, and a batch normalisation's gradients by name."""
    if judged.first is not None and judged.first.dim() == 4:
        return MapSlopes(None, None, of_place=judged.first), {}
    if read.behind is None:
        return MapSlopes(judged.first, judged.second), {}
    offset, gain, by_weight, by_bias = through_moments(read.behind, judged.first, judged.second)
    line = read.behind.line() if hands_on else (None, None)
    return MapSlopes(offset, gain / 2, *line), {"batch_norm.weight": by_weight, "batch_norm.bias": by_bias}


def update_of(optimizer: Optimizer | None, learning: dict[str, Tensor], rows: Rows) -> optim.Plan:
    """How the parameters will be updated; raises for what cannot be."""
    for name, parameter in learning.items():
        check.trainable(name, parameter)
        check.writable(name, parameter)
    weight, bias = learning["weight"], learning.get("bias")
    others = {name: parameter for name, parameter in learning.items() if name not in ("weight", "bias")}
    check.apart(weight, bias, None, rows.x_pos, rows.x_neg, None, others)
    # State that is made in inference mode could not be written outside of it.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        update = optim.plan(optimizer, weight, bias, others)
    check.writable_here(update.written())
    return update
