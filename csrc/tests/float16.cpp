// Rounding to float16 and back: each of its numbers, and beside it what lies just off, just before,
// at and just behind the tie with the next; and numbers of all magnitudes.
#include "../cpu/rows.h"
#include "check.h"

namespace {

// A float16 number by its formula.
double value_of(uint32_t half) {
    const int exponent = half >> 10 & 31, digits = half & 1023;
    const double size = exponent == 31 ? (digits ? double(NAN) : double(INFINITY))
                        : exponent     ? std::ldexp(1024 + digits, exponent - 25)
                                       : std::ldexp(digits, -24);
    return half & 0x8000 ? -size : size;
}

void vectors(const float* values) {
    float narrow[LANES], digits[LANES];
    uint16_t halves[LANES];
    store(narrow, rounded_to_float16(load(values))), store(halves, to_float16(load(values)));
    store(digits, to_eleven_digits(load(values)));
    const vec widened = from_float16(halves);
    for (int i = 0; i < LANES; i++) {
        const double x = values[i];
        const float to = check::nearest_float16(x);
        const uint32_t from = check::bits_of(values[i]);
        check::near(narrow[i], to, 0, "rounded_to_float16(vec) of %#x", from);
        check::near(to_eleven_digits(values[i]), digits[i], 0, "to_eleven_digits of %#x", from);
        check::near(value_of(halves[i]), to, 0, "to_float16 of %#x", from);
        check::near(widened[i], to, 0, "from_float16 of what %#x became", from);
        if (!std::isnan(x))
            check::same(std::signbit(widened[i]), std::signbit(x), "sign of what %#x became", from);
        if (std::fabs(x) >= check::SMALLEST && std::fabs(x) < 1e38)
            check::near(digits[i], check::nearest_of(x, 11, -200, 128), 0,
                        "to_eleven_digits(vec) of %#x", from);
    }
}

}  // namespace

int main() {
    for (uint32_t half = 0; half < 65536; half++)
        check::near(from_float16(uint16_t(half)), value_of(half), 0, "from_float16 of %#x", half);
    std::vector<float> values;
    for (uint32_t half = 0; half < 0xfc00; half++) {
        if ((half & 0x7fff) >= 0x7c00) continue;
        const float number = float(value_of(half)), next = float(value_of(half + 1)),
                    tie = (half & 0x7fff) == 0x7bff ? std::copysign(65520.f, number)
                                                    : (number + next) / 2;
        for (const float value :
             {number, tie, std::nextafterf(tie, 1e9f), std::nextafterf(tie, -1e9f)})
            values.push_back(value);
    }
    for (uint32_t bits = 0; bits < 0x7f800000u; bits += 0x00100000u - 77)
        values.push_back(check::of_bits(bits)), values.push_back(-check::of_bits(bits));
    for (const float value : {float(INFINITY), -float(INFINITY), float(NAN), 0.f, -0.f})
        values.push_back(value);
    while (values.size() % LANES) values.push_back(1);
    for (size_t i = 0; i < values.size(); i += LANES) vectors(values.data() + i);
    return check::result();
}
