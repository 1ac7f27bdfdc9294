// Both products of a layer against float64: the forward pass and the gradient, of rows that share
// them and of others, in float32, at precision "high" and in bfloat16, each within what its own
// rounding may do, and the same bits on several threads. Then what lies at the ends of float32.
#include "../cpu/kernels.h"
#include "../cpu/rows.h"
#include "check.h"

namespace {

using std::vector;

struct Products {
    const char* name;
    ffk::Dtype dtype;
    ffk::Precision precision;
    bool rounds;      // whether operands are bfloat16 numbers
    double per_term;  // of what a product is made of, relative to it
};
// Parts of a number are within 2^-17 of it; the product of two rests, 2^-16, is left out.
const double SPLIT = 0x1p-15;
const Products FLOAT = {"float32", ffk::FLOAT32, ffk::PRECISION_HIGHEST, false, 0},
               HIGH = {"float32 at high", ffk::FLOAT32, ffk::PRECISION_HIGH, false,
                       ffk::FFK_SET.splits_float32 ? SPLIT : 0},
               NARROW = {"bfloat16", ffk::BFLOAT16, ffk::PRECISION_HIGHEST, true, 0};
// How much a sum's rounding may be off, in halves of float32's last place: units that round to odd
// have the whole of it.
const double SUMS = 2;

struct Shape {
    int64_t pairs, copies, in, out;

    int64_t rows() const { return pairs * (1 + copies); }
};

// Rows, a weight and slopes `[rows, out]`. Copies differ from the first rows in three columns.
struct Layer {
    Shape shape;
    vector<float> x, weight, slopes;

    Layer(Shape s, float scale_of_slopes)
        : shape(s),
          x(check::numbers(s.rows() * s.in)),
          weight(check::numbers(s.out * s.in)),
          slopes(check::numbers(s.rows() * s.out, scale_of_slopes)) {
        for (int64_t i = s.pairs; i < s.rows(); i++)
            for (int64_t k = 0; k < s.in; k++)
                if (k < 7 || k >= 10) x[size_t(i * s.in + k)] = x[size_t(i % s.pairs * s.in + k)];
    }

    ffk::Call call(const Products& products, int threads) {
        const auto& [pairs, copies, in, out] = shape;
        ffk::Call call{};
        call.rows.x_pos = {x.data(), pairs, in, in, ffk::FLOAT32};
        call.rows.x_neg = {x.data() + pairs * in, pairs * copies, in, in, ffk::FLOAT32};
        call.layer.weight = {weight.data(), out, in, in, ffk::FLOAT32};
        call.layer.norm = ffk::NORM_NONE, call.layer.activation = ffk::IDENTITY;
        call.layer.compute_dtype = products.dtype, call.layer.precision = products.precision;
        call.threads = threads;
        return call;
    }

    // y = x W^T `[rows, out]`.
    vector<float> forward(const Products& products, int threads = 1) {
        vector<float> y(size_t(shape.rows() * shape.out)), sumsq(size_t(shape.rows()));
        ffk::Call it = call(products, threads);
        it.outputs.y = {y.data(), shape.rows(), shape.out, shape.out, ffk::FLOAT32};
        it.outputs.sumsq = sumsq.data();
        check::same(ffk::FFK_SET.linear_forward(it), 0, "status of a forward pass");
        return y;
    }

    // dW = slopes^T x `[out, in]`.
    vector<float> gradient(const Products& products, int threads = 1) {
        vector<float> dw(weight.size(), NAN), y(slopes.size());
        ffk::Call it = call(products, threads);
        it.update.rule = ffk::GRAD, it.update.weight.state[0] = dw.data();
        it.slopes.activity = {y.data(), shape.rows(), shape.out, shape.out, ffk::FLOAT32};
        it.slopes.first = {slopes.data(), shape.rows(), shape.out, shape.out, ffk::FLOAT32};
        check::same(ffk::FFK_SET.linear_update(it), 0, "status of an update");
        return dw;
    }
};

// `[m, n]` sums over k of a[m, k] b[n, k], where both have their own strides, and what their terms
// are worth.
struct Exact {
    vector<double> sums, sizes;

    Exact(const vector<float>& a, int64_t m, int64_t a_row, int64_t a_term, const vector<float>& b,
          int64_t n, int64_t b_row, int64_t b_term, int64_t terms, bool rounds) {
        const auto operand = [&](float v) { return rounds ? check::nearest_bfloat16(v) : v; };
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                double sum = 0, size = 0;
                for (int64_t k = 0; k < terms; k++) {
                    const double term = double(operand(a[size_t(i * a_row + k * a_term)]))
                                        * operand(b[size_t(j * b_row + k * b_term)]);
                    sum += term, size += std::fabs(term);
                }
                sums.push_back(sum), sizes.push_back(size);
            }
    }
};

