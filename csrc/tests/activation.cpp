// GELU, SiLU and their slopes against long double: all magnitudes of both signs, the places where
// pieces meet, infinities, NaN and numbers below the smallest normal one.
#include "../cpu/activation.h"
#include "check.h"

namespace {

using Long = long double;

constexpr double ULP = 2 * check::HALF_ULP;

// The numbers of one vector, each on its own in every lane's place.
void numbers(const float* z) {
    float y[LANES], slope[LANES], power[LANES];
    const auto compare = [&](const char* name, Active curve, auto share_of, auto steep_of) {
        store(y, curve.y), store(slope, curve.slope);
        for (int i = 0; i < LANES; i++) {
            const Long x = z[i], share = share_of(x), steep = steep_of(x);
            const double size = std::fabs(z[i]);
            // What has no digits of its own left may be zero, times z.
            const double least = 1.1 * check::SMALLEST * (size > 1 ? size : 1);
            check::near(y[i], double(x * share), double(3 * ULP * fabsl(x * share)) + least,
                        "%s(%.9g)", name, double(z[i]));
            // Of infinities the limit is as good as no number.
            if (std::isinf(z[i])) continue;
            check::near(slope[i], double(share + steep),
                        double(3 * ULP * (share + fabsl(steep))) + least, "slope of %s at %.9g",
                        name, double(z[i]));
        }
    };
    compare(
        "gelu", gelu(load(z)), [](Long x) { return erfcl(-x / sqrtl(2)) / 2; },
        [](Long x) { return x * expl(-x * x / 2) / sqrtl(2 * acosl(-1)); });
    compare(
        "silu", silu(load(z)), [](Long x) { return 1 / (1 + expl(-x)); },
        [](Long x) { return x / (2 + expl(-x) + expl(x)); });
    float below[LANES];
    for (int i = 0; i < LANES; i++) below[i] = -std::fabs(z[i]);
    store(power, exponential(load(below)));
    for (int i = 0; i < LANES; i++)
        check::near(power[i], double(expl(below[i])),
                    double(1.5 * ULP * expl(below[i])) + 1.1 * check::SMALLEST, "exponential(%.9g)",
                    double(below[i]));
}

}  // namespace

int main() {
    float z[LANES];
    int count = 0;
    const auto each = [&](float value) {
        z[count++] = value;
        if (count == LANES) numbers(z), count = 0;
    };
    // Every exponent, and about zero and through both tails a fine grid.
    for (uint32_t bits = 0; bits < 0x7f800000u; bits += 0x00100000u - 77) {
        each(check::of_bits(bits)), each(-check::of_bits(bits));
    }
    for (int i = -60000; i <= 60000; i++) each(float(i) / 512);
    for (int i = 0; i < 200000; i++) each(float((check::chance() - 0.5) * 30));
    for (const float value : {0.f, -0.f, INFINITY, NAN, 14.f, -14.f, 13.2f, -13.3f, 87.3f, -87.4f})
        for (int i = 0; i < LANES; i++) each(value);
    return check::result();
}
