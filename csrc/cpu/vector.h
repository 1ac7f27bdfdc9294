// One source for every instruction set: GCC's and Clang's vector extensions, and the tile that each
// set's registers hold. Everything here has internal linkage: a copy compiled for one set must
// never be linked into the code of another.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif
// AMX's unit, of the CPU or emulated: matrix_unit.h.
#if defined(__AMX_BF16__) || defined(FFK_EMULATES_MATRIX_UNIT)
#define FFK_ON_MATRIX_UNIT
#endif

namespace {

// A tile's accumulators, one row of B's vectors and one broadcast element of A share the register
// file; on AMX's unit a tile is four of its own.
#if defined(FFK_ON_MATRIX_UNIT)
constexpr int LANES = 16, TILE_ROWS = 32, TILE_VECTORS = 2;
#elif defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 9, TILE_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 4, TILE_VECTORS = 3;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 8, TILE_VECTORS = 3;
#else
constexpr int LANES = 4, TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
constexpr int PANEL = TILE_VECTORS * LANES;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vec_of_bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t vec_of_halves __attribute__((vector_size(2 * LANES)));
typedef int32_t vec_of_choices __attribute__((vector_size(4 * LANES)));
typedef int16_t vec_of_short_choices __attribute__((vector_size(2 * LANES)));
typedef uint8_t vec_of_bytes __attribute__((vector_size(LANES)));
typedef uint16_t halves_in_memory __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The first `n` numbers, fewer than twice N: by moves of one size each, where a call of memcpy
// would cost more than they do.
template <int64_t N, class T>
inline void copy_few(const T* from, T* to, int64_t n) {
    if (n & N) std::memcpy(to, from, N * sizeof(T)), from += N, to += N;
    if constexpr (N > 1) copy_few<N / 2>(from, to, n);
}

inline vec load(const float* p) { return *reinterpret_cast<const vec_in_memory*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_in_memory*>(p) = v; }
inline void store(uint16_t* p, vec_of_halves v) { *reinterpret_cast<halves_in_memory*>(p) = v; }
inline vec broadcast(float a) { return a - vec{}; }

// The first `n` numbers of a vector, and zeros behind them.
#if defined(__AVX512F__)
inline __mmask16 mask_of(int64_t n) { return n >= LANES ? 0xffff : __mmask16((1u << n) - 1); }
inline vec load_some(const float* p, int64_t n) {
    return (vec)_mm512_maskz_loadu_ps(mask_of(n), p);
}
inline vec load_some(const uint16_t* p, int64_t n) {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask_of(n), p);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
inline vec_of_bits load_some(const uint8_t* p, int64_t n) {
    return (vec_of_bits)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask_of(n), p));
}
inline void store_some(float* p, vec v, int64_t n) {
    _mm512_mask_storeu_ps(p, mask_of(n), (__m512)v);
}
inline void store_some(uint16_t* p, vec_of_halves v, int64_t n) {
    _mm256_mask_storeu_epi16(p, mask_of(n), (__m256i)v);
}
inline void store_some(uint8_t* p, vec_of_bits v, int64_t n) {
    _mm512_mask_cvtepi32_storeu_epi8(p, mask_of(n), (__m512i)v);
}
#else
template <class V, class T>
inline V from_memory(const T* p, int64_t n) {
    V v = {};
    if (n >= LANES)
        std::memcpy(&v, p, sizeof(V));
    else
        copy_few<LANES / 2>(p, reinterpret_cast<T*>(&v), n);
    return v;
}
template <class V, class T>
inline void to_memory(T* p, V v, int64_t n) {
    if (n >= LANES)
        std::memcpy(p, &v, sizeof(V));
    else
        copy_few<LANES / 2>(reinterpret_cast<const T*>(&v), p, n);
}
inline vec load_some(const float* p, int64_t n) { return from_memory<vec>(p, n); }
inline vec load_some(const uint16_t* p, int64_t n) {
    return (vec)(__builtin_convertvector(from_memory<vec_of_halves>(p, n), vec_of_bits) << 16);
}
inline vec_of_bits load_some(const uint8_t* p, int64_t n) {
    return __builtin_convertvector(from_memory<vec_of_bytes>(p, n), vec_of_bits);
}
inline void store_some(float* p, vec v, int64_t n) { to_memory(p, v, n); }
inline void store_some(uint16_t* p, vec_of_halves v, int64_t n) { to_memory(p, v, n); }
inline void store_some(uint8_t* p, vec_of_bits v, int64_t n) {
    to_memory(p, __builtin_convertvector(v, vec_of_bytes), n);
}
#endif

