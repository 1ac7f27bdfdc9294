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

// A's rows for one tile. A tile at the edge reads its last row several times, on AMX's unit
// whatever lies behind it, and writes only `valid` rows.
struct TileRows {
    const float* row[TILE_ROWS];
    int64_t stride;
    int valid;

    TileRows(const float* a, int64_t row_stride, int64_t rows)
        : stride(row_stride), valid(int(smaller(rows, TILE_ROWS))) {
        // The product runs over TILE_ROWS rows always: its loop has no bound that varies.
        for (int m = 0; m < TILE_ROWS; m++) row[m] = a + smaller(m, valid - 1) * stride;
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

template <int NV>
struct Tile {
    vec at[TILE_ROWS][NV];

    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 16
        for (int m = 0; m < TILE_ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) at[m][v] = vec{};
    }

    // `c`: [TILE_ROWS, NV * LANES], to be read or written once the tile is multiplied; rows beyond
    // the valid ones may hold anything.
    __attribute__((always_inline)) static void expect(const float* c, int64_t stride) {
        for (int m = 0; m < TILE_ROWS; m++)
            for (int v = 0; v < NV; v++) __builtin_prefetch(c + m * stride + v * LANES, 1);
    }

    __attribute__((always_inline)) void add(const float* c, int64_t stride) {
#pragma GCC unroll 16
        for (int m = 0; m < TILE_ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) at[m][v] += load(c + m * stride + v * LANES);
    }

    // += column row^T.
    __attribute__((always_inline)) void add_outer(const float* column, const float* row) {
#pragma GCC unroll 16
        for (int m = 0; m < TILE_ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) at[m][v] += broadcast(column[m]) * load(row + v * LANES);
    }

    __attribute__((always_inline)) void write(float* c, int64_t stride) const {
#pragma GCC unroll 16
        for (int m = 0; m < TILE_ROWS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) store(c + m * stride + v * LANES, at[m][v]);
    }

    // += A[:, first : first + depth] B; `b`: [depth, NV * LANES]. With PAIRS every place of both
    // holds two bfloat16 numbers.
    template <bool PAIRS>
    __attribute__((always_inline)) void multiply(const TileRows& a, int64_t first, const float* b,
                                                 int64_t depth, const Coming& coming = {}) {
#if defined(__AMX_BF16__)
        if constexpr (PAIRS) return multiply_on_unit(a, first, b, depth, coming);
#endif
        const float* row[TILE_ROWS];
        for (int m = 0; m < TILE_ROWS; m++) row[m] = a.row[m] + first;
        for (int64_t k = 0; k < depth; k++, b += NV * LANES) {
            if (k < coming.count) coming.fetch(k);
            vec column[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                column[v] = load(b + v * LANES);
                __builtin_prefetch(b + (AHEAD * NV + v) * LANES);
            }
#pragma GCC unroll 16
            for (int m = 0; m < TILE_ROWS; m++) {
                const vec element = PAIRS ? vec{} : broadcast(row[m][k]);
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    at[m][v] = PAIRS ? add_pairs(at[m][v], row[m] + k, column[v])
                                     : at[m][v] + element * column[v];
            }
        }
        for (int64_t k = depth; k < coming.count; k++) coming.fetch(k);
    }

#if defined(__AMX_BF16__)
    // Tiles 0 to 3 are the sums: 0 and 1 of the upper 16 rows, 2 and 3 of the lower ones.
    void multiply_on_unit(const TileRows& a, int64_t first, const float* b, int64_t depth,
                          const Coming& coming) {
        constexpr int64_t WIDTH = NV * LANES;
        float *upper = reinterpret_cast<float*>(at[0]), *lower = reinterpret_cast<float*>(at[16]);
        MatrixUnit::load<0>(upper, WIDTH), MatrixUnit::load<2>(lower, WIDTH);
        if (NV > 1)
            MatrixUnit::load<1>(upper + LANES, WIDTH), MatrixUnit::load<3>(lower + LANES, WIDTH);
        const float *above = a.row[0] + first, *below = above + 16 * a.stride;
        int64_t fetched = 0;
        for (int64_t k = 0; k < depth; k += PAIRS_AT_ONCE, b += PAIRS_AT_ONCE * WIDTH) {
            for (const int64_t due = smaller(k + PAIRS_AT_ONCE, coming.count); fetched < due;
                 fetched++)
                coming.fetch(fetched);
            MatrixUnit::load<4>(above + k, a.stride), MatrixUnit::load<6>(b, WIDTH);
            MatrixUnit::multiply<0, 4, 6>();
            MatrixUnit::load<5>(below + k, a.stride);
            MatrixUnit::multiply<2, 5, 6>();
            if (NV == 1) continue;
            MatrixUnit::load<7>(b + LANES, WIDTH);
            MatrixUnit::multiply<1, 4, 7>(), MatrixUnit::multiply<3, 5, 7>();
        }
        for (; fetched < coming.count; fetched++) coming.fetch(fetched);
        MatrixUnit::store<0>(upper, WIDTH), MatrixUnit::store<2>(lower, WIDTH);
        if (NV > 1)
            MatrixUnit::store<1>(upper + LANES, WIDTH), MatrixUnit::store<3>(lower + LANES, WIDTH);
    }
#endif
};

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

template <auto N>
struct Constant {
    static constexpr auto value = N;
};

// Calls `f` with whether the products multiply pairs, as a constant.
template <class F>
inline void with_pairs(bool pairs, F f) {
    if (!MULTIPLIES_PAIRS || !pairs) return f(Constant<false>{});
#if defined(__AMX_BF16__)
    const MatrixUnit unit;
#endif
    f(Constant<MULTIPLIES_PAIRS>{});
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
