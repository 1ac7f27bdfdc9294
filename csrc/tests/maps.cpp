// The passes around a convolution against plain loops, over numbers of channels and geometries that
// do not divide evenly.
#include "../cpu/maps.h"
#include "check.h"

namespace {

struct Case {
    int64_t rows, channels, height, width, pool_height, pool_width, stride_height, stride_width;
    ffk::Pool pool;
    ffk::Activation activation;
    bool scaled, centred, hands_on, placed;
};

template <class T>
struct Stored {
    std::vector<T> numbers;
    explicit Stored(int64_t n) : numbers(size_t(n)) {}
    void set(int64_t i, double v) {
        if constexpr (sizeof(T) == 2)
            numbers[size_t(i)] = to_bfloat16(float(v));
        else
            numbers[size_t(i)] = T(v);
    }
    double operator[](int64_t i) const {
        if constexpr (sizeof(T) == 2)
            return from_bfloat16(numbers[size_t(i)]);
        else
            return numbers[size_t(i)];
    }
};

double activated(double z, ffk::Activation a) {
    if (a == ffk::GELU) return z * std::erfc(-z / std::sqrt(2.)) / 2;
    if (a == ffk::SILU) return z / (1 + std::exp(-z));
    if (z > 0 || z != z || a == ffk::IDENTITY) return z;
    return a == ffk::RELU ? 0 : 0.01f * z;
}
double slope_at(double z, ffk::Activation a) {
    if (a == ffk::GELU || a == ffk::SILU) {
        const double small = 1e-5;
        return (activated(z + small, a) - activated(z - small, a)) / (2 * small);
    }
    if (z > 0 || a == ffk::IDENTITY) return 1;
    return a == ffk::RELU ? 0 : 0.01f;
}

template <class T>
void run(const Case& o) {
    const bool curved = o.activation == ffk::GELU || o.activation == ffk::SILU,
               pools = o.pool != ffk::POOL_NONE || curved, narrow = sizeof(T) == 2;
    const int64_t h = (o.height - o.pool_height) / o.stride_height + 1,
                  w = (o.width - o.pool_width) / o.stride_width + 1, places = o.height * o.width,
                  units = h * w;
    const double ulp = narrow ? 1. / 256 : check::HALF_ULP;
    Stored<T> z(o.rows * places * o.channels), p(o.rows * units * o.channels), dz(z);
    std::vector<uint8_t> where(p.numbers.size());
    const auto floats = [](int64_t n) {
        std::vector<float> values(static_cast<size_t>(n));
        for (float& v : values) v = float(2 * check::chance() - 1);
        return values;
    };
    const int64_t moments = o.rows * o.channels;
    std::vector<float> scale = floats(o.rows), bias = floats(o.channels),
                       pivot = floats(o.channels), first = floats(moments), spread = first,
                       slope1 = floats(moments), slope2 = floats(moments),
                       gain = floats(o.channels), shift = floats(o.channels), sums = first,
                       of_place = floats(o.rows * units * o.channels),
                       place_scale = floats(o.channels);
    for (float& s : scale) s = 0.5f + std::fabs(s);
    // Whole numbers: equal ones are many, and without a scale sums of a few are exact.
    for (size_t i = 0; i < z.numbers.size(); i++)
        z.set(int64_t(i), std::floor(8 * check::chance()) - 3);
    const Stored<T> given = z;
    ffk::MapsPass call{};
    call.rows = o.rows, call.channels = o.channels, call.height = o.height, call.width = o.width;
    call.pooled_height = h, call.pooled_width = w;
    call.pool_height = o.pool_height, call.pool_width = o.pool_width;
    call.pool_stride_height = o.stride_height, call.pool_stride_width = o.stride_width;
    call.has_gaps = true;
    call.pool = o.pool, call.activation = o.activation;
    call.dtype = narrow ? ffk::BFLOAT16 : ffk::FLOAT32;
    call.z = z.numbers.data(), call.p = pools ? p.numbers.data() : z.numbers.data();
    call.where = where.data();
    if (o.scaled) call.scale = scale.data(), call.bias = bias.data();
    if (o.centred) call.pivot = pivot.data(), call.finds_pivot = 1;
    call.first = first.data(), call.spread = spread.data(), call.threads = 1;
    maps_forward(call);
    const Stored<T>& made = pools ? p : z;

    std::vector<double> total(size_t(o.channels), 0);
    std::vector<int64_t> winner(made.numbers.size());
    const auto at = [&](int64_t n, int64_t y, int64_t x, int64_t c) {
        return ((n * o.height + y) * o.width + x) * o.channels + c;
    };
    const auto value = [&](int64_t n, int64_t y, int64_t x, int64_t c) {
        const double v = given[at(n, y, x, c)];
        return o.scaled ? v * scale[size_t(n)] + bias[size_t(c)] : v;
    };
    const double span = 10;
    for (int64_t n = 0; n < o.rows; n++)
        for (int64_t c = 0; c < o.channels; c++) {
            double sum = 0, squares = 0;
            const double centre = o.centred ? pivot[size_t(c)] : 0;
            for (int64_t y = 0; y < h; y++)
                for (int64_t x = 0; x < w; x++) {
                    const int64_t unit = ((n * h + y) * w + x) * o.channels + c;
                    double best = 0, all = 0;
                    for (int64_t k = 0; k < o.pool_height * o.pool_width; k++) {
                        const double v = value(n, y * o.stride_height + k / o.pool_width,
                                               x * o.stride_width + k % o.pool_width, c);
                        const double y = activated(v, o.activation), ranked = curved ? y : v;
                        if (k == 0 || ranked > best) best = ranked, winner[size_t(unit)] = k;
                        all += y;
                    }
                    const double expected = o.pool == ffk::POOL_AVERAGE
                                                ? all / double(o.pool_height * o.pool_width)
                                            : curved ? best
                                                     : activated(best, o.activation);
                    check::near(made[unit], expected, 2 * ulp * span, "p of row %d channel %d",
                                int(n), int(c));
                    if (o.pool == ffk::POOL_MAX && !o.scaled)
                        check::same(where[size_t(unit)], winner[size_t(unit)], "winner");
                    const double apart = double(made[unit]) - centre;
                    sum += apart, squares += apart * apart;
                }
            const double most = double(units) * span * span * 8 * check::HALF_ULP;
            check::near(first[size_t(n * o.channels + c)], sum, most, "first moment");
            check::near(spread[size_t(n * o.channels + c)], squares, most * 4, "second moment");
        }
    if (o.centred && o.rows > 0)
        for (int64_t c = 0; c < o.channels; c++) {
            double mean = 0;
            for (int64_t i = 0; i < units; i++) mean += made[i * o.channels + c] / double(units);
            check::near(pivot[size_t(c)], mean, narrow ? span / 256 : 1e-5, "pivot %d", int(c));
        }

    const Stored<T> before = made;
    if (o.placed && o.centred) {
        call.place_slope = of_place.data();
        maps_products(call);
        for (int64_t n = 0; n < o.rows; n++)
            for (int64_t c = 0; c < o.channels; c++) {
                double sum = 0, products = 0;
                for (int64_t i = 0; i < units; i++) {
                    const int64_t unit = (n * units + i) * o.channels + c;
                    const double of = of_place[size_t(unit)];
                    sum += of, products += of * (before[unit] - pivot[size_t(c)]);
                }
                const double most = double(units) * 8 * check::HALF_ULP;
                const size_t m = size_t(n * o.channels + c);
                check::near(first[m], sum, most, "sum over places");
                check::near(spread[m], products, most * span, "sum of products");
            }
        call.place_slope = nullptr;
    }
    call.slope_first = slope1.data(), call.slope_second = slope2.data();
    if (o.hands_on) call.gain = gain.data(), call.shift = shift.data();
    if (o.placed) call.place_slope = of_place.data(), call.place_scale = place_scale.data();
    call.dz = dz.numbers.data(), call.dz_sums = sums.data();
    maps_backward(call);
    Stored<double> expected(o.rows * places * o.channels);
    for (int64_t n = 0; n < o.rows; n++)
        for (int64_t c = 0; c < o.channels; c++) {
            const size_t m = size_t(n * o.channels + c);
            double sum = 0, size = 0;
            for (int64_t y = 0; y < h; y++)
                for (int64_t x = 0; x < w; x++) {
                    const int64_t unit = ((n * h + y) * w + x) * o.channels + c,
                                  count = o.pool_height * o.pool_width;
                    const double apart = before[unit] - (o.centred ? pivot[size_t(c)] : 0),
                                 placed = o.placed ? double(of_place[size_t(unit)])
                                                         * place_scale[size_t(c)]
                                                   : 0,
                                 g = double(slope1[m]) + 2 * double(slope2[m]) * apart + placed;
                    if (o.hands_on)
                        check::near((pools ? p : z)[unit],
                                    gain[size_t(c)] * apart + shift[size_t(c)], 2 * ulp * span,
                                    "handed on");
                    for (int64_t k = 0; k < count; k++) {
                        const int64_t i = y * o.stride_height + k / o.pool_width,
                                      j = x * o.stride_width + k % o.pool_width;
                        const double told_by = curved ? value(n, i, j, c) : before[unit];
                        double part = g * slope_at(told_by, o.activation);
                        if (o.pool == ffk::POOL_AVERAGE)
                            part = g / double(count) * slope_at(value(n, i, j, c), o.activation);
                        else if (o.pool == ffk::POOL_MAX && where[size_t(unit)] != k)
                            part = 0;
                        sum += part, size += std::fabs(part);
                        expected.set(at(n, i, j, c), part * (o.scaled ? scale[size_t(n)] : 1));
                    }
                }
            check::near(sums[m], sum, 8 * check::HALF_ULP * (size + span), "sum of dz");
        }
    for (size_t i = 0; i < dz.numbers.size(); i++) {
        const double e = expected[int64_t(i)], size = std::max(span, std::fabs(e));
        // A curve's slope is up to 1.13, and has a rounding of its own.
        check::near(dz[int64_t(i)], e, (curved ? 8 : 4) * ulp * size, "dz %d", int(i));
    }
}

}  // namespace

int main() {
    for (const int64_t channels : {1, 4, 15, 16, 20, 35})
        for (const ffk::Activation activation :
             {ffk::RELU, ffk::LEAKY_RELU, ffk::IDENTITY, ffk::GELU, ffk::SILU})
            for (int kind = 0; kind < 7; kind++)
                for (int option = 0; option < 16; option++) {
                    Case o{3,
                           channels,
                           5,
                           7,
                           1,
                           1,
                           1,
                           1,
                           ffk::POOL_NONE,
                           activation,
                           (option & 1) != 0,
                           (option & 2) != 0,
                           (option & 4) != 0,
                           (option & 8) != 0};
                    if (kind) o.pool = kind % 2 ? ffk::POOL_MAX : ffk::POOL_AVERAGE;
                    if (kind == 1 || kind == 2)
                        o.pool_height = o.pool_width = o.stride_height = o.stride_width = 2;
                    if (kind == 3 || kind == 4)
                        o.pool_height = o.stride_height = 3, o.pool_width = 2, o.stride_width = 3;
                    if (kind == 5 || kind == 6) o.pool_height = o.stride_height = 5;
                    if (o.pool == ffk::POOL_MAX && activation == ffk::LEAKY_RELU) continue;
                    run<float>(o), run<uint16_t>(o);
                }
    return check::result();
}
