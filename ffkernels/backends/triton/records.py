"""What the kernels take: records, which both sides read by name.

They cost the host no more than each member as an argument of its own does. What a launch has no use for is a record
without members, `Pull()`: Triton 3.6 cannot ask whether a record is None. A stride of 1 makes a kernel of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """The rows of both sides, `[n_pos, in]` and `[total - n_pos, in]`.

    `is_positive`: `[total]` bytes, or None: the first `n_pos` rows are positive.
    """

    x_pos: Tensor
    x_neg: Tensor
    is_positive: Tensor | None
    n_pos: int
    total: int
    x_pos_row: int
    x_neg_row: int
    x_col: int


class Linear(NamedTuple):
    """A layer as the forward reads it."""

    weight: Tensor
    weight_row: int
    weight_col: int
    eps: float
    bias: Tensor | None
    bias_stride: int


class Shared(NamedTuple):
    """`product` `[n_pos, out]`: what the columns from `columns` on give to the rows of either side."""

    product: Tensor | None = None
    columns: int | None = None


class Forwarded(NamedTuple):
    """What the forward writes.

    Attributes:
        y: `[rows, out]` activities, or None.
        kept: `[rows, out]` what the update needs of them where that is something else, or None.
        row_scale: `[rows]`, or None.
        partials: `[column blocks, rows]` sums of squares of the activities.
        unit_sums: `[row blocks, out]` sums of the positive rows' activities, or None.
    """

    y: Tensor | None
    y_row: int
    y_col: int
    kept: Tensor | None
    row_scale: Tensor | None
    partials: Tensor
    unit_sums: Tensor | None


class ClassSums(NamedTuple):
    """`[column blocks, slots, rows]` sums of activities or their squares over groups of units, by tile."""

    sums: Tensor | None = None
    groups: int | None = None


class Kept(NamedTuple):
    """`[rows, out]` what a forward has kept, `y` or `z`; and `[rows]` the scale of the rows, or None."""

    kept: Tensor
    kept_row: int
    kept_col: int
    row_scale: Tensor | None


class Terms(NamedTuple):
    """An objective: `coefficient.row_terms`.

    Attributes:
        partials: `[n_partials, rows]` the activities' sums of squares.
        n_positive: 0-dim, overrides the shares by the counts of both sides.
        sample_weight: `[rows or pairs]`.
        threshold: 0-dim or `[rows]`, overrides both numbers.
        logit_scale: 1/temperature or alpha, with a minus where positives are minimised.
        share_pos, share_neg: one over the number of rows that the side's losses are averaged over.
    """

    partials: Tensor
    n_partials: int
    n_positive: Tensor | None
    sample_weight: Tensor | None
    threshold: Tensor | None
    threshold_pos: float
    threshold_neg: float
    logit_scale: float
    share_pos: float
    share_neg: float
    skip_below: float


class Written(NamedTuple):
    """What an objective leaves: `[rows]` sums of squares, and the loss, 0-dim or one for each program."""

    sumsq: Tensor
    loss: Tensor


class Coefficients(NamedTuple):
    """What a launch of its own has made.

    Attributes:
        coefficient: `[rows]`, of every row or of those in the list.
        listed: `[rows]` indices of rows, of which the first `n_listed` count; or None.
        row_losses: `[n_row_losses]` parts of the loss that nobody has added up yet, or None.
    """

    coefficient: Tensor | None = None
    listed: Tensor | None = None
    n_listed: Tensor | None = None
    row_losses: Tensor | None = None
    n_row_losses: int | None = None


class Slope(NamedTuple):
    """`[rows, groups]` slopes of one order; `groups` None: one for each unit, or all in one where `slope_col` is 0."""

    slope: Tensor | None = None
    slope_row: int | None = None
    slope_col: int | None = None
    groups: int | None = None


class Basis(NamedTuple):
    """`[groups, out]`: the first slopes are the product of `Slope.slope` `[rows, groups]` and it."""

    basis: Tensor | None = None
    basis_row: int | None = None
    basis_col: int | None = None
    groups: int | None = None


class Pull(NamedTuple):
    """Peer normalisation: `[2, out]` each row's pull and that of all, `[splits, in]` what it is multiplied by.

    Gated, there are no sums: the pull joins the rows' own product.
    """

    pull: Tensor | None = None
    input_sums: Tensor | None = None
    input_splits: int | None = None


class Sgd(NamedTuple):
    """The numbers of SGD's rule. No flag needs a kernel of its own: each is a number that makes a term vanish.

    `sign` is -1 under `maximize`; `lr_pointer` overrides `lr`.
    """

    lr: float
    lr_pointer: Tensor | None
    sign: float
    decay: float
    keep: float
    take: float
    gradient_share: float
    buffer_share: float
    shrink: float


class Adam(NamedTuple):
    """The numbers of Adam's rule; a correction is `1 - beta^step`, or log(beta) where the step is on the device."""

    lr: float
    lr_pointer: Tensor | None
    step_pointer: Tensor | None
    sign: float
    decay: float
    shrink: float
    take1: float
    keep2: float
    take2: float
    eps: float
    correction1: float
    correction2: float


