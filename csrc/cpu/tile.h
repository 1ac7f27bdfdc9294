// The one inner loop of every product: a tile of C = A B stays in registers while A and B stream
// past it.
#pragma once
#include "matrix_unit.h"

namespace {

// How deep a tile goes before it moves on: A's rows and B's panel of that depth stay in the nearest
// caches.
constexpr int64_t DEPTH = 400;
static_assert(DEPTH % PAIRS_AT_ONCE == 0);
// How many rows of B's panel are on their way while one is multiplied.
constexpr int64_t AHEAD = 8;

template <auto N>
struct Constant {
    static constexpr auto value = N;
};

// What the places along a product's depth hold: a number each; two bfloat16 numbers each; or blocks
// of as many numbers as AMX's unit takes at once, first the pairs of the nearest bfloat16 numbers,
// then those of the rests, so that a block of three products loads each of its four operands once.
enum Operands { FLOATS, BFLOAT16_PAIRS, SPLIT_PAIRS };

// The shortest run along the depth that is whole: in places, and in numbers.
constexpr int64_t places_at_once(Operands kind) {
    return kind == FLOATS ? 1 : kind == BFLOAT16_PAIRS ? PAIRS_AT_ONCE : 2 * PAIRS_AT_ONCE;
}
constexpr int64_t numbers_at_once(Operands kind) { return kind == FLOATS ? 1 : 2 * PAIRS_AT_ONCE; }
// DEPTH in whole runs.
constexpr int64_t depth_at_once(Operands kind) {
    return DEPTH / places_at_once(kind) * places_at_once(kind);
}
// Which pair is in a place, and whether its parts are the rests.
constexpr int64_t pair_in(Operands kind, int64_t place) {
    return place / places_at_once(kind) * PAIRS_AT_ONCE + place % PAIRS_AT_ONCE;
}
constexpr bool is_rest(Operands kind, int64_t place) {
    return place % places_at_once(kind) >= PAIRS_AT_ONCE && kind == SPLIT_PAIRS;
}

// How many rows a tile of so many vectors may have. Sums too few to hide what each waits for are a
// tile's whose rows are few and whose panel is narrow: it takes more rows for the registers left.
constexpr int most_rows([[maybe_unused]] int vectors) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(FFK_ON_MATRIX_UNIT)
    return TILE_ROWS * TILE_VECTORS / vectors;
#else
    return TILE_ROWS;
#endif
}

// A's rows for one tile. A tile at the edge reads its last row several times, on AMX's unit
// whatever lies behind it, and writes only `valid` rows.
template <int ROWS = TILE_ROWS>
struct TileRows {
    const float* row[ROWS];
    int64_t stride;
    int valid;

    TileRows(const float* a, int64_t row_stride, int64_t rows)
        : stride(row_stride), valid(int(smaller(rows, ROWS))) {
        // The product runs over ROWS rows always: its loop has no bound that varies.
        for (int m = 0; m < ROWS; m++) row[m] = a + smaller(m, valid - 1) * stride;
    }
};

// Memory that is needed once a tile is multiplied: fetched line by line meanwhile, as a burst would
// keep the operands waiting.
struct Coming {
    const float* line[TILE_ROWS * TILE_VECTORS * 3];
    int64_t count = 0;

    void add(const float* at) { line[count++] = at; }
    void fetch(int64_t i) const { __builtin_prefetch(line[i], 1); }
};

