// A convolution's products with the passes around them, forward and back, against plain loops:
// groups merged and not, channels that fill no vector, kernels and paddings of many sizes, whole
// maps kept and not, and the same bits on several threads.
#include "../cpu/convolution.h"

#include "check.h"

namespace {

struct Case {
    int64_t rows, in, out, groups, height, width, kernel_height, kernel_width, padding_height,
        padding_width;
    ffk::Pool pool;
    ffk::Activation activation;
    bool scaled;
};

template <class T>
double number(T v) {
    if constexpr (sizeof(T) == 2)
        return from_bfloat16(v);
    else
        return v;
}

template <class T>
void fill(std::vector<T>& values) {
    for (T& v : values) {
        const float chosen = float(2 * check::chance() - 1);
        if constexpr (sizeof(T) == 2)
            v = to_bfloat16(chosen);
        else
            v = chosen;
    }
}

template <class T>
void run(const Case& o) {
    const int64_t h = o.height + 2 * o.padding_height - o.kernel_height + 1,
                  w = o.width + 2 * o.padding_width - o.kernel_width + 1,
                  of_pool = o.pool == ffk::POOL_NONE ? 1 : 2, ph = h / of_pool, pw = w / of_pool,
                  ins = o.in / o.groups, outs = o.out / o.groups,
                  taps = o.kernel_height * o.kernel_width;
    const bool narrow = sizeof(T) == 2, curved = o.activation == ffk::GELU;
    std::vector<T> x(size_t(o.rows * o.height * o.width * o.in)),
        p(size_t(o.rows * ph * pw * o.out)), z(size_t(o.rows * h * w * o.out));
    std::vector<uint8_t> where(p.size());
    std::vector<float> weight(size_t(o.out * ins * taps)), bias(size_t(o.out)),
        scale(size_t(o.rows)), first(size_t(o.rows * o.out)), spread(first), slope(first),
        sums(first), dw(weight);
    fill(x), fill(weight), fill(bias), fill(slope), fill(scale);
    // Products are of rounded weights.
    for (float& v : weight) v = narrow ? rounded(v) : v;
    for (float& s : scale) s = 0.5f + std::fabs(s);

    ffk::MapsPass call{};
    call.rows = o.rows, call.channels = o.out, call.height = h, call.width = w;
    call.pooled_height = ph, call.pooled_width = pw;
    call.pool_height = call.pool_width = call.pool_stride_height = call.pool_stride_width = of_pool;
    call.has_gaps = h % of_pool != 0 || w % of_pool != 0;
    call.pool = o.pool, call.activation = o.activation;
    call.dtype = narrow ? ffk::BFLOAT16 : ffk::FLOAT32;
    const bool keeps = curved || o.pool == ffk::POOL_AVERAGE;
    call.z = keeps ? z.data() : nullptr, call.p = p.data(), call.where = where.data();
    call.scale = o.scaled ? scale.data() : nullptr, call.bias = bias.data();
    call.first = first.data(), call.spread = spread.data();
    call.x = x.data(), call.weight = weight.data(), call.dw = dw.data();
    call.in_channels = o.in, call.in_height = o.height, call.in_width = o.width;
    call.kernel_height = o.kernel_height, call.kernel_width = o.kernel_width;
    call.padding_height = o.padding_height, call.padding_width = o.padding_width;
    call.groups = o.groups, call.threads = 3;
    if (convolution_forward(call)) return check::same(1, 0, "memory");

    const auto pixel = [&](int64_t n, int64_t y, int64_t xx, int64_t c) {
        y -= o.padding_height, xx -= o.padding_width;
        if (y < 0 || xx < 0 || y >= o.height || xx >= o.width) return 0.;
        return number(x[size_t(((n * o.height + y) * o.width + xx) * o.in + c)]);
    };
    const auto product = [&](int64_t n, int64_t y, int64_t xx, int64_t c) {
        double sum = 0;
        for (int64_t i = 0; i < ins; i++)
            for (int64_t t = 0; t < taps; t++)
                sum +=
                    double(weight[size_t((c * ins + i) * taps + t)])
                    * pixel(n, y + t / o.kernel_width, xx + t % o.kernel_width, c / outs * ins + i);
        return sum * (o.scaled ? scale[size_t(n)] : 1) + bias[size_t(c)];
    };
    const auto active = [&](double v) {
        return curved ? v * std::erfc(-v / std::sqrt(2.)) / 2 : v > 0 ? v : 0;
    };
    const double ulp = narrow ? 1. / 256 : 64 * check::HALF_ULP,
                 span = double(ins * taps + 1) * 1.5;
    for (int64_t n = 0; n < o.rows; n++)
        for (int64_t c = 0; c < o.out; c++) {
            double total = 0;
            for (int64_t y = 0; y < ph; y++)
                for (int64_t xx = 0; xx < pw; xx++) {
                    double best = -1e30, mean = 0;
                    for (int64_t k = 0; k < of_pool * of_pool; k++) {
                        const double a = active(
                            product(n, y * of_pool + k / of_pool, xx * of_pool + k % of_pool, c));
                        best = std::max(best, a), mean += a / double(of_pool * of_pool);
                    }
                    const double e = o.pool == ffk::POOL_AVERAGE ? mean : best;
                    const size_t unit = size_t(((n * ph + y) * pw + xx) * o.out + c);
                    check::near(number(p[unit]), e,
                                ulp * std::fabs(e) + 64 * check::HALF_ULP * span, "p %d",
                                int(unit));
                    total += number(p[unit]);
                }
            check::near(first[size_t(n * o.out + c)], total,
                        8 * check::HALF_ULP * (std::fabs(total) + double(ph * pw)), "moment");
        }

    call.slope_first = slope.data(), call.dz_sums = sums.data();
    call.first = call.spread = nullptr;
    if (!o.scaled) call.bias = nullptr;
    if (convolution_gradient(call)) return check::same(1, 0, "memory");
    // What the update reads is what the forward pass has left.
    std::vector<double> expected(dw.size()), size(dw.size());
    for (int64_t n = 0; n < o.rows; n++)
        for (int64_t y = 0; y < ph; y++)
            for (int64_t xx = 0; xx < pw; xx++)
                for (int64_t c = 0; c < o.out; c++)
                    for (int64_t k = 0; k < of_pool * of_pool; k++) {
                        const int64_t i = y * of_pool + k / of_pool, j = xx * of_pool + k % of_pool;
                        const size_t unit = size_t(((n * ph + y) * pw + xx) * o.out + c),
                                     place = size_t(((n * h + i) * w + j) * o.out + c);
                        double g = slope[size_t(n * o.out + c)];
                        if (o.pool == ffk::POOL_AVERAGE) g /= 4;
                        if (o.pool == ffk::POOL_MAX && where[unit] != k) continue;
                        double told = number(p[unit]);
                        if (keeps)
                            told = o.scaled ? number(z[place]) * scale[size_t(n)] + bias[size_t(c)]
                                            : number(z[place]);
                        if (curved) {
                            const double density = std::exp(-told * told / 2) / std::sqrt(2 * M_PI);
                            g *= std::erfc(-told / std::sqrt(2.)) / 2 + told * density;
                        } else if (!(told > 0))
                            continue;
                        if (o.scaled) g *= scale[size_t(n)];
                        for (int64_t m = 0; m < ins; m++)
                            for (int64_t t = 0; t < taps; t++) {
                                const double term =
                                    g
                                    * pixel(n, i + t / o.kernel_width, j + t % o.kernel_width,
                                            c / outs * ins + m);
                                const size_t at = size_t((c * ins + m) * taps + t);
                                expected[at] += term, size[at] += std::fabs(term);
                            }
                    }
    for (size_t i = 0; i < dw.size(); i++)
        check::near(dw[i], expected[i], (narrow ? 1. / 256 : 32 * check::HALF_ULP) * (size[i] + 1),
                    "dw %d", int(i));

    const std::vector<float> on_three = dw;
    call.threads = 1;
    if (convolution_gradient(call)) return check::same(1, 0, "memory");
    check::same(std::memcmp(on_three.data(), dw.data(), dw.size() * 4), 0, "bits on one thread");
}

}  // namespace