class Parameter(NamedTuple):
    """A rule's numbers; a matrix, or a vector with `col` 1; its state; and where it goes in a narrower dtype."""

    # Before the pointers: the other way round ptxas needs up to 3% more instructions for sm_90.
    numbers: Sgd | Adam | None = None
    parameter: Tensor | None = None
    row: int | None = None
    col: int | None = None
    state0: Tensor | None = None
    state0_row: int | None = None
    state0_col: int | None = None
    state1: Tensor | None = None
    state1_row: int | None = None
    state1_col: int | None = None
    rounded: Tensor | None = None


class Parts(NamedTuple):
    """What each split of the batch gives: `[splits, out, in]`, `[splits, out]` or None, `[splits]` or None."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    loss: Tensor | None = None


class Shape(NamedTuple):
    """What a convolution's kernels are compiled for: divisions by these are most of what they reckon beside products.

    Attributes:
        height, width: of the maps that it reads.
        ins, outs: channels of a group.
        before_height, before_width: in front of the pool; pooled_height, pooled_width: behind it.
    """

    height: int
    width: int
    ins: int
    outs: int
    groups: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    before_height: int
    before_width: int
    pooled_height: int
    pooled_width: int
    pool: str
    pool_height: int
    pool_width: int
    pool_stride_y: int
    pool_stride_x: int


class Images(NamedTuple):
    """The joint batch of a convolution: `[total, height, width, in]`; `[total]` factors of its products, or None."""

    x: Tensor
    scale: Tensor | None
    total: int


class Kernels(NamedTuple):
    """A convolution's weight `[out, taps * in of a group]`, bias `[out]` or None, and the pivot of moments or None."""

    weight: Tensor
    bias: Tensor | None
    pivot: Tensor | None


class Mapped(NamedTuple):
    """What a convolution's forward writes, maps with their channels last.

    Attributes:
        p: `[total, h, w, out]` activities behind the pool, or None: `before` alone.
        where: of the same shape, the place that won; None but for maximum pooling.
        before: `[total, h', w', out]` in front of activation and pool, or None.
        first, spread: `[parts, total, out]` sums over a part's places of `p - pivot`, and of its squares.
    """

    p: Tensor | None
    where: Tensor | None
    before: Tensor | None
    first: Tensor | None
    spread: Tensor | None


class KeptMaps(NamedTuple):
    """What a forward has left for the update, as `Mapped`; or `[total, h', w', out]` the very gradient `dz`."""

    p: Tensor | None = None
    where: Tensor | None = None
    before: Tensor | None = None
    pivot: Tensor | None = None
    dz: Tensor | None = None