template <int NV, int ROWS = TILE_ROWS>
struct Tile {
    vec at[ROWS][NV];

    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) at[m][v] = vec{};
    }

    // `c`: [ROWS, NV * LANES], to be read or written once the tile is multiplied; rows beyond
    // the valid ones may hold anything.
    __attribute__((always_inline)) static void expect(const float* c, int64_t stride) {
        for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < NV; v++) __builtin_prefetch(c + m * stride + v * LANES, 1);
    }

    __attribute__((always_inline)) void add(const float* c, int64_t stride) {
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) at[m][v] += load(c + m * stride + v * LANES);
    }

    // += column row^T.
    __attribute__((always_inline)) void add_outer(const float* column, const float* row) {
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) at[m][v] += broadcast(column[m]) * load(row + v * LANES);
    }

    __attribute__((always_inline)) void write(float* c, int64_t stride) const {
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) store(c + m * stride + v * LANES, at[m][v]);
    }

    // += A[:, first : first + depth] B; `b`: [depth, NV * LANES].
    template <Operands KIND>
    __attribute__((always_inline)) void multiply(const TileRows<ROWS>& a, int64_t first,
                                                 const float* b, int64_t depth,
                                                 const Coming& coming = {}) {
#if defined(FFK_ON_MATRIX_UNIT)
        if constexpr (KIND != FLOATS) return multiply_on_unit<KIND>(a, first, b, depth, coming);
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
        if constexpr (KIND != FLOATS) return multiply_blocks(a, first, b, depth, coming);
#endif
        constexpr bool IN_PAIRS = KIND == BFLOAT16_PAIRS;
        const float* row[ROWS];
        for (int m = 0; m < ROWS; m++) row[m] = a.row[m] + first;
        for (int64_t k = 0; k < depth; k++, b += NV * LANES) {
            if (k < coming.count) coming.fetch(k);
            vec column[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                column[v] = load(b + v * LANES);
                __builtin_prefetch(b + (AHEAD * NV + v) * LANES);
            }
#pragma GCC unroll 16
            for (int m = 0; m < ROWS; m++) {
                const vec element = IN_PAIRS ? vec{} : broadcast(row[m][k]);
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    at[m][v] = IN_PAIRS ? add_pairs(at[m][v], row[m] + k, column[v])
                                        : at[m][v] + element * column[v];
            }
        }
        for (int64_t k = depth; k < coming.count; k++) coming.fetch(k);
    }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    // By BFMMLA, whose sums are blocks of two rows and two columns, and which takes two places at
    // once: a tile's vectors change places with those of the row beside them on the way in and out.
    __attribute__((always_inline)) void multiply_blocks(const TileRows<ROWS>& a, int64_t first,
                                                        const float* b, int64_t depth,
                                                        const Coming& coming) {
        static_assert(LANES == 4 && TILE_ROWS % 2 == 0);
        const auto halves = [](vec& one, vec& other) __attribute__((always_inline)) {
            const vec low = __builtin_shufflevector(one, other, 0, 1, 4, 5);
            other = __builtin_shufflevector(one, other, 2, 3, 6, 7), one = low;
        };
        const auto exchange = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int m = 0; m < TILE_ROWS; m += 2)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) halves(at[m][v], at[m + 1][v]);
        };
        const auto add = [&](int64_t k, auto places) __attribute__((always_inline)) {
            constexpr size_t BYTES = 4 * decltype(places)::value;
            const float* from = b + k * NV * LANES;
            vec columns[2][NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                const vec here = load(from + v * LANES),
                          next = BYTES == 8 ? load(from + (NV + v) * LANES) : vec{};
                columns[0][v] = __builtin_shufflevector(here, next, 0, 4, 1, 5);
                columns[1][v] = __builtin_shufflevector(here, next, 2, 6, 3, 7);
                __builtin_prefetch(from + (AHEAD * NV + v) * LANES);
            }
#pragma GCC unroll 16
            for (int m = 0; m < TILE_ROWS; m++) {
                uint64_t rows[2] = {};
                std::memcpy(&rows[0], a.row[m / 2 * 2] + first + k, BYTES);
                std::memcpy(&rows[1], a.row[m / 2 * 2 + 1] + first + k, BYTES);
                const uint64x2_t both = vcombine_u64(vcreate_u64(rows[0]), vcreate_u64(rows[1]));
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    at[m][v] =
                        (vec)vbfmmlaq_f32((float32x4_t)at[m][v], vreinterpretq_bf16_u64(both),
                                          vreinterpretq_bf16_f32((float32x4_t)columns[m % 2][v]));
            }
        };
        exchange();
        for (int64_t k = 0; k < depth; k += 2) {
            if (k < coming.count) coming.fetch(k);
            if (k + 1 < coming.count) coming.fetch(k + 1);
            if (k + 1 < depth)
                add(k, Constant<2>{});
            else
                add(k, Constant<1>{});
        }
        for (int64_t k = up_to(depth, 2); k < coming.count; k++) coming.fetch(k);
        exchange();
    }
#endif