Exact exact_forward(const Layer& layer, bool rounds) {
    const auto& [pairs, copies, in, out] = layer.shape;
    return {layer.x, layer.shape.rows(), in, 1, layer.weight, out, in, 1, in, rounds};
}
// Of copies, slopes are added up before they are rounded: `rounds` is for one group alone.
Exact exact_gradient(const Layer& layer, bool rounds) {
    const auto& [pairs, copies, in, out] = layer.shape;
    return {layer.slopes, out, 1, out, layer.x, in, 1, in, layer.shape.rows(), rounds};
}

// How far results are from the sums, in the Frobenius norm and relative to it.
double error(const vector<float>& found, const Exact& exact) {
    double off = 0, all = 0;
    for (size_t i = 0; i < found.size(); i++) {
        off += (found[i] - exact.sums[i]) * (found[i] - exact.sums[i]);
        all += exact.sums[i] * exact.sums[i];
    }
    return std::sqrt(off / all);
}

void within(const vector<float>& found, const Exact& exact, const Products& products, int64_t terms,
            const char* what, const Shape& s) {
    const double bound = products.per_term + SUMS * double(3 * terms + 3) * check::HALF_ULP;
    for (size_t i = 0; i < found.size(); i++)
        check::near(found[i], exact.sums[i], bound * exact.sizes[i],
                    "%s of %s, %lld x %lld rows, %lld -> %lld: [%zu]", what, products.name,
                    (long long)s.pairs, (long long)(1 + s.copies), (long long)s.in,
                    (long long)s.out, i);
}

void same_bits(const vector<float>& found, const vector<float>& expected, const char* what) {
    for (size_t i = 0; i < found.size(); i++)
        check::same(check::bits_of(found[i]), check::bits_of(expected[i]), "%s: [%zu]", what, i);
}

void errors(const char* what, double plain, double high, double narrow, double of_sums) {
    std::printf("%s: off by %.2g in float32, %.2g at high, %.2g in bfloat16 (%.2g by its sums)\n",
                what, plain, high, narrow, of_sums);
    // float32's own is a matter of luck, and of 2^-24; bfloat16's is 2^-8 a number.
    check::same(plain < 1e-6 && narrow > 1e-3 && of_sums < 1e-6, 1,
                "%s: errors of float32 and bfloat16", what);
    if (ffk::FFK_SET.splits_float32)
        check::same(high > plain && high < 1. / (1 << 16), 1, "%s: the error at high", what);
    else
        check::same(high == plain, 1, "%s: whether high changes nothing", what);
}

void products(Shape shape) {
    // Slopes are as small as 1 / (rows units) makes them.
    Layer layer(shape, 1e-5f);
    for (const Products& p : {FLOAT, HIGH, NARROW}) {
        const vector<float> y = layer.forward(p), dw = layer.gradient(p);
        within(y, exact_forward(layer, p.rounds), p, shape.in, "y", shape);
        if (!p.rounds || shape.copies == 0)
            within(dw, exact_gradient(layer, p.rounds), p, shape.rows(), "dW", shape);
        same_bits(layer.forward(p, 3), y, "y on three threads");
        same_bits(layer.gradient(p, 3), dw, "dW on three threads");
    }
    if (!ffk::FFK_SET.splits_float32) {
        same_bits(layer.forward(HIGH), layer.forward(FLOAT), "y at high");
        same_bits(layer.gradient(HIGH), layer.gradient(FLOAT), "dW at high");
    }
    if (shape.copies != 0 || shape.in * shape.pairs < 4096) return;
    const Exact y = exact_forward(layer, false), dw = exact_gradient(layer, false);
    errors("y", error(layer.forward(FLOAT), y), error(layer.forward(HIGH), y),
           error(layer.forward(NARROW), y),
           error(layer.forward(NARROW), exact_forward(layer, true)));
    errors("dW", error(layer.gradient(FLOAT), dw), error(layer.gradient(HIGH), dw),
           error(layer.gradient(NARROW), dw),
           error(layer.gradient(NARROW), exact_gradient(layer, true)));
}

// A forward pass leaves the product without the label field, and its activities are the same.
void leaves_product(Shape shape) {
    Layer layer(shape, 1);
    const auto& [pairs, copies, in, out] = shape;
    for (const int64_t field : {int64_t(0), int64_t(1), smaller(in, 10), in}) {
        vector<float> y(size_t(pairs * out)), product(y.size(), NAN), sumsq(size_t(pairs), 0);
        ffk::Call call = layer.call(FLOAT, 2);
        call.rows.label_field = field;
        call.outputs.y = {y.data(), pairs, out, out, ffk::FLOAT32};
        call.outputs.product_out = {product.data(), pairs, out, out, ffk::FLOAT32};
        call.outputs.sumsq = sumsq.data();
        check::same(ffk::FFK_SET.linear_forward(call), 0, "status of a forward pass");
        within(y, exact_forward(layer, false), FLOAT, in, "y beside a product", shape);
        Layer without = layer;
        for (int64_t i = 0; i < pairs * in; i++)
            if (i % in < field) without.x[size_t(i)] = 0;
        within(product, exact_forward(without, false), FLOAT, in, "a product that is left", shape);
    }
}

