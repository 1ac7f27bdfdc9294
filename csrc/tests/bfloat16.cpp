// Rounding to bfloat16 and back: each of its numbers, and beside it what lies just off, just
// before, at and just behind the tie with the next; denormals, infinities and NaN are among them.
#include "../cpu/rows.h"
#include "check.h"

namespace {

constexpr uint16_t A_NAN = 0x7fc0;

std::vector<float> around_every_number() {
    std::vector<float> values;
    for (uint32_t half = 0; half < 65536; half++)
        for (const uint32_t low : {0x0000, 0x0001, 0x7fff, 0x8000, 0x8001, 0xffff})
            values.push_back(check::of_bits(half << 16 | low));
    values.resize(values.size() / LANES * LANES);
    return values;
}

uint16_t expected(float value) {
    return std::isnan(value) ? A_NAN
                             : uint16_t(check::bits_of(check::nearest_bfloat16(value)) >> 16);
}

// What the vector functions say of LANES values.
void vectors(const float* values) {
    const vec given = load(values), whole = rounded(given), kept = flushed(given);
    uint16_t halves[LANES];
    store(halves, to_bfloat16(given));
    const vec widened = from_bfloat16(halves);
    for (int i = 0; i < LANES; i++) {
        const uint32_t from = check::bits_of(values[i]), to = expected(values[i]);
        check::same(halves[i], to, "to_bfloat16(vec) of %#x", from);
        check::same(check::bits_of(whole[i]), to << 16, "rounded(vec) of %#x", from);
        check::same(check::bits_of(widened[i]), to << 16, "from_bfloat16(vec) of %#x", to);
        check::same(check::bits_of(kept[i]), std::fabs(values[i]) < check::SMALLEST ? 0 : from,
                    "flushed(vec) of %#x", from);
    }
}

// A unit takes denormal numbers for zeros, and may keep more of a NaN.
void pairs(const float* values) {
    uint16_t numbers[2 * LANES];
    const vec made = to_pairs(load(values), load(values + LANES));
    std::memcpy(numbers, &made, sizeof(numbers));
    for (int i = 0; i < 2 * LANES; i++) {
        const uint32_t from = check::bits_of(values[i]);
        const bool denormal = std::fabs(values[i]) < check::SMALLEST;
        if (std::isnan(values[i]))
            check::near(from_bfloat16(numbers[i]), NAN, 0, "to_pairs(vec) of %#x", from);
        else if (!denormal || (numbers[i] & 0x7fff) != 0)
            check::same(numbers[i], expected(values[i]), "to_pairs(vec) of %#x", from);
    }
}

}  // namespace

int main() {
    const std::vector<float> values = around_every_number();
    std::vector<float> all(values.size());
    const int64_t n = int64_t(values.size());
    for (const int64_t count : {n, int64_t(2 * LANES + 1), int64_t(1)}) {
        std::fill(all.begin(), all.end(), 7.f);
        round_all(values.data(), count, all.data());
        for (int64_t i = 0; i < n; i++)
            check::same(check::bits_of(all[i]),
                        i < count ? uint32_t(expected(values[i])) << 16 : check::bits_of(7),
                        "round_all of %lld: [%lld]", (long long)count, (long long)i);
    }
    for (int64_t i = 0; i < n; i++) {
        const uint32_t from = check::bits_of(values[i]), to = expected(values[i]);
        check::same(to_bfloat16(values[i]), to, "to_bfloat16 of %#x", from);
        check::same(check::bits_of(rounded(values[i])), to << 16, "rounded of %#x", from);
        check::same(check::bits_of(from_bfloat16(uint16_t(to))), to << 16, "from_bfloat16 of %#x",
                    to);
        check::same(check::bits_of(flushed(values[i])),
                    std::fabs(values[i]) < check::SMALLEST ? 0 : from, "flushed of %#x", from);
    }
    for (int64_t i = 0; i + LANES <= n; i += LANES) vectors(values.data() + i);
    for (int64_t i = 0; MULTIPLIES_PAIRS && i + 2 * LANES <= n; i += 2 * LANES)
        pairs(values.data() + i);
    return check::result();
}