#if defined(FFK_ON_MATRIX_UNIT)
    // Tiles 0 to 3 are the sums: 0 and 1 of the upper 16 rows, 2 and 3 of the lower ones.
    template <Operands KIND>
    void multiply_on_unit(const TileRows<ROWS>& a, int64_t first, const float* b, int64_t depth,
                          const Coming& coming) {
        constexpr int64_t WIDTH = NV * LANES;
        float *upper = reinterpret_cast<float*>(at[0]), *lower = reinterpret_cast<float*>(at[16]);
        MatrixUnit::load<0>(upper, WIDTH), MatrixUnit::load<2>(lower, WIDTH);
        if (NV > 1)
            MatrixUnit::load<1>(upper + LANES, WIDTH), MatrixUnit::load<3>(lower + LANES, WIDTH);
        const float *above = a.row[0] + first, *below = above + 16 * a.stride;
        int64_t fetched = 0;
        constexpr int64_t RUN = places_at_once(KIND), REST = PAIRS_AT_ONCE;
        for (int64_t k = 0; k < depth; k += RUN, b += RUN * WIDTH) {
            for (const int64_t due = smaller(k + RUN, coming.count); fetched < due; fetched++)
                coming.fetch(fetched);
            if constexpr (KIND == BFLOAT16_PAIRS) {
                multiply_block<true, true>(above + k, below + k, a.stride, b);
            } else {
                multiply_block<true, true>(above + k + REST, below + k + REST, a.stride, b);
                multiply_block<true, false>(above + k, below + k, a.stride, b);
                multiply_block<false, true>(above + k, below + k, a.stride, b + REST * WIDTH);
            }
        }
        for (; fetched < coming.count; fetched++) coming.fetch(fetched);
        MatrixUnit::store<0>(upper, WIDTH), MatrixUnit::store<2>(lower, WIDTH);
        if (NV > 1)
            MatrixUnit::store<1>(upper + LANES, WIDTH), MatrixUnit::store<3>(lower + LANES, WIDTH);
    }

    // Sums += A B, as deep as the unit goes at once; what is not loaded is what it was before.
    template <bool LOADS_A, bool LOADS_B>
    static void multiply_block(const float* above, const float* below, int64_t stride,
                               const float* b) {
        constexpr int64_t WIDTH = NV * LANES;
        if (LOADS_A) MatrixUnit::load<4>(above, stride);
        if (LOADS_B) MatrixUnit::load<6>(b, WIDTH);
        MatrixUnit::multiply<0, 4, 6>();
        if (LOADS_A) MatrixUnit::load<5>(below, stride);
        MatrixUnit::multiply<2, 5, 6>();
        if (NV == 1) return;
        if (LOADS_B) MatrixUnit::load<7>(b + LANES, WIDTH);
        MatrixUnit::multiply<1, 4, 7>(), MatrixUnit::multiply<3, 5, 7>();
    }
#endif
};

// Calls `f` with the first row of each tile of `rows`, and the tile's rows as a constant. Higher
// ones come in runs of whole tiles of the usual height, so that what is left is such tiles again.
template <int NV, class F>
inline void each_tile(int64_t rows, F f) {
    constexpr int ROWS = most_rows(NV), RUN = TILE_ROWS * TILE_VECTORS;
    static_assert(RUN % ROWS == 0);
    int64_t first = 0;
    if constexpr (ROWS > TILE_ROWS)
        for (; first + RUN <= rows; first += RUN)
            for (int64_t i = 0; i < RUN; i += ROWS) f(first + i, Constant<ROWS>{});
    for (; first < rows; first += TILE_ROWS) f(first, Constant<TILE_ROWS>{});
}

// Panels of B are PANEL columns wide; the last is as many vectors wide as the rest needs.
struct Panels {
    int64_t columns, depth;

    int64_t count() const { return pieces(columns, PANEL); }
    // Only the last panel may be narrower: those before it are PANEL wide, which offset() rests on.
    int64_t padded() const { return up_to(columns, LANES); }
    int vectors(int64_t panel) const {
        return int(smaller(TILE_VECTORS, pieces(columns - panel * PANEL, LANES)));
    }
    int64_t elements() const { return padded() * depth; }
    int64_t offset(int64_t panel) const { return panel * PANEL * depth; }
};

// Calls `f` with what the operands are, as a constant: floats or pairs.
template <class F>
inline void with_pairs(bool pairs, F f) {
    if (!MULTIPLIES_PAIRS || !pairs) return f(Constant<FLOATS>{});
#if defined(FFK_ON_MATRIX_UNIT)
    const MatrixUnit unit;
#endif
    f(Constant<MULTIPLIES_PAIRS ? BFLOAT16_PAIRS : FLOATS>{});
}

// The same of any kind.
template <class F>
inline void with_operands(Operands kind, F f) {
    if (!MULTIPLIES_SPLIT_PAIRS || kind != SPLIT_PAIRS)
        return with_pairs(kind == BFLOAT16_PAIRS, f);
#if defined(FFK_ON_MATRIX_UNIT)
    const MatrixUnit unit;
#endif
    f(Constant<MULTIPLIES_SPLIT_PAIRS ? SPLIT_PAIRS : FLOATS>{});
}

// Calls `f` with the panel's number of vectors as a constant.
template <class F>
inline void with_vectors(int vectors, F f) {
    if (vectors == TILE_VECTORS)
        f(Constant<TILE_VECTORS>{});
    else if (vectors == 2)
        f(Constant<2>{});
    else
        f(Constant<1>{});
}

}  // namespace
