"""The border between the public functions and the backends: what a layer step is made of, as records.

Each record and each name for one of several choices is defined here and nowhere else. The operators' schemas (`ops`)
and the C structures of the compiled library (`backends.native.records`) follow from these definitions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["l2", "rms", "none"]
EpsMode = Literal["add", "clamp", "inside"]
Activation = Literal["relu", "leaky_relu", "gelu", "silu", "identity"]
# Of float32 products: "high" permits three products of bfloat16 numbers in the place of one.
Precision = Literal["highest", "high"]
OutputsOf = Literal["post", "pre", "none"]
PaddingMode = Literal["zeros", "reflect"]
Pool = Literal["none", "max", "average"]
# Of a class group also the mean activity.
Goodness = Literal["mean", "sum", "norm", "activity"]
SideLoss = Literal["logistic", "symba", "swish"]
ClassLoss = Literal["cross_entropy", "pvn", "cwc"]
Loss = Literal["logistic", "symba", "swish", "cross_entropy", "pvn", "cwc"]
Reduction = Literal["mean", "sum_of_means"]
# "grad" writes the gradient to the state instead of the parameter.
Rule = Literal["grad", "sgd", "adam"]

# What a tensor is, and whether a step writes it.
Matrix = Annotated[Tensor, "matrix"]
Vector = Annotated[Tensor, "vector"]
Mask = Annotated[Tensor, "mask"]
Labels = Annotated[Tensor, "labels"]
# `[rows, channels, height, width]`, channels-last.
AnyMaps = Annotated[Tensor, "maps"]
WrittenMaps = Annotated[Tensor, "maps", "written"]
# Of each window of a pool, which of its places won, in bytes.
Winners = Annotated[Tensor, "winners"]
WrittenMatrix = Annotated[Tensor, "matrix", "written"]
WrittenVector = Annotated[Tensor, "vector", "written"]


class Rows(NamedTuple):
    """The joint batch: the rows of `x_pos`, then those of `x_neg`.

    Attributes:
        x_pos, x_neg: `[n_pos, in]`, `[n_neg, in]`, un-normalised. With `is_positive`, `x_pos` is the joint batch and
            `x_neg` has no rows.
        is_positive: `[rows]` bool, or None: the first `n_pos` rows are positive.
        input_sumsq: `[rows]` sums of squares of the rows where they are known.
        sample_weight: `[rows]` factors of the rows' losses (`[pairs]` for pair losses), or None.
        product: `[n_pos, out]`, `W x` of either side without the label field, where it is known.
        label_field: `x_neg` is `x_pos` outside so many first columns; 0: not known.
        labels: `[rows]` int64 classes, where the objective has class groups; `x_neg` has no rows then.
    """

    x_pos: Matrix
    x_neg: Matrix
    is_positive: Mask | None = None
    input_sumsq: Vector | None = None
    sample_weight: Vector | None = None
    product: Matrix | None = None
    label_field: int = 0
    labels: Labels | None = None


class Layer(NamedTuple):
    """How rows turn into activities: `y = act(r W x + b)` with `r` the row scale of norm and eps.

    Attributes:
        weight, bias: `[out, in]`, `[out]` or None. A step writes them; in a forward pass after one, `weight` may be
            what the step has left in `Outputs.rounded`.
        compute_dtype: the operands of products are rounded to it.
        precision: of float32 products; "highest" beside other dtypes.
    """

    weight: WrittenMatrix
    bias: WrittenVector | None
    norm: Norm
    eps: float
    eps_mode: EpsMode
    activation: Activation
    compute_dtype: torch.dtype
    precision: Precision = "highest"


class Geometry(NamedTuple):
    """What a convolution does besides its sums: its steps and edges, and the pooling behind its activation.

    Each pair is that of rows and columns of a map. Kernels are not dilated, and a window that an edge cuts is left out.

    Attributes:
        groups: into how many groups its input and output channels are divided.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    padding_mode: PaddingMode = "zeros"
    groups: int = 1
    pool: Pool = "none"
    pool_size: tuple[int, int] = (1, 1)
    pool_stride: tuple[int, int] = (1, 1)

    def maps_of(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The sizes of what a map becomes: before pooling, and behind it; 0 or less where nothing is left."""
        sides = zip((height, width), kernel, self.stride, self.padding, strict=True)
        before = tuple([(size + 2 * pad - of) // step + 1 for size, of, step, pad in sides])
        pools = zip(before, self.pool_size, self.pool_stride, strict=True)
        behind = tuple([(size - of) // step + 1 for size, of, step in pools])
        return before, behind  # type: ignore[return-value]


class MapRows(NamedTuple):
    """The joint batch of a convolution, as its product takes it.

    Attributes:
        x: `[rows, in, H, W]` in the compute dtype; where padding reflects, with it.
        scale: `[rows]` what the product is multiplied by before its bias, or None.
    """

    x: AnyMaps
    scale: Vector | None


class Maps(NamedTuple):
    """What a convolutional layer leaves; what nobody needs has no elements.

    Attributes:
        p: `[rows, channels, h, w]` activities behind the pool, in the compute dtype.
        first, spread: `[rows, channels]` sums over places of `p - pivot`, and of its squares, in the weight's dtype.
        pivot: `[channels]` a number like the others for each channel, so that squares keep the digits of a variance.
        where: the winners of maximum pooling, as the backend that found them reads them.
        before: `[rows, channels, h', w']` in front of the pool: what the activation's slope is read from, or memory.
    """

    p: WrittenMaps
    first: Matrix
    spread: Matrix
    pivot: Vector
    where: Tensor
    before: WrittenMaps


class MapSlopes(NamedTuple):
    """What a convolution's update takes in place of an objective:
    `dLoss/dp = scale of_place + first + 2 second (p - pivot)`.

    Attributes:
        first, second: `[rows, channels]` or `[rows, 1]`, or None for zero.
        gain, shift: `[channels]`; with them `gain (p - pivot) + shift` is written over `p`.
        by_place: whether the gradient in front of the activation is summed over rows too; the weight's is then not
            rounded to the dtype of the products' operands.
        of_place: `[rows, channels, h, w]` what comes to each place, or None for zero.
        scale: `[channels]` what that is multiplied by, or None for one.
    """

    first: Matrix | None
    second: Matrix | None
    gain: Vector | None = None
    shift: Vector | None = None
    by_place: bool = False
    of_place: AnyMaps | None = None
    scale: Vector | None = None


class MapGradients(NamedTuple):
    """What a convolution's update gives, in the weight's dtype.

    Attributes:
        weight, bias: of their shapes.
        by_place: `[1, channels, h', w']` the gradient in front of the activation, as the weight's product read it,
            summed over rows; without elements unless it was asked for.
    """

    weight: Tensor
    bias: Tensor
    by_place: Tensor


class Goal(NamedTuple):
    """How sums of squares turn into a loss and a coefficient for each row: the fields of `Objective`, as numbers.

    Attributes:
        threshold: 0-dim or `[rows]`; overrides both numbers. None: they count.
        skip_below: rows whose loss has a slope below this fraction of that of a row far on the wrong side are left out
            of the update.
        classes: how many class groups the units are divided into, for the losses of classes; 0: none.
    """

    goodness: Goodness
    threshold_pos: float
    threshold_neg: float
    threshold: Vector | None
    loss: Loss
    maximize: bool
    reduction: Reduction
    temperature: float
    alpha: float
    skip_below: float
    classes: int = 0
    label_smoothing: float = 0.0


class PeerPull(NamedTuple):
    """Peer normalisation: the running mean `[out]` is moved, its pull added to the gradient. None: there is none."""

    mean: WrittenVector | None
    strength: float
    momentum: float
    gated: bool


class Numbers(NamedTuple):
    """The numbers of an optimizer's rule, by name; each rule reads its own. Yes and no are 1 and 0.

    Attributes:
        decoupled: whether the decay shrinks the parameter beside the gradient, by `lr decay`.
        first_step: whether SGD's momentum buffer begins as the gradient.
    """

    lr: float = 0.0
    decay: float = 0.0
    decoupled: float = 0.0
    maximize: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: float = 0.0
    first_step: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0


class Slot(NamedTuple):
    """One parameter's part of an update.

    Attributes:
        state: the tensors of its shape that the rule writes: "grad" the gradient, "sgd" the momentum buffer or none,
            "adam" exp_avg, exp_avg_sq and, 0-dim, the step count.
        numbers: the rule's. Compiled code leaves it empty, and brings them as the last tensor of `state`: they would
            become constants otherwise.
        lr: the learning rate as a tensor, which overrides the number.
    """

    state: list[Tensor]
    numbers: Numbers | tuple[()]
    lr: Tensor | None = None


class Update(NamedTuple):
    """How the gradient turns into new parameters; without a bias its slot is empty."""

    rule: Rule
    weight: Slot
    bias: Slot


class Outputs(NamedTuple):
    """What a step writes besides parameters and their state.

    Attributes:
        y: `[rows, out]` activities before the update, in the compute dtype, or None.
        sumsq: `[rows]` their sums of squares.
        loss_out: 0-dim.
        rounded: `[out, in]` the new weight in the compute dtype, or None; never under the rule "grad".
        goodness_out, y_after, sumsq_after: the goodness, `[rows]` or `[rows, classes]`, and activities with the updated
            parameters and their sums of squares `[rows]`, or None; those of rows only for backends of
            `select.HANDS_OUT_ALL`, which may lie in the place of sums that are nobody's.
        product_out: `[n_pos, out]` what `Rows.product` is for these rows, or None; left by a forward pass alone, of a
            backend of `select.LEAVES_PRODUCT`.
    """

    y: WrittenMatrix | None
    sumsq: WrittenVector
    loss_out: WrittenVector
    rounded: WrittenMatrix | None = None
    goodness_out: WrittenVector | None = None
    y_after: WrittenMatrix | None = None
    sumsq_after: WrittenVector | None = None
    product_out: WrittenMatrix | None = None


class LayerStep(NamedTuple):
    """One of the steps that layers on top of each other take; `prepared` as `select.PREPARES` says, or None."""

    layer: Layer
    goal: Goal
    pull: PeerPull
    update: Update
    outputs: Outputs
    prepared: Any


class Slopes(NamedTuple):
    """What an update takes in place of an objective: `dLoss/dy = first + 2 second y`, for activities `y`.

    Each slope is `[rows, 1]`, `[rows, groups]` (groups are consecutive units, of sizes that differ by one at most, the
    larger ones first) or `[rows, out]`; None is zero.

    Attributes:
        activity: `[rows, out]` in the weight's dtype: `y`, or `z` where the activation's slope needs it (gelu, silu).
        basis: `[groups, out]`, or None: the first slopes are then the product of `first` `[rows, groups]` and it.
    """

    activity: Matrix
    first: Matrix | None
    second: Matrix | None
    basis: Matrix | None = None
