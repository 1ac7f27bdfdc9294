"""From the rows' sums of squares to their loss and to the coefficient that each has in the update."""

import triton
import triton.language as tl

from .common import sigmoid


@triton.jit
def softplus(t):
    """log(1 + e^t), exact to rounding at any t: log1p by Kahan's quotient, in which the error of `1 + e` cancels."""
    e = tl.exp(-tl.abs(t))
    one_more = 1.0 + e
    log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / (one_more - 1.0)))
    return tl.where(t < 0, 0.0, t) + log1p


@triton.jit
def value_and_slope(t, LOSS: tl.constexpr):
    """A loss of the logit `t` and its slope: `objective.LOSSES`."""
    s = sigmoid(t)
    if LOSS == "swish":
        value = t * s
        slope = s * (1.0 + t * sigmoid(-t))
    else:
        tl.static_assert(LOSS == "logistic" or LOSS == "symba")
        value = softplus(t)
        slope = s
    return value, slope


@triton.jit
def sum_of_partials(partials, n_partials, i, here, rows, PARTIALS: tl.constexpr):
    """`[len(i)]` finished sums of squares, added in a fixed order: at once where PARTIALS (a power of two) holds
    all the column blocks, one after the other where it is 0."""
    if PARTIALS == 0:
        total = tl.zeros(i.shape, tl.float32)
        for block in range(n_partials):
            total += tl.load(partials + tl.cast(block, tl.int64) * rows + i, mask=here, other=0.0)
    else:
        block = tl.arange(0, PARTIALS)[:, None]
        at = partials + block.to(tl.int64) * rows + i[None, :]
        total = tl.sum(tl.load(at, mask=(block < n_partials) & here[None, :], other=0.0), axis=0)
    return total


@triton.jit
def goodness_of(sumsq, width, GOODNESS: tl.constexpr):
    """`Objective.goodness_of`."""
    if GOODNESS == "mean":
        goodness = sumsq / width
    elif GOODNESS == "norm":
        goodness = tl.sqrt_rn(sumsq)
    else:
        tl.static_assert(GOODNESS == "sum")
        goodness = sumsq
    return goodness


@triton.jit
def positive_rows(i, here, rows):
    """Which rows `i` of the joint batch there are and are positive."""
    if rows.is_positive is None:
        positive = i < rows.n_pos
    else:
        positive = tl.load(rows.is_positive + i, mask=here, other=0) != 0
    return here & positive


@triton.jit
def row_terms(
    i, here, rows, terms, width,  # rows of the joint batch, and which of them there are
    GOODNESS: tl.constexpr, LOSS: tl.constexpr, THRESHOLD_PER_ROW: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Sums of squares, coefficients `c = 2 dLoss/dq` and losses of rows `i`: `Objective.terms`.

    Rows whose loss is less steep than `skip_below` get a coefficient of zero.
    """
    positive = positive_rows(i, here, rows)
    q = sum_of_partials(terms.partials, terms.n_partials, i, here, rows.total, PARTIALS)
    goodness = goodness_of(q, width, GOODNESS)
    share_pos = terms.share_pos
    share_neg = terms.share_neg
    if LOSS == "logistic":
        if terms.threshold is None:
            theta = tl.where(positive, terms.threshold_pos, terms.threshold_neg)
        elif THRESHOLD_PER_ROW:
            theta = tl.load(terms.threshold + i, mask=here, other=0.0).to(tl.float32)
        else:
            theta = tl.load(terms.threshold).to(tl.float32)
        if terms.n_positive is not None:
            count = tl.load(terms.n_positive).to(tl.float32)
            share_pos = 1.0 / tl.maximum(count, 1.0)
            share_neg = 1.0 / tl.maximum(rows.total - count, 1.0)
        slope_of_logit = tl.where(positive, -terms.logit_scale, terms.logit_scale)
        logit = slope_of_logit * (goodness - theta)
        share = tl.where(positive, share_pos, share_neg)
        entry = i
        counted = here
    else:
        # Row i of one side and row i of the other share a logit, and have opposite slopes.
        partner = tl.where(positive, i + rows.n_pos, i - rows.n_pos)
        q_of_partner = sum_of_partials(terms.partials, terms.n_partials, partner, here, rows.total, PARTIALS)
        other = goodness_of(q_of_partner, width, GOODNESS)
        slope_of_logit = tl.where(positive, -terms.logit_scale, terms.logit_scale)
        logit = slope_of_logit * (goodness - other)
        share = tl.where(positive, share_pos, share_neg)
        entry = tl.where(positive, i, partner)
        counted = positive
    if terms.sample_weight is not None:
        share *= tl.load(terms.sample_weight + entry, mask=here, other=0.0)
    value, slope = value_and_slope(logit, LOSS)
    slope = tl.where(tl.abs(slope) < terms.skip_below, 0.0, slope)
    c = share * slope_of_logit * slope
    if GOODNESS == "norm":
        # The slope of a root at zero is infinite, but such a row has no activity to move.
        c = tl.where(q > 0, c / goodness, 0.0)
    elif GOODNESS == "mean":
        c *= 2.0 / width
    else:
        c *= 2.0
    return q, tl.where(here, c, 0.0), tl.where(counted, share * value, 0.0)


@triton.jit
def in_doubt_so_far(i, here, c, kept, made):
    """Lists the rows `i` whose coefficient is not exactly zero behind the `kept` ones, and says how many there are."""
    in_doubt = (c != 0) & here
    place = kept + tl.cumsum(in_doubt.to(tl.int32), axis=0) - 1
    tl.store(made.listed + place, i, mask=in_doubt)
    tl.store(made.coefficient + place, c, mask=in_doubt)
    return kept + tl.sum(in_doubt.to(tl.int32), axis=0)


@triton.jit
def coefficient_kernel(
    rows, terms, width, written, made,  # `records.Batch`, `Terms`; written: `Written`, `Coefficients`
    GOODNESS: tl.constexpr, LOSS: tl.constexpr, THRESHOLD_PER_ROW: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows' coefficients, for the update to load: a block of rows in each program, or a list.

    A row whose loss is saturated has a coefficient of exactly zero in float32, and leaving it out changes nothing. One
    program lists the others in order, and their number.
    """
    kept = 0
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, rows.total, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < rows.total
        q, c, losses = row_terms(i, here, rows, terms, width, GOODNESS, LOSS, THRESHOLD_PER_ROW, PARTIALS)
        tl.store(written.sumsq + i, q, mask=here)
        loss += losses
        if made.listed is None:
            tl.store(made.coefficient + i, c, mask=here)
        else:
            kept = in_doubt_so_far(i, here, c, kept, made)
    if made.listed is not None:
        tl.store(made.n_listed, kept)
    tl.store(written.loss + tl.program_id(0), tl.sum(loss, axis=0))
