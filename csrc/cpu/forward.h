// The forward half: rows become the columns of Z^T = W X^T, so that the weight is read as it lies and never packed.
#pragma once
#include "block.h"

namespace {

struct Forward {
    const ffk::Call& call;
    Chunks chunks;
    bool pairs;
    int64_t depth;         // of the product, in places
    int64_t field_first, field_depth;
    int64_t stride;        // of y_t
    float* packed;         // X^T in panels; the change of the twins' label field behind it
    float* change;
    float* scale;          // per column: r
    float* sumsq;          // per column: of the results
    float* partial;        // [chunks, columns]: its parts
    float* scratch;        // per worker: rounded rows, a chunk's rounded weights, and, for the operator alone, its y_t
    int64_t scratch_size, weight_scratch, weight_stride, y_scratch;
    bool copies_weights;

    Forward(const ffk::Call& c, const Block& largest, bool keeps_y, Memory& memory)
        : call(c), chunks(c.out, largest.operands()), pairs(in_pairs(c)), depth(places(c, c.in)), stride(stride_for(largest.columns())) {
        const int64_t rows = largest.operands(), columns = largest.columns();
        const Field field = largest.field;
        field_first = pairs ? field.first / 2 : field.first;
        field_depth = field.count ? places(call, field.first + field.count) - field_first : 0;
        packed = memory.take(up_to(rows, LANES) * depth);
        change = memory.take(up_to(rows, LANES) * field_depth);
        scale = memory.take(columns), sumsq = memory.take(columns);
        partial = memory.take(chunks.count() * columns);
        // Rows a power of two apart fall onto the same cache lines: many products with them are worth a copy.
        copies_weights = call.bfloat16 || (call.in % 512 == 0 && rows >= 512);
        weight_stride = stride_for(depth);
        weight_scratch = copies_weights ? chunks.rows * weight_stride : 0;
        y_scratch = keeps_y ? 0 : chunks.rows * stride + 4;  // the last four columns are read as one
        scratch_size = up_to(LANES * depth + weight_scratch + y_scratch, 16);
        scratch = memory.take(scratch_size * call.threads);
    }

    void run(const Block& block, float* kept_y_t) const {
        const int workers = workers_for(call, block.operands() * call.in * call.out);
        pack(block, workers);
        parallel(chunks.count(), workers, [&](int64_t chunk, int worker) {
            float* own = scratch + worker * scratch_size;
            float* y_t = kept_y_t != nullptr ? kept_y_t + chunks.first(chunk) * stride : own + weight_scratch;
            with_pairs(pairs, [&](auto in_pairs) {
                multiply<decltype(in_pairs)::value>(block, chunk, weights(chunk, own), y_t);
            });
            if (call.y != nullptr) write_rows(block, chunk, y_t);
            if (kept_y_t != nullptr && call.activation == ffk::LEAKY_RELU) gate(block, chunk, y_t);
        });
        for (int64_t i = 0; i < block.columns(); i++) {
            float total = 0;
            for (int64_t chunk = 0; chunk < chunks.count(); chunk++) total += partial[chunk * block.columns() + i];
            sumsq[i] = total;
        }
        for (int side = 0; side < 2; side++)
            if (block.rows[side]) std::memcpy(call.sumsq + (side ? call.rows[0] : 0) + block.start[side],
                        sumsq + block.column(side, 0), size_t(block.rows[side]) * 4);
    }

    // Which row of which side an operand is: twins' operands are the positive rows.
    static int side_of(const Block& block, int64_t& i) {
        if (i < block.rows[0]) return 0;
        i -= block.rows[0];
        return 1;
    }

    void pack(const Block& block, int workers) const {
        const Panels panels{block.operands(), depth}, fields{block.operands(), field_depth};
        std::memset(scale, 0, size_t(block.columns()) * 4);
        parallel(panels.padded() / LANES, workers, [&](int64_t group, int worker) {
            const int64_t first = group * LANES, panel = first / PANEL, lane = first % PANEL;
            const int64_t width = panels.vectors(panel) * LANES;
            const int valid = int(smaller(LANES, block.operands() - first));
            float* own = scratch + worker * scratch_size;
            const float* rows[LANES] = {};
            for (int j = 0; j < valid; j++) {
                int64_t i = first + j;
                const int side = side_of(block, i);
                const Row row = row_of(call, side, block.start[side] + i);
                rows[j] = pairs ? row.pairs(call.in, own + j * depth) : row.operands(call.in, own + j * depth);
                set_scale(block, side, i, row);
                if (block.field.twins) set_scale(block, 1, i, row_of(call, 1, block.start[1] + i));
            }
            pack_columns(rows, valid, depth, packed + panels.offset(panel) + lane, width);
            float* into = change + fields.offset(panel) + lane;
            for (int64_t k = 0; k < field_depth; k++)
                for (int j = 0; j < LANES; j++) into[k * width + j] = j < valid ? change_at(block, first + j, field_first + k) : 0;
        });
    }

    // The place `k` of x_neg - x_pos.
    float change_at(const Block& block, int64_t twin, int64_t k) const {
        if (!pairs) return change_of(call, block, twin, k);
        return pair_of(to_bfloat16(change_of(call, block, twin, 2 * k)), to_bfloat16(change_of(call, block, twin, 2 * k + 1)));
    }

    void set_scale(const Block& block, int side, int64_t i, const Row& row) const {
        float& r = scale[block.column(side, i)];
        if (call.norm == ffk::NORM_NONE) {
            r = 1;
            return;
        }
        const int64_t at = (side ? call.rows[0] : 0) + block.start[side] + i;
        r = row_scale(call, call.input_sumsq != nullptr ? call.input_sumsq[at] : sum_of_squares(row, call.in));
    }

    struct Weights {
        const float* at;
        int64_t stride;
    };

    Weights weights(int64_t chunk, float* own) const {
        const float* at = call.weight + chunks.first(chunk) * call.in;
        if (!copies_weights) return {at, call.in};
        for (int64_t o = 0; o < chunks.size(chunk); o++, at += call.in) {
            float* to = own + o * weight_stride;
            if (pairs) to_pairs(at, call.in, to);
            else if (call.bfloat16) round_all(at, call.in, to);
            else std::memcpy(to, at, size_t(call.in) * 4);
        }
        return {own, weight_stride};
    }

    template <bool PAIRS>
    void multiply(const Block& block, int64_t chunk, Weights w, float* y_t) const {
        const Panels panels{block.operands(), depth}, fields{block.operands(), field_depth};
        const int64_t out = chunks.size(chunk);
        float* q = partial + chunk * block.columns();
        for (int64_t k = 0; k < depth; k += DEPTH) {
            const int64_t part = smaller(DEPTH, depth - k);
            const bool last = k + part == depth;
            for (int64_t p = 0; p < panels.count(); p++)
                with_vectors(panels.vectors(p), [&](auto vectors) {
                    constexpr int NV = decltype(vectors)::value;
                    for (int64_t o = 0; o < out; o += TILE_ROWS) {
                        const TileRows a(w.at + o * w.stride, w.stride, out - o);
                        float* to = y_t + o * stride + p * PANEL;
                        Tile<NV> tile;
                        tile.expect(to, stride);
                        tile.clear();
                        tile.template multiply<PAIRS>(a, k, packed + panels.offset(p) + k * NV * LANES, part);
                        if (k > 0) tile.add(to, stride);
                        if (!last) {
                            tile.write(to, stride);
                            continue;
                        }
                        const int64_t unit = chunks.first(chunk) + o;
                        finish(tile, a.valid, unit, p * PANEL, to, q + p * PANEL, o == 0);
                        if (!block.field.twins) continue;
                        tile.template multiply<PAIRS>(a, field_first, change + fields.offset(p), field_depth);
                        finish(tile, a.valid, unit, block.negative + p * PANEL, to + block.negative,
                               q + block.negative + p * PANEL, o == 0);
                    }
                });
        }
    }

    // z = r acc + b, y = act(z), q += y^2; the accumulators stay as they are.
    template <int NV>
    __attribute__((always_inline)) void finish(
        const Tile<NV>& tile, int valid, int64_t unit, int64_t column, float* y, float* q, bool first
    ) const {
        const bool relu = call.activation == ffk::RELU, leaky = call.activation == ffk::LEAKY_RELU;
        const float* biases = call.bias;
        const int64_t y_stride = stride;
        vec r[NV], squares[NV];
        for (int v = 0; v < NV; v++) {
            r[v] = load(scale + column + v * LANES);
            squares[v] = first ? vec{} : load(q + v * LANES);
        }
#pragma GCC unroll 16
        for (int m = 0; m < TILE_ROWS; m++) {
            if (m >= valid) break;
            const float bias = biases != nullptr ? biases[unit + m] : 0;
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                vec z = tile.at[m][v] * r[v] + bias;
                if (relu) z = z < 0 ? vec{} : z;
                if (leaky) z = z < 0 ? z * 0.01f : z;
                store(y + m * y_stride + v * LANES, z);
                squares[v] += z * z;
            }
        }
        for (int v = 0; v < NV; v++) store(q + v * LANES, squares[v]);
    }

    // y_t [units, columns] to y [rows, out].
    void write_rows(const Block& block, int64_t chunk, const float* y_t) const {
        if (call.bfloat16) write_rows<uint16_t, quad_of_halves>(block, chunk, y_t);
        else write_rows<float, quad>(block, chunk, y_t);
    }

    template <class Number, class Four>
    void write_rows(const Block& block, int64_t chunk, const float* y_t) const {
        const int64_t first = chunks.first(chunk), units = chunks.size(chunk), out = call.out, width = stride;
        for (int side = 0; side < 2; side++) {
            const int64_t start = (side ? call.rows[0] : 0) + block.start[side], column = block.column(side, 0);
            Number* y = static_cast<Number*>(call.y) + start * out + first;
            for (int64_t i = 0; i < block.rows[side]; i += 4) {
                const int64_t rows = smaller(4, block.rows[side] - i);
                for (int64_t o = 0; o < units; o += 4) {
                    const int64_t valid = smaller(4, units - o);
                    quad q[4] = {};
                    for (int64_t j = 0; j < valid; j++)
                        q[j] = *reinterpret_cast<const quad_in_memory*>(y_t + (o + j) * width + column + i);
                    transpose(q[0], q[1], q[2], q[3]);
                    for (int64_t j = 0; j < rows; j++) {
                        const Four numbers = to_numbers(q[j], Four{});
                        Number* to = y + (i + j) * out + o;
                        if (valid == 4) std::memcpy(to, &numbers, sizeof numbers);
                        else std::memcpy(to, &numbers, size_t(valid) * sizeof(Number));
                    }
                }
            }
        }
    }

    static quad to_numbers(quad values, quad) { return values; }
    static quad_of_halves to_numbers(quad values, quad_of_halves) { return to_bfloat16(values); }

    // y to y act'(z), where they differ: the slope of leaky ReLU once more.
    void gate(const Block& block, int64_t chunk, float* y_t) const {
        for (int64_t o = 0; o < chunks.size(chunk); o++)
            for (int64_t i = 0; i < block.columns(); i += LANES) {
                float* at = y_t + o * stride + i;
                const vec y = load(at);
                store(at, y < 0 ? y * 0.01f : y);
            }
    }
};

}  // namespace
