// Activities and slopes that the caller brings, in the layout that the update reads: the last stage
// of a step whose objective was somebody else's.
#pragma once
#include "block.h"

namespace {

// The group of a unit, where `groups` of consecutive units differ in size by one at most, the
// larger ones first.
inline int64_t group_of(int64_t unit, int64_t units, int64_t groups) {
    const int64_t size = units / groups, larger_ones = units % groups;
    const int64_t end = larger_ones * (size + 1);
    return unit < end ? unit / (size + 1) : larger_ones + (unit - end) / size;
}

struct Given {
    const ffk::Call& call;
    Chunks chunks;
    int64_t stride;      // of y_t
    float* y_t;          // [units, columns]: activities, then what the coefficients multiply
    float* scale;        // per column: r
    float* coefficient;  // per column

    Given(const ffk::Call& c, const Block& largest, Memory& memory)
        : call(c),
          chunks(out_of(c), largest.operands()),
          stride(stride_for(largest.columns() + LANES)) {
        y_t = memory.take(up_to(out_of(call), TILE_ROWS) * stride);
        scale = memory.take(largest.columns()), coefficient = memory.take(largest.columns());
    }

    // One slope for a whole row weighs it, as a compiled objective's coefficient does.
    bool by_row() const {
        return call.slopes.first.at == nullptr && call.slopes.second.columns == 1;
    }

    static const float* row(const ffk::Matrix& matrix, int64_t i) {
        return static_cast<const float*>(matrix.at) + i * matrix.stride;
    }

    template <class F>
    void each_row(const Block& block, F f) const {
        for (int64_t g = 0; g < block.groups; g++)
            parallel(block.count(g), workers_for(call, block.count(g) * out_of(call) * 64),
                     [&](int64_t i, int) { f(block.row(g, i), block.column(g, i)); });
    }

    void read(const Block& block) const {
        std::memset(scale, 0, size_t(block.columns()) * 4);
        std::memset(coefficient, 0, size_t(block.columns()) * 4);
        parallel(chunks.count(), workers_for(call, block.columns() * out_of(call) * 64),
                 [&](int64_t chunk, int) {
                     for (int64_t o = chunks.first(chunk);
                          o < chunks.first(chunk) + chunks.size(chunk); o++) {
                         float* to = y_t + o * stride;
                         std::memset(to, 0, size_t(block.columns()) * 4);
                         for (int64_t g = 0; g < block.groups; g++)
                             for (int64_t i = 0; i < block.count(g); i++)
                                 to[block.column(g, i)] =
                                     row(call.slopes.activity, block.row(g, i))[o];
                     }
                 });
        each_row(block, [&](int64_t i, int64_t column) { scale[column] = scale_of_row(call, i); });
    }

    // Activities become `y act'(z)` beside one slope a row, else `(s1 + 2 s2 y) act'(z)`.
    void apply(const Block& block) const {
        const ffk::Matrix &first = call.slopes.first, &second = call.slopes.second;
        const bool relu = call.layer.activation == ffk::RELU,
                   leaky = call.layer.activation == ffk::LEAKY_RELU, whole = by_row();
        each_row(block, [&](int64_t i, int64_t column) {
            if (whole) coefficient[column] = 2 * row(second, i)[0];
            // A row without any slope has no part in the sum, whatever it holds.
            for (const ffk::Matrix* slope : {&first, &second})
                for (int64_t j = 0; !whole && slope->at != nullptr && j < slope->columns; j++)
                    if (row(*slope, i)[j] != 0) coefficient[column] = 1;
        });
        parallel(chunks.count(), workers_for(call, block.columns() * out_of(call) * 64),
                 [&](int64_t chunk, int) {
                     for (int64_t o = chunks.first(chunk);
                          o < chunks.first(chunk) + chunks.size(chunk); o++)
                         for (int64_t g = 0; g < block.groups; g++)
                             for (int64_t i = 0; i < block.count(g); i++) {
                                 float& y = y_t[o * stride + block.column(g, i)];
                                 const float slope = y > 0 ? 1 : relu ? 0 : leaky ? 0.01f : 1;
                                 y = slope
                                     * (whole ? y : slope_by(first, second, block.row(g, i), o, y));
                             }
                 });
    }

    float slope_by(const ffk::Matrix& first, const ffk::Matrix& second, int64_t i, int64_t unit,
                   float y) const {
        float slope = 0;
        if (second.at != nullptr)
            slope = 2 * row(second, i)[group_of(unit, out_of(call), second.columns)] * y;
        if (first.at != nullptr)
            slope += row(first, i)[group_of(unit, out_of(call), first.columns)];
        return slope;
    }
};

}  // namespace