// A unit for bfloat16 multiplies pairs: two numbers of consecutive depth, in the place of one
// float, which is never computed with. A product's depth is filled up with zeros to a multiple of
// what the unit takes at once. Three products on AMX's unit make one of float32 numbers at
// precision "high".
#if defined(FFK_ON_MATRIX_UNIT)
constexpr bool MULTIPLIES_PAIRS = true, MULTIPLIES_SPLIT_PAIRS = true;
constexpr int64_t PAIRS_AT_ONCE = 16;
#elif defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool MULTIPLIES_PAIRS = true, MULTIPLIES_SPLIT_PAIRS = false;
constexpr int64_t PAIRS_AT_ONCE = 1;
#else
constexpr bool MULTIPLIES_PAIRS = false, MULTIPLIES_SPLIT_PAIRS = false;
constexpr int64_t PAIRS_AT_ONCE = 1;
#endif

#if defined(__AVX512BF16__)
// sum += a[0] b[0] + a[1] b[1] in every lane of b.
inline vec add_pairs(vec sum, const float* a, vec b) {
    int32_t bits;
    std::memcpy(&bits, a, 4);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(bits));
}

// 2 LANES numbers to LANES pairs.
inline vec to_pairs(vec first, vec second) {
    return (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#else
inline vec add_pairs(vec sum, const float*, vec) { return sum; }
#endif

// Numbers below the smallest normal one to zero: a product with them takes a hundred times as long.
inline vec flushed(vec values) {
    return ((vec_of_bits)values & 0x7fffffffu) < 0x00800000u ? vec{} : values;
}
inline float flushed(float value) { return __builtin_fabsf(value) < 1.17549435e-38f ? 0 : value; }

inline vec square_root(vec v) {
    for (int i = 0; i < LANES; i++) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// One round of a transposition: numbers whose row and lane differ in bit D change places.
template <int D, size_t... I>
__attribute__((always_inline)) inline void exchange(vec (&rows)[LANES], std::index_sequence<I...>) {
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; i++) {
        if (i & D) continue;
        const vec a = rows[i], b = rows[i + D];
        rows[i] = __builtin_shufflevector(a, b, (I & D ? LANES + I - D : I)...);
        rows[i + D] = __builtin_shufflevector(a, b, (I & D ? LANES + I : I + D)...);
    }
}

template <int D = LANES / 2>
__attribute__((always_inline)) inline void transpose(vec (&rows)[LANES]) {
    exchange<D>(rows, std::make_index_sequence<LANES>{});
    if constexpr (D > 1) transpose<D / 2>(rows);
}

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec_of_halves to_bfloat16(vec values) {
    const vec_of_bits bits = (vec_of_bits)values;
    const vec_of_bits nan = vec_of_bits{} + 0x7fc0;
    return __builtin_convertvector(
        values != values ? nan : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vec_of_halves);
}

// Of bfloat16 numbers in the place of floats.
inline vec_of_halves halves_of(vec_of_bits numbers) {
    return __builtin_convertvector(numbers >> 16, vec_of_halves);
}

inline vec from_bfloat16(const uint16_t* p) {
    const vec_of_halves halves = *reinterpret_cast<const halves_in_memory*>(p);
    return (vec)(__builtin_convertvector(halves, vec_of_bits) << 16);
}

// float16 numbers, in the lower half of each lane; without the CPU's own instructions, which not
// all sets have, and which a process may have told to lose numbers below the smallest normal one.
inline vec from_float16(vec_of_bits halves) {
    const vec_of_bits sign = (halves & 0x8000u) << 16, exponent = halves & 0x7c00u;
    const vec_of_bits wide = ((halves & 0x7fffu) << 13) + (112u << 23);
    // Numbers below the smallest normal one come in whole steps of 2^-24.
    const vec steps = __builtin_convertvector(halves & 0x3ffu, vec) * (1.f / (1 << 24));
    vec_of_bits bits = exponent == 0x7c00u ? wide + (112u << 23) : wide;
    bits = exponent == 0 ? (vec_of_bits)steps : bits;
    return (vec)(sign | bits);
}
inline vec from_float16(const uint16_t* p) {
    return from_float16(
        __builtin_convertvector(*reinterpret_cast<const halves_in_memory*>(p), vec_of_bits));
}
inline float from_float16(uint16_t bits) { return from_float16(vec_of_bits{} + bits)[0]; }

// To the eleven digits of float16, ties to even, at any exponent.
inline vec to_eleven_digits(vec values) {
    const vec_of_bits bits = (vec_of_bits)values;
    return values != values ? values : (vec)((bits + 0xfff + ((bits >> 13) & 1)) & 0xffffe000u);
}

inline float to_eleven_digits(float value) { return to_eleven_digits(broadcast(value))[0]; }

// To the nearest float16 number, ties to even.
inline vec rounded_to_float16(vec values) {
    const vec_of_bits sign = (vec_of_bits)values & 0x80000000u;
    const vec size = (vec)((vec_of_bits)values & 0x7fffffffu);
    // The neighbours of a half are as far apart as float16's smallest numbers.
    const vec small = (size + 0.5f) - 0.5f, large = to_eleven_digits(size);
    vec nearest = size < 0x1p-14f ? small : large;
    nearest = nearest >= 0x1p16f ? broadcast(__builtin_inff()) : nearest;
    return (vec)((vec_of_bits)nearest | sign);
}

inline vec_of_halves to_float16(vec values) {
    const vec nearest = rounded_to_float16(values);
    const vec_of_bits sign = ((vec_of_bits)nearest & 0x80000000u) >> 16,
                      size = (vec_of_bits)nearest & 0x7fffffffu;
    const vec few = size < 0x38800000u ? (vec)size * 0x1p24f : vec{};
    const vec_of_bits steps = (vec_of_bits) __builtin_convertvector(few, vec_of_choices);
    vec_of_bits bits = size < 0x38800000u ? steps : (size - (112u << 23)) >> 13;
    bits = size >= 0x7f800000u ? vec_of_bits{} + 0x7c00u : bits;
    bits = values != values ? vec_of_bits{} + 0x7e00u : bits;
    return __builtin_convertvector(sign | bits, vec_of_halves);
}

inline float rounded(float value) { return from_bfloat16(to_bfloat16(value)); }

inline vec rounded(vec values) {
    const vec_of_bits bits = (vec_of_bits)values;
    const vec_of_bits nan = vec_of_bits{} + 0x7fc00000u;
    return (vec)(values != values ? nan : (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// 2 LANES numbers to LANES pairs.
inline vec to_pairs(vec first, vec second) {
    const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)first);
    return (vec)vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(low, (float32x4_t)second));
}
#elif !defined(__AVX512BF16__)
// 2 LANES numbers to LANES pairs, denormal ones to zeros as a unit has it.
inline vec to_pairs(vec first, vec second) {
    vec_of_halves both[2] = {to_bfloat16(flushed(first)), to_bfloat16(flushed(second))};
    vec pairs;
    std::memcpy(&pairs, both, sizeof(pairs));
    return pairs;
}
#endif

inline void round_all(const float* values, int64_t n, float* to) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) store(to + k, rounded(load(values + k)));
    for (; k < n; k++) to[k] = rounded(values[k]);
}