int main() {
    const Case cases[] = {
        {3, 1, 5, 1, 6, 7, 3, 3, 1, 1, ffk::POOL_NONE, ffk::RELU, false},
        {3, 3, 20, 1, 7, 5, 3, 3, 1, 1, ffk::POOL_MAX, ffk::RELU, true},
        {2, 20, 80, 10, 8, 9, 3, 3, 1, 1, ffk::POOL_MAX, ffk::RELU, false},
        {2, 6, 9, 3, 5, 5, 1, 1, 0, 0, ffk::POOL_NONE, ffk::RELU, true},
        {2, 4, 35, 1, 6, 6, 2, 3, 0, 2, ffk::POOL_AVERAGE, ffk::RELU, true},
        {1, 5, 50, 1, 4, 6, 3, 1, 2, 0, ffk::POOL_NONE, ffk::GELU, false},
        {17, 18, 66, 1, 5, 4, 3, 3, 1, 1, ffk::POOL_MAX, ffk::GELU, true},
        {20, 40, 24, 2, 4, 4, 3, 3, 1, 1, ffk::POOL_NONE, ffk::RELU, false},
        {1, 2, 3, 1, 1, 1, 1, 1, 0, 0, ffk::POOL_NONE, ffk::RELU, false},
    };
    for (const Case& o : cases) run<float>(o), run<uint16_t>(o);
    return check::result();
}