// Numbers at the ends of float32, each against each, at "high": infinities and NaN are where
// float32 has them, and the rest is near float32's.
void ends() {
    constexpr float INF = INFINITY, MOST = std::numeric_limits<float>::max();
    const vector<float> ends = {
        INF,    -INF, NAN,  MOST, -MOST,    3.395e38f, -3.39e38f, 1e-37f,    -2e-38f, 1e-39f,
        1e-45f, 0,    -0.f, 1,    1.00001f, 65504.3f,  -3.1f,     0x1p-100f, 0x1p100f};
    const int64_t n = int64_t(ends.size()), in = 40;
    Layer layer({n, 0, in, n}, 1);
    for (const bool fills : {false, true})
        for (int64_t place = 0; place < in; place += 13) {
            layer.x = fills ? check::numbers(n * in) : vector<float>(size_t(n * in));
            layer.weight = check::numbers(n * in);
            for (int64_t i = 0; i < n; i++)
                layer.x[size_t(i * in + place)] = layer.weight[size_t(i * in + place)] =
                    ends[size_t(i)];
            const vector<float> y = layer.forward(HIGH);
            for (int64_t i = 0; i < n; i++)
                for (int64_t o = 0; o < n; o++) {
                    const float *x = layer.x.data() + i * in, *w = layer.weight.data() + o * in;
                    float plain = 0;
                    double size = 0, lost = 0;
                    for (int64_t k = 0; k < in; k++) {
                        plain += x[k] * w[k];
                        size += std::fabs(double(x[k]) * w[k]);
                        // Parts below the smallest normal number are zeros for a unit, and of
                        // infinity it knows no product with them.
                        lost +=
                            check::SMALLEST * (std::fabs(double(x[k])) + std::fabs(double(w[k])));
                    }
                    const bool denormal = std::fpclassify(x[place]) == FP_SUBNORMAL
                                          || std::fpclassify(w[place]) == FP_SUBNORMAL;
                    if (denormal && !std::isfinite(size)) continue;
                    const float found = y[size_t(i * n + o)];
                    // What is beyond float32, of numbers, may be NaN too, and just within it.
                    if (size > MOST && std::isfinite(x[place]) && std::isfinite(w[place])) {
                        check::same(std::fabs(found) < MOST * (1 - 0x1p-14f), 0,
                                    "whether %g x %g at high is in reach", x[place], w[place]);
                        continue;
                    }
                    check::near(found, plain, 0x1p-15 * size + lost, "%g x %g at high, %s: [%lld]",
                                x[place], w[place], fills ? "among others" : "alone",
                                (long long)place);
                }
        }
}

// Two parts, for vectors and one by one.
void parts() {
    for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 65521) {
        const float value = check::of_bits(uint32_t(bits));
        const Parts made = parts_of(broadcast(value));
        const double sum = double(made.nearest[0]) + made.rest[0];
        if (std::isfinite(value)) {
            const bool large = std::fabs(value) > 0x1p128 * (1 - 0x1p-9);
            const double bound =
                large ? 0x1p-15 * std::fabs(value) : 0x1p-17 * std::fabs(value) + 0x1p-134;
            check::near(sum, value, bound, "the sum of parts of %g", value);
            check::same(std::fabs(sum) <= std::numeric_limits<float>::max(), 1,
                        "whether the sum of parts of %g is a number", value);
        } else {
            check::near(sum, value, 0, "the sum of parts of %g", value);
        }
        for (const bool is_rest : {false, true}) {
            const float part = (is_rest ? made.rest : made.nearest)[0];
            check::same(check::bits_of(part) & 0xffff, 0, "digits of a part of %g", value);
            check::near(part_of(value, is_rest), part, 0, "part_of %g", value);
        }
    }
}

}  // namespace

int main() {
    check::ask_for_tiles();
    parts();
    for (const Shape& shape : {Shape{1, 0, 1, 1},
                               {3, 0, 15, 2},
                               {5, 2, 31, 33},
                               {17, 0, 33, 20},
                               {40, 1, 70, 50},
                               {33, 3, 100, 37},
                               {130, 0, 800, 40},
                               {430, 0, 60, 35},
                               {300, 1, 820, 33},
                               {2000, 1, 20, 2}}) {
        products(shape);
        if (shape.copies == 0) leaves_product(shape);
    }
    if (ffk::FFK_SET.splits_float32) ends();
    return check::result();
}
