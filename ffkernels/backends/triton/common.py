"""What the kernels share: normalisation, activation, and the rounding of operands."""

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)
INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
EXPONENT_BITS = tl.constexpr(0x7F800000)
TWICE_EXPONENT_BIAS = tl.constexpr(254 << 23)


@triton.jit
def joint_rows(i, rows):
    """Pointers to the first elements of rows `i` of the joint batch: positive rows, then negative ones."""
    i = i.to(tl.int64)
    return tl.where(i < rows.n_pos, rows.x_pos + i * rows.x_pos_row, rows.x_neg + (i - rows.n_pos) * rows.x_neg_row)


@triton.jit
def rows_of(activities, i, here, j, out_features):
    """`[len(i), len(j)]` what the forward has kept of rows `i` and units `j`: `records.Kept`."""
    at = activities.kept + i.to(tl.int64)[:, None] * activities.kept_row + j.to(tl.int64)[None, :] * activities.kept_col
    return tl.load(at, mask=here[:, None] & (j < out_features)[None, :], other=0.0)


@triton.jit
def group_of(j, units, groups):
    """Which group has unit `j`: consecutive units, of sizes that differ by one at most, the larger ones first."""
    size = units // groups
    larger = units % groups
    edge = larger * (size + 1)
    return tl.where(j < edge, j // (size + 1), larger + (j - edge) // size)


@triton.jit
def borders_of(group, units, groups):
    """The first unit of a group, and the first behind it."""
    size = units // groups
    larger = units % groups
    begin = group * size + tl.minimum(group, larger)
    return begin, begin + size + tl.where(group < larger, 1, 0)


@triton.jit
def scale_of_rows(sumsq, width, eps, NORM: tl.constexpr, EPS_MODE: tl.constexpr):
    """`normalisation.row_scale`: the factors that normalise rows with these sums of squares; 0 for a row of zeros."""
    square = sumsq / width if NORM == "rms" else sumsq
    if EPS_MODE == "inside":
        length = tl.sqrt_rn(square + eps)
    elif EPS_MODE == "clamp":
        length = tl.sqrt_rn(square)
        length = tl.where(length < eps, eps, length)
    else:
        length = tl.sqrt_rn(square) + eps
    return tl.where(sumsq == 0, 0.0, 1.0 / length)


@triton.jit
def sigmoid(t):
    """1 / (1 + e^-t), as exact for t far below zero as above."""
    e = tl.exp(-tl.abs(t))
    return tl.where(t < 0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z). Comparisons are such that NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z < 0, LEAKY_SLOPE * z, z)
    elif ACTIVATION == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * INV_SQRT_2))
    elif ACTIVATION == "silu":
        y = z * sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = z
    return y


@triton.jit
def gated(kept, ACTIVATION: tl.constexpr):
    """`y act'(z)`, from what the forward kept: `z` for gelu and silu, whose slope needs it, else `y`."""
    if ACTIVATION == "leaky_relu":
        product = tl.where(kept < 0, LEAKY_SLOPE * kept, kept)
    elif ACTIVATION == "gelu" or ACTIVATION == "silu":
        product = activate(kept, ACTIVATION) * slope_of(kept, ACTIVATION)
    else:
        product = kept
    return product


@triton.jit
def slope_of(kept, ACTIVATION: tl.constexpr):
    """`act'(z)`, from what the forward kept."""
    if ACTIVATION == "relu":
        slope = tl.where(kept > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        slope = tl.where(kept > 0, 1.0, LEAKY_SLOPE)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(kept * INV_SQRT_2)) + kept * tl.exp(-0.5 * kept * kept) * INV_SQRT_2PI
    elif ACTIVATION == "silu":
        slope = sigmoid(kept) * (1.0 + kept * sigmoid(-kept))
    else:
        slope = tl.full(kept.shape, 1.0, tl.float32)
    return slope


@triton.jit
def operand(values, COMPUTE: tl.constexpr, WIDEN: tl.constexpr):
    """`values` rounded as a product takes them; WIDEN: as float32 again, for Triton's interpreter, whose bfloat16
    product is wrong."""
    rounded = values.to(COMPUTE)
    if WIDEN:
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def power_of_two_below(value):
    """The largest power of two up to `value` >= 0, and its inverse; 1 and 1 where float32 cannot hold one of them."""
    bits = value.to(tl.int32, bitcast=True) & EXPONENT_BITS
    inverse = TWICE_EXPONENT_BIAS - bits
    usable = (bits > 0) & (inverse > 0)
    power = tl.where(usable, bits.to(tl.float32, bitcast=True), 1.0)
    return power, tl.where(usable, inverse.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def grouped(program, rows_of_tiles, columns_of_tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile; GROUP rows of tiles are walked through together, to be read from L2."""
    group = program // (GROUP * columns_of_tiles)
    first = group * GROUP
    height = tl.minimum(rows_of_tiles - first, GROUP)
    within = program % (GROUP * columns_of_tiles)
    return first + within % height, within // height
