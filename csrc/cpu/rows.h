// Rows of the batch: where they lie, what they weigh, and their copies in the layouts that the
// products stream.
#pragma once
#include "interface.h"
#include "tile.h"

namespace {

inline int64_t in_of(const ffk::Call& call) { return call.layer.weight.columns; }
inline int64_t out_of(const ffk::Call& call) { return call.layer.weight.rows; }
inline float* weight_at(const ffk::Call& call) { return static_cast<float*>(call.layer.weight.at); }
// Whether the operands of products are rounded.
inline bool rounds(const ffk::Call& call) { return call.layer.compute_dtype != ffk::FLOAT32; }
inline int64_t bytes_of(ffk::Dtype dtype) { return dtype == ffk::FLOAT32 ? 4 : 2; }
inline const ffk::Matrix& side_of(const ffk::Call& call, int side) {
    return side ? call.rows.x_neg : call.rows.x_pos;
}
inline int64_t rows_of(const ffk::Call& call, int side) { return side_of(call, side).rows; }

// What a call's products multiply, and how many places `n` numbers take along their depth.
inline Operands operands_of(const ffk::Call& call) {
    if (MULTIPLIES_PAIRS && call.layer.compute_dtype == ffk::BFLOAT16) return BFLOAT16_PAIRS;
    return MULTIPLIES_SPLIT_PAIRS && call.layer.compute_dtype == ffk::FLOAT32
                   && call.layer.precision == ffk::PRECISION_HIGH
               ? SPLIT_PAIRS
               : FLOATS;
}
inline int64_t places(const ffk::Call& call, int64_t n) {
    const Operands kind = operands_of(call);
    return pieces(n, numbers_at_once(kind)) * places_at_once(kind);
}

// Zeros behind `n` numbers, up to the end of their places.
inline void end_pairs(float* places, int64_t n) {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(places);
    std::memset(numbers + n, 0, size_t(up_to(n, 2 * PAIRS_AT_ONCE) - n) * 2);
}

// `n` numbers to pairs.
inline void to_pairs(const float* values, int64_t n, float* to) {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(to);
    int64_t k = 0;
    if (MULTIPLIES_PAIRS)
        for (; k + 2 * LANES <= n; k += 2 * LANES)
            store(to + k / 2, to_pairs(load(values + k), load(values + k + LANES)));
    for (; k < n; k++) numbers[k] = to_bfloat16(values[k]);
    end_pairs(to, n);
}

// `n` numbers to split pairs, whose runs are two vectors long.
static_assert(!MULTIPLIES_SPLIT_PAIRS || PAIRS_AT_ONCE == LANES);
inline void to_split_pairs(const float* values, int64_t n, float* to) {
    const auto some = [&](int64_t k) { return k < n ? load_some(values + k, n - k) : vec{}; };
    for (int64_t k = 0; k < n; k += 2 * LANES) {
        const Parts first = parts_of(some(k)), second = parts_of(some(k + LANES));
        store(to + k, to_pairs(first.nearest, second.nearest));
        store(to + k + LANES, to_pairs(first.rest, second.rest));
    }
}

// `n` numbers to the nearest ones of a narrow dtype; float16's digits alone, as what is multiplied
// in float32 needs no range of its own.
inline void round_all(const float* values, int64_t n, ffk::Dtype dtype, float* to) {
    if (dtype == ffk::BFLOAT16) return round_all(values, n, to);
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) store(to + k, to_eleven_digits(load(values + k)));
    for (; k < n; k++) to[k] = to_eleven_digits(values[k]);
}

// One input row as float32 operands: narrow numbers are widened, and float32 rounded where the
// products are narrow ones.
struct Row {
    const void* at;
    ffk::Dtype dtype, products;

    float operator[](int64_t k) const {
        if (dtype != ffk::FLOAT32) return exact(k);
        const float value = exact(k);
        if (products == ffk::FLOAT16) return to_eleven_digits(value);
        return products == ffk::BFLOAT16 ? rounded(value) : value;
    }

    // The row itself where its numbers are its operands, else its operands in `scratch` `[n]`.
    const float* operands(int64_t n, float* scratch) const {
        if (dtype == ffk::FLOAT32 && products == ffk::FLOAT32) return static_cast<const float*>(at);
        if (dtype == ffk::FLOAT32) {
            round_all(static_cast<const float*>(at), n, products, scratch);
            return scratch;
        }
        int64_t k = 0;
        for (; k + LANES <= n; k += LANES) store(scratch + k, exact_vector(k));
        for (; k < n; k++) scratch[k] = exact(k);
        return scratch;
    }

    // The same in pairs of bfloat16; `scratch`: as many places as they take.
    const float* pairs(int64_t n, float* scratch) const {
        if (dtype == ffk::FLOAT32) {
            to_pairs(static_cast<const float*>(at), n, scratch);
            return scratch;
        }
        // bfloat16 numbers in memory are pairs as they lie, if whole places of them are.
        if (n % (2 * PAIRS_AT_ONCE) == 0 && reinterpret_cast<uintptr_t>(at) % 4 == 0)
            return static_cast<const float*>(at);
        std::memcpy(scratch, at, size_t(n) * 2);
        end_pairs(scratch, n);
        return scratch;
    }