// A number as a sum of two bfloat16 numbers, the nearest one and the nearest to the rest: within
// 2^-17 of a number of 2^-109 or more; of a smaller one a unit may take the rest for zero. Of those
// that round to infinity the sum lies towards zero, within 2^-15. Infinity is 1 and infinity: it
// meets one part alone of the other operand, whose own rest may be zero or of another sign.
struct Parts {
    vec nearest, rest;
};
inline Parts parts_of(vec values) {
    const vec_of_bits bits = (vec_of_bits)values, sign = bits & 0x80000000u, size = bits ^ sign;
    const vec_of_bits up = (size + 0x7fff + ((size >> 16) & 1)) & 0xffff0000u;
    const vec_of_bits largest = vec_of_bits{} + 0x7f7f0000u, one = vec_of_bits{} + 0x3f800000u;
    vec_of_bits nearest = up >= 0x7f800000u ? largest : up;
    nearest = (size == 0x7f800000u ? one : nearest) | sign;
    const vec rest = values - (vec)nearest;
    const vec towards_zero = (vec)((vec_of_bits)rest & 0xffff0000u);
    return {(vec)nearest, up >= 0x7f800000u ? towards_zero : rounded(rest)};
}
inline float part_of(float value, bool is_rest) {
    const Parts parts = parts_of(broadcast(value));
    return is_rest ? parts.rest[0] : parts.nearest[0];
}

// bfloat16 numbers in the place of floats, two and two.
inline vec paired(vec first, vec second) {
    return (vec)((vec_of_bits)first >> 16 | ((vec_of_bits)second & 0xffff0000u));
}

// Two bfloat16 numbers in the place of one float.
inline float pair_of(uint16_t first, uint16_t second) {
    const uint32_t bits = uint32_t(second) << 16 | first;
    float place;
    std::memcpy(&place, &bits, 4);
    return place;
}

inline float pair_of_rounded(float first, float second) {
    uint32_t low, high;
    std::memcpy(&low, &first, 4), std::memcpy(&high, &second, 4);
    return pair_of(uint16_t(low >> 16), uint16_t(high >> 16));
}

inline int64_t up_to(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace
