// Activities and slopes that the caller brings, in the layout that the update reads: the last stage
// of a step whose objective was somebody else's.
#pragma once
#include "peers.h"

namespace {

struct Given {
    const ffk::Call& call;
    const Peers& peers;
    Chunks chunks;
    int64_t stride;      // of y_t
    float* y_t;          // [units, columns]: activities, where somebody sees them before the update
    float* scale;        // per column: r
    float* coefficient;  // per column
    float* basis_t;      // [units, basis_stride]
    int64_t basis_stride;
    float* first_t;  // per vector of columns: [groups, LANES], what the basis is multiplied by
    float* scratch;  // per worker: a chunk's activities, its slopes of one vector of columns, and
                     // where among them each unit's lie
    int64_t scratch_size, y_scratch, slope_scratch;

    Given(const ffk::Call& c, const Peers& p, const Block& largest, Memory& memory)
        : call(c),
          peers(p),
          chunks(c, largest.operands()),
          stride(stride_for(largest.columns() + LANES)),
          basis_stride(up_to(c.slopes.basis.rows, LANES)) {
        const bool keeps_y = peers.there();
        y_t = keeps_y ? memory.take(up_to(out_of(call), TILE_ROWS) * stride) : nullptr;
        scale = memory.take(largest.columns()), coefficient = memory.take(largest.columns());
        basis_t = memory.take(out_of(call) * basis_stride);
        first_t = memory.take(largest.columns() * call.slopes.basis.rows);
        y_scratch = keeps_y ? 0 : chunks.rows * stride, slope_scratch = chunks.rows * LANES;
        scratch_size = up_to(y_scratch + 2 * (slope_scratch + chunks.rows), 16);
        scratch = memory.take(scratch_size * call.threads);
    }

    // One slope for a whole row weighs it, as a compiled objective's coefficient does.
    bool by_row() const {
        return call.slopes.first.at == nullptr && call.slopes.second.columns == 1 && !peers.gated();
    }
    bool has_basis() const { return call.slopes.basis.at != nullptr; }

    static const float* row(const ffk::Matrix& matrix, int64_t i) {
        return static_cast<const float*>(matrix.at) + i * matrix.stride;
    }

    template <class F>
    void each_row(const Block& block, F f) const {
        for (int64_t g = 0; g < block.groups; g++)
            parallel(block.count(g), workers_for(call, block.count(g) * out_of(call) * 64),
                     [&](int64_t i, int) { f(block.row(g, i), block.column(g, i)); });
    }

    // to[k * width + lane] = matrix[row of a column, first + k], for the vector of columns that
    // begins with `column`; zeros where there is no row.
    static void transpose_rows(const Block& block, const ffk::Matrix& matrix, int64_t column,
                               int64_t first, int64_t count, float* to, int64_t width) {
        // Columns without a row are the last ones of a vector: groups of copies are padded.
        const int64_t group = block.field.copies ? column / block.stride : 0,
                      i = column - group * block.stride,
                      valid = smaller(LANES, block.operands() - i);
        const float* rows[LANES] = {};
        for (int64_t j = 0; j < valid; j++)
            rows[j] =
                row(matrix, group ? block.row(group, i + j) : block.operand_row(i + j)) + first;
        pack_columns(rows, int(valid), count, to, width);
    }

    // What the units of all chunks share.
    void start() const {
        const ffk::Matrix& basis = call.slopes.basis;
        const float* rows[LANES] = {};
        for (int64_t k = 0; k < basis.rows; k += LANES) {
            const int64_t valid = smaller(LANES, basis.rows - k);
            for (int64_t j = 0; j < valid; j++) rows[j] = row(basis, k + j);
            pack_columns(rows, int(valid), out_of(call), basis_t + k, basis_stride);
        }
    }

    // Scales and coefficients of a block's rows, and the first slopes' left factor.
    void weigh(const Block& block) const {
        const ffk::Matrix &first = call.slopes.first, &second = call.slopes.second;
        std::memset(scale, 0, size_t(block.columns()) * 4);
        std::memset(coefficient, 0, size_t(block.columns()) * 4);
        each_row(block, [&](int64_t i, int64_t column) {
            scale[column] = scale_of_row(call, i);
            // A row without any slope has no part in the sum, whatever it holds.
            const auto takes_part = [&] {
                return any_slope(first, i) || any_slope(second, i)
                       || (peers.gated() && peers.is_positive(i));
            };
            coefficient[column] = by_row() ? 2 * row(second, i)[0] : float(takes_part());
        });
        for (int64_t column = 0; has_basis() && column < block.columns(); column += LANES)
            transpose_rows(block, first, column, 0, first.columns, first_t + column * first.columns,
                           LANES);
    }

    static bool any_slope(const ffk::Matrix& slope, int64_t i) {
        if (slope.at == nullptr) return false;
        const float* values = row(slope, i);
        for (int64_t j = 0; j < slope.columns; j++)
            if (values[j] != 0) return true;
        return false;
    }

    float* y_of(int64_t chunk, int worker) const {
        return y_t != nullptr ? y_t + chunks.first(chunk) * stride
                              : scratch + worker * scratch_size;
    }

    // Activities of a chunk's units, or z of a curve: kept [units, columns].
    void read(const Block& block, int64_t chunk, float* kept) const {
        for (int64_t column = 0; column < block.columns(); column += LANES)
            transpose_rows(block, call.slopes.activity, column, chunks.first(chunk),
                           chunks.size(chunk), kept + column, stride);
    }

    // Reads a block, and shows it to the pull.
    void show(const Block& block) const {
        parallel(chunks.count(), workers_for(call, block.columns() * out_of(call) * 64),
                 [&](int64_t chunk, int worker) {
                     float* kept = y_of(chunk, worker);
                     read(block, chunk, kept);
                     peers.see(block, chunks.first(chunk), chunks.size(chunk), kept, stride);
                 });
    }

    // A chunk's activities (of a curve, its z) become `y act'(z)` beside one slope a row, else
    // `(s1 + 2 s2 y) act'(z)`.
    void apply(const Block& block, int64_t chunk, int worker, float* kept) const {
        float* own = scratch + worker * scratch_size + y_scratch;
        const SlopesOfUnits first{*this, call.slopes.first, chunk, own},
            second{*this, call.slopes.second, chunk, own + slope_scratch + chunks.rows};
        const bool whole = by_row();
        with_activation(call, [&](auto act) {
            for (int64_t column = 0; column < block.columns(); column += LANES) {
                if (!whole) first.read(block, column), second.read(block, column);
                for (int64_t o = 0; o < chunks.size(chunk); o++) {
                    float* at = kept + o * stride + column;
                    const Active a = act(load(at));
                    vec slope = a.y;
                    if (!whole && second.there()) {
                        slope = 2 * second.of(o) * a.y;
                        if (first.there()) slope += first.of(o);
                    } else if (!whole)
                        slope = first.of(o);
                    slope *= a.slope;
                    if (peers.gated())
                        slope += peers.pulled(chunks.first(chunk) + o, column, a.slope);
                    store(at, slope);
                }
            }
        });
    }

    // The slopes of a chunk's units, for one vector of columns at a time.
    struct SlopesOfUnits {
        const Given& given;
        const ffk::Matrix& matrix;
        int64_t chunk;
        float* values;   // [groups, LANES]
        int32_t* place;  // per unit: its group's among them
        int64_t begin, count;
        bool has_basis;

        SlopesOfUnits(const Given& g, const ffk::Matrix& m, int64_t c, float* own)
            : given(g), matrix(m), chunk(c), values(own) {
            if (!there()) return;
            const int64_t units = out_of(given.call), first = given.chunks.first(chunk),
                          size = given.chunks.size(chunk);
            has_basis = given.has_basis() && &matrix == &given.call.slopes.first;
            const Groups groups{units, has_basis ? units : matrix.columns};
            place = reinterpret_cast<int32_t*>(own + given.slope_scratch);
            begin = groups.of(first);
            for (int64_t o = 0; o < size; o++)
                place[o] = int32_t(groups.of(first + o) - begin) * LANES;
            count = place[size - 1] / LANES + 1;
        }

        bool there() const { return matrix.at != nullptr; }
        vec of(int64_t o) const { return load(values + place[o]); }

        void read(const Block& block, int64_t column) const {
            if (!there()) return;
            if (!has_basis)
                return transpose_rows(block, matrix, column, begin, count, values, LANES);
            const int64_t depth = matrix.columns;
            for (int64_t o = 0; o < count; o += TILE_ROWS) {
                const TileRows basis(given.basis_t + (begin + o) * given.basis_stride,
                                     given.basis_stride, count - o);
                Tile<1> tile;
                tile.clear();
                tile.template multiply<FLOATS>(basis, 0, given.first_t + column * depth, depth);
                tile.write(values + o * LANES, LANES);
            }
        }
    };
};

}  // namespace