    // The same as places of any kind; only float32 rows are split.
    const float* places(Operands kind, int64_t n, float* scratch) const {
        if (kind == FLOATS) return operands(n, scratch);
        if (kind == BFLOAT16_PAIRS) return pairs(n, scratch);
        to_split_pairs(static_cast<const float*>(at), n, scratch);
        return scratch;
    }

    float exact(int64_t k) const {
        if (dtype == ffk::FLOAT32) return static_cast<const float*>(at)[k];
        const uint16_t number = static_cast<const uint16_t*>(at)[k];
        return dtype == ffk::BFLOAT16 ? from_bfloat16(number) : from_float16(number);
    }
    vec exact_vector(int64_t k) const {
        if (dtype == ffk::FLOAT32) return load(static_cast<const float*>(at) + k);
        const uint16_t* numbers = static_cast<const uint16_t*>(at) + k;
        return dtype == ffk::BFLOAT16 ? from_bfloat16(numbers) : from_float16(numbers);
    }
};

// Row `i` of the joint batch.
inline Row row_of(const ffk::Call& call, int64_t i) {
    // The negative side's rows follow the positive side's.
    const int side = i < rows_of(call, 0) ? 0 : 1;
    const int64_t bytes = bytes_of(call.rows.x_pos.dtype);
    const char* base = static_cast<const char*>(side_of(call, side).at);
    return {base + (side ? i - rows_of(call, 0) : i) * side_of(call, side).stride * bytes,
            call.rows.x_pos.dtype, call.layer.compute_dtype};
}

// Of the row as it came: normalisation is not a product, and is not rounded.
inline float sum_of_squares(const Row& row, int64_t n) {
    vec total[4] = {};
    int64_t k = 0;
    for (; k + 4 * LANES <= n; k += 4 * LANES)
        for (int v = 0; v < 4; v++) {
            const vec part = row.exact_vector(k + v * LANES);
            total[v] += part * part;
        }
    float rest = 0;
    for (; k < n; k++) rest += row.exact(k) * row.exact(k);
    return sum((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

inline float dot(const float* a, const float* b, int64_t n) {
    vec total[2] = {};
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES)
        for (int v = 0; v < 2; v++) total[v] += load(a + k + v * LANES) * load(b + k + v * LANES);
    float rest = 0;
    for (; k < n; k++) rest += a[k] * b[k];
    return sum(total[0] + total[1]) + rest;
}

// ffkernels/normalisation.py, row_scale.
inline float row_scale(const ffk::Call& call, float sumsq) {
    if (call.layer.norm == ffk::NORM_NONE) return 1;
    if (sumsq == 0) return 0;
    const float square = call.layer.norm == ffk::NORM_RMS ? sumsq / float(in_of(call)) : sumsq,
                eps = float(call.layer.eps);
    if (call.layer.eps_mode == ffk::EPS_INSIDE) return 1 / __builtin_sqrtf(square + eps);
    const float norm = __builtin_sqrtf(square);
    if (call.layer.eps_mode == ffk::EPS_CLAMP) return 1 / (norm < eps ? eps : norm);
    return 1 / (norm + eps);
}

// The scale of row `i` of the joint batch.
inline float scale_of_row(const ffk::Call& call, int64_t i) {
    if (call.layer.norm == ffk::NORM_NONE) return 1;
    return row_scale(call, call.rows.input_sumsq != nullptr
                               ? call.rows.input_sumsq[i]
                               : sum_of_squares(row_of(call, i), in_of(call)));
}

// Up to LANES rows become the columns of a panel: panel[k * width + lane] = rows[lane][k], zeros
// beyond `valid`.
inline void pack_columns(const float* const* rows, int valid, int64_t depth, float* panel,
                         int64_t width) {
    for (int64_t k = 0; k < depth; k += LANES) {
        // The last ones come once more, with those before them.
        const int64_t first = depth < LANES ? 0 : smaller(k, depth - LANES),
                      count = smaller(LANES, depth - first);
        vec v[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            v[i] = i < valid ? load_some(rows[i] + first, count) : vec{};
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (i < count) store(panel + (first + i) * width, v[i]);
    }
}

// A row becomes row `k` of every panel; zeros beyond its end.
inline void pack_row(const float* row, const Panels& panels, int64_t k, float* packed) {
    for (int64_t p = 0; p < panels.count(); p++) {
        // A panel's rows are as wide as the panel, so the last one's may be shorter.
        const int64_t width = panels.vectors(p) * LANES, first = p * PANEL;
        const int64_t valid = smaller(width, panels.columns - first);
        float* into = packed + panels.offset(p) + k * width;
        int64_t j = 0;
        for (; j + LANES <= valid; j += LANES) store(into + j, load(row + first + j));
        for (; j < width; j++) into[j] = j < valid ? row[first + j] : 0;
    }
}

}  // namespace
