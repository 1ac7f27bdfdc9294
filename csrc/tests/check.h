// What the programs of this folder share: numbers by chance, the same in each run, and comparisons
// with what an independent plain loop says. The first ones that differ are named.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace check {

// Linux saves AMX's tiles of those processes alone that ask for it.
inline void ask_for_tiles() {
#if defined(__AMX_TILE__) && defined(__linux__)
    syscall(SYS_arch_prctl, 0x1023, 18);
#endif
}

constexpr double HALF_ULP = 1. / (1 << 24);                     // float32's relative error
constexpr double SMALLEST = std::numeric_limits<float>::min();  // its smallest normal number
constexpr long PRINTED = 10;

inline long compared = 0, failed = 0;

// Counts a comparison; names what failed, and says whether there is room to print how.
inline bool printed(bool right, const char* name, std::va_list arguments) {
    compared++;
    if (right || failed++ >= PRINTED) return false;
    std::vprintf(name, arguments);
    return true;
}

// Fails unless |got - expected| <= bound, or both are NaN or the same infinity.
__attribute__((format(printf, 4, 5))) inline void near(double got, double expected, double bound,
                                                       const char* name, ...) {
    const double off = std::fabs(got - expected);
    const bool right = got == expected || off <= bound || (std::isnan(got) && std::isnan(expected));
    std::va_list arguments;
    va_start(arguments, name);
    if (printed(right, name, arguments))
        std::printf(" is %.9g, not %.9g: off by %.3g where %.3g may be\n", got, expected, off,
                    bound);
    va_end(arguments);
}

// Of whole numbers, and of the bits of others.
__attribute__((format(printf, 3, 4))) inline void same(int64_t got, int64_t expected,
                                                       const char* name, ...) {
    std::va_list arguments;
    va_start(arguments, name);
    if (printed(got == expected, name, arguments))
        std::printf(" is %lld (%#llx), not %lld (%#llx)\n", (long long)got, (long long)got,
                    (long long)expected, (long long)expected);
    va_end(arguments);
}

// The program's exit status. One that compared nothing has failed too.
inline int result() {
    std::printf("%ld of %ld comparisons failed\n", failed, compared);
    return failed != 0 || compared == 0;
}

inline uint64_t seed = 1;

// A number in [0, 1), by Knuth's linear congruence.
inline double chance() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return double(seed >> 11) / double(uint64_t(1) << 53);
}

// Numbers on both sides of zero, whose mean square is about `scale` squared.
inline std::vector<float> numbers(int64_t n, float scale = 1) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = float(scale * (chance() - 0.5) * std::sqrt(12.));
    return values;
}

// The same, of those that bfloat16 has.
inline std::vector<float> coarse(int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = float(std::floor(chance() * 257) - 128) / 16;
    return values;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The nearest number of so many binary digits, the last of them worth 2^least or more, and of no
// more than 2^end; ties to even, by arithmetic alone.
inline float nearest_of(double x, int digits, int least, int end) {
    if (x == 0 || !std::isfinite(x)) return float(x);
    int exponent;
    std::frexp(x, &exponent);
    const double unit = std::ldexp(1., std::max(exponent - digits, least)),
                 nearest = std::nearbyint(x / unit) * unit;
    return std::fabs(nearest) < std::ldexp(1., end) ? float(nearest) : std::copysign(INFINITY, x);
}
inline float nearest_bfloat16(double x) { return nearest_of(x, 8, -133, 128); }
inline float nearest_float16(double x) { return nearest_of(x, 11, -24, 16); }

}  // namespace check
