// The forward half: rows become the columns of Z^T = W X^T, so that the weight is read as it lies
// and never packed.
#pragma once
#include "block.h"

namespace {

// What the forward pass leaves of each unit for an update: nothing, as there is none; what tells
// value and slope, z of a curve and else y; or y act'(z), where nothing else is asked of a curve.
enum Left { LEFT_NOTHING, LEFT_VALUES, LEFT_SLOPED };

struct Forward {
    const ffk::Call& call;
    Left leaves;
    bool shows;  // whether anybody reads activities
    Chunks chunks;
    Operands operands;
    int64_t depth;  // of the product, in places
    int64_t field_first,
        field_depth;  // the places that the label field touches: of these no group knows another's
    int64_t stride;   // of y_t
    float* packed;    // X^T in panels
    float* fields;  // likewise, one behind the other: what each group of copies has in those places
    float* scale;   // per column: r
    float* sumsq;   // per column: of the results
    float* partial;  // [chunks, columns]: its parts
    float* scratch;  // per worker: rounded rows, a chunk's rounded weights, and, for the operator
                     // alone, its y_t and the product it leaves
    int64_t scratch_size, weight_scratch, weight_stride, y_scratch, product_scratch;
    bool copies_weights;

    // `is_seen`: whether somebody sees a chunk's activities besides the caller.
    Forward(const ffk::Call& c, const Block& largest, Left left, bool is_seen, Memory& memory)
        // Whole vectors are read beyond a group's last column.
        : call(c),
          leaves(left),
          shows(is_seen || c.outputs.y.at != nullptr),
          chunks(c, largest.operands()),
          operands(operands_of(c)),
          depth(places(c, in_of(c))),
          stride(stride_for(largest.columns() + LANES)) {
        const int64_t rows = largest.operands(), columns = largest.columns();
        const Field field = largest.field;
        // Numbers that are multiplied at once cannot be parted: the field grows to whole places.
        field_first = field.first / numbers_at_once(operands) * places_at_once(operands);
        field_depth = field.count ? places(call, field.first + field.count) - field_first : 0;
        packed = memory.take(up_to(rows, LANES) * depth);
        fields = memory.take(up_to(rows, LANES) * field_depth * field.copies);
        scale = memory.take(columns), sumsq = memory.take(columns);
        // A chunk's sums have a place of their own: tasks never add to the same one.
        partial = memory.take(chunks.count() * columns);
        // Rows a power of two apart fall onto the same cache lines: many products with them are
        // worth a copy.
        copies_weights =
            rounds(call) || operands != FLOATS || (in_of(call) % 512 == 0 && rows >= 512);
        weight_stride = stride_for(depth);
        weight_scratch = copies_weights ? chunks.rows * weight_stride : 0;
        y_scratch = leaves && !(is_curved(call) && shows) ? 0 : chunks.rows * stride;
        product_scratch = c.outputs.product_out.at != nullptr ? chunks.rows * stride : 0;
        scratch_size = up_to(LANES * depth + weight_scratch + y_scratch + product_scratch, 16);
        scratch = memory.take(scratch_size * call.threads);
    }

    void run(const Block& block) const {
        run(block, nullptr, [](int64_t, const float*) {});
    }

    // `kept`: [out, stride], for what it leaves of each unit, or null. `see(chunk, y_t)` is called
    // with each chunk's activities [units, stride] while they are warm, if they are shown.
    template <class F>
    void run(const Block& block, float* kept, F see) const {
        const int workers = workers_for(call, block.operands() * in_of(call) * out_of(call));
        pack(block, workers);
        parallel(chunks.count(), workers, [&](int64_t chunk, int worker) {
            float* own = scratch + worker * scratch_size;
            // The rows that packing put into `own` have had their use: a chunk's weights take their
            // place.
            float *z_t =
                      kept != nullptr ? kept + chunks.first(chunk) * stride : own + weight_scratch,
                  *y_t = is_curved(call) && shows ? own + weight_scratch : z_t,
                  *product_t = product_scratch ? own + weight_scratch + y_scratch : nullptr;
            with_operands(operands, [&](auto constant) {
                multiply<decltype(constant)::value>(block, chunk, weights(chunk, own), z_t, y_t,
                                                    product_t);
            });
            if (call.outputs.y.at != nullptr) write_rows(block, chunk, y_t, call.outputs.y);
            if (product_t != nullptr) write_rows(block, chunk, product_t, call.outputs.product_out);
            see(chunk, y_t);
        });
        for (int64_t i = 0; i < block.columns(); i++) {
            // In the order of the chunks, whichever thread had them; of many, a sum in float32
            // would lose digits.
            double total = 0;
            for (int64_t chunk = 0; chunk < chunks.count(); chunk++)
                total += double(partial[chunk * block.columns() + i]);
            sumsq[i] = float(total);
        }
        for (int64_t g = 0; g < block.groups; g++)
            if (block.count(g))
                std::memcpy(call.outputs.sumsq + block.row(g, 0), sumsq + block.column(g, 0),
                            size_t(block.count(g)) * 4);
    }

    void pack(const Block& block, int workers) const {
        const Panels panels{block.operands(), depth};
        std::memset(scale, 0, size_t(block.columns()) * 4);
        parallel(panels.padded() / LANES, workers, [&](int64_t group, int worker) {
            // A task's rows are one vector's lanes: PANEL is a multiple of LANES, so they lie in
            // one panel.
            const int64_t first = group * LANES, panel = first / PANEL, lane = first % PANEL;
            const int64_t width = panels.vectors(panel) * LANES;
            const int valid = int(smaller(LANES, block.operands() - first));
            float* own = scratch + worker * scratch_size;
            const float* rows[LANES] = {};
            for (int j = 0; j < valid; j++) {
                const int64_t i = first + j;
                const Row row = row_of(call, block.operand_row(i));
                rows[j] = row.places(operands, in_of(call), own + j * depth);
                set_scale(i, block.operand_row(i));
                // A copy is another row with another label: its scale is its own.
                for (int64_t g = 1; g <= block.field.copies; g++)
                    set_scale(block.column(g, i), block.row(g, i));
            }
            // Of rows whose product is known the field is read, which is in front.
            pack_columns(rows, valid, block.field.known ? field_depth : depth,
                         packed + panels.offset(panel) + lane, width);
            for (int64_t g = 1; g <= block.field.copies; g++) {
                float* into = field_of(block, g, panel) + lane;
                for (int j = 0; j < LANES; j++) {
                    // Lanes beyond the last row are zero, and read that row only to have one.
                    const Row row = row_of(call, block.row(g, first + smaller(j, valid - 1)));
                    for (int64_t k = 0; k < field_depth; k++)
                        into[k * width + j] = j < valid ? place(row, field_first + k) : 0;
                }
            }
        });
    }

    // A group's panel in the places of the label field.
    float* field_of(const Block& block, int64_t group, int64_t panel) const {
        const Panels panels{block.operands(), depth}, own{block.operands(), field_depth};
        // The first group's lie in its panel, field_first places down it.
        if (group == 0)
            return packed + panels.offset(panel) + field_first * panels.vectors(panel) * LANES;
        return fields + (group - 1) * own.elements() + own.offset(panel);
    }

    // A row's operand in the place `k`.
    float place(const Row& row, int64_t k) const {
        const auto number = [&](int64_t column) {
            const float value = column < in_of(call) ? row[column] : 0;
            return operands == SPLIT_PAIRS ? part_of(value, is_rest(operands, k)) : value;
        };
        if (operands == FLOATS) return number(k);
        const int64_t pair = pair_in(operands, k);
        return pair_of_rounded(number(2 * pair), number(2 * pair + 1));
    }

    void set_scale(int64_t column, int64_t row) const { scale[column] = scale_of_row(call, row); }

    struct Weights {
        const float* at;
        int64_t stride;
    };

    Weights weights(int64_t chunk, float* own) const {
        const float* at = weight_at(call) + chunks.first(chunk) * in_of(call);
        if (!copies_weights) return {at, in_of(call)};
        for (int64_t o = 0; o < chunks.size(chunk); o++, at += in_of(call)) {
            float* to = own + o * weight_stride;
            if (operands == BFLOAT16_PAIRS)
                to_pairs(at, in_of(call), to);
            else if (operands == SPLIT_PAIRS)
                to_split_pairs(at, in_of(call), to);
            else if (rounds(call))
                round_all(at, in_of(call), call.layer.compute_dtype, to);
            else
                std::memcpy(to, at, size_t(in_of(call)) * 4);
        }
        return {own, weight_stride};
    }

    // A group's rows are those of the first in all places but the label field's: its sum is theirs
    // without the field, and its own part on top.
    template <Operands KIND>
    void multiply(const Block& block, int64_t chunk, Weights w, float* z_t, float* y_t,
                  float* product_t) const {
        const Panels panels{block.operands(), depth};
        const int64_t out = chunks.size(chunk), field_end = field_first + field_depth;
        const bool known = block.field.known;
        float* q = partial + chunk * block.columns();
        if (known) bring_product(block, chunk, z_t);
        constexpr int64_t AT_ONCE = depth_at_once(KIND);
        for (int64_t k = known ? (depth - 1) / AT_ONCE * AT_ONCE : 0; k < depth; k += AT_ONCE) {
            const int64_t end = smaller(depth, k + AT_ONCE);
            const bool last = end == depth;
            // What [k, end) has before the field and behind it; where the field covers an end, a
            // run is empty.
            const int64_t runs[2][2] = {{k, smaller(end, larger(k, field_first))},
                                        {smaller(end, larger(k, field_end)), end}};
            for (int64_t p = 0; p < panels.count(); p++)
                with_vectors(panels.vectors(p), [&](auto vectors) {
                    constexpr int NV = decltype(vectors)::value;
                    each_tile<NV>(out, [&](int64_t o, auto rows) {
                        constexpr int ROWS = decltype(rows)::value;
                        const TileRows<ROWS> a(w.at + o * w.stride, w.stride, out - o);
                        float* to = z_t + o * stride + p * PANEL;
                        Tile<NV, ROWS> tile;
                        tile.expect(to, stride);
                        tile.clear();
                        for (const auto& [from, until] : runs)
                            if (from < until && !known)
                                tile.template multiply<KIND>(
                                    a, from, packed + panels.offset(p) + from * NV * LANES,
                                    until - from);
                        // The shallower part of the sum waits where its result will lie, in the
                        // first group's columns.
                        if (k > 0 || known) tile.add(to, stride);
                        if (!last) {
                            tile.write(to, stride);
                            return;
                        }
                        if (product_t != nullptr)
                            tile.write(product_t + o * stride + p * PANEL, stride);
                        Tile<NV, ROWS> shared;
                        if (block.field.copies) shared = tile;
                        for (int64_t g = 0; g <= block.field.copies; g++) {
                            // `finish` leaves the sum in the tile, with the group before's field in
                            // it: from anew.
                            if (g > 0) tile = shared;
                            if (field_depth)
                                tile.template multiply<KIND>(a, field_first, field_of(block, g, p),
                                                             field_depth);
                            // `to` is the first group's place; this one's lies `column` further.
                            const int64_t column = block.column(g, 0);
                            finish(tile, a.valid, chunks.first(chunk) + o, column + p * PANEL,
                                   to + column, q + column + p * PANEL, o == 0);
                            if (is_curved(call))
                                bend<NV>(a.valid, to + column, to + (y_t - z_t) + column,
                                         q + column + p * PANEL, o == 0);
                        }
                    });
                });
        }
    }

    // A chunk's units of the product [rows, out] that the caller has brought, where the first
    // group's sums wait for the field; zeros in the lanes beyond the last row.
    void bring_product(const Block& block, int64_t chunk, float* z_t) const {
        const ffk::Matrix& product = call.rows.product;
        for (int64_t i = 0; i < block.rows[0]; i += LANES) {
            const int valid = int(smaller(LANES, block.rows[0] - i));
            const float* rows[LANES] = {};
            for (int j = 0; j < valid; j++)
                rows[j] = static_cast<const float*>(product.at)
                          + block.row(0, i + j) * product.stride + chunks.first(chunk);
            pack_columns(rows, valid, chunks.size(chunk), z_t + i, stride);
        }
    }

    // z = r acc + b, y = act(z), q += y^2; the accumulators stay as they are. Of a curve it writes
    // z in the place of y, and leaves q to `bend`.
    template <int NV, int ROWS>
    __attribute__((always_inline)) void finish(const Tile<NV, ROWS>& tile, int valid, int64_t unit,
                                               int64_t column, float* y, float* q,
                                               bool first) const {
        const bool relu = call.layer.activation == ffk::RELU,
                   leaky = call.layer.activation == ffk::LEAKY_RELU;
        const float* biases = call.layer.bias;
        const int64_t y_stride = stride;
        vec r[NV], squares[NV] = {};
        for (int v = 0; v < NV; v++) r[v] = load(scale + column + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
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
        if (!is_curved(call)) add_squares(squares, q, first);
    }

    // The chunk's first tile starts its sums; each tile below adds its own.
    template <int NV>
    static void add_squares(const vec (&squares)[NV], float* q, bool first) {
        for (int v = 0; v < NV; v++)
            store(q + v * LANES, first ? squares[v] : load(q + v * LANES) + squares[v]);
    }

    // y = act(z), q += y^2 of a tile, whose registers a curve would need for itself; y act'(z) in
    // the place of z where that is what is left.
    template <int NV>
    __attribute__((noinline)) void bend(int valid, float* z, float* y, float* q, bool first) const {
        with_activation(call, [&](auto act) {
            vec squares[NV] = {};
            for (int m = 0; m < valid; m++)
                for (int v = 0; v < NV; v++) {
                    const int64_t at = m * stride + v * LANES;
                    const Active a = act(load(z + at));
                    if (leaves == LEFT_SLOPED) store(z + at, a.y * a.slope);
                    if (shows) store(y + at, a.y);
                    squares[v] += a.y * a.y;
                }
            add_squares(squares, q, first);
        });
    }

    // y_t [units, columns] to rows [rows, out].
    void write_rows(const Block& block, int64_t chunk, const float* y_t,
                    const ffk::Matrix& to) const {
        if (to.dtype == ffk::BFLOAT16)
            write_rows<uint16_t, ffk::BFLOAT16>(block, chunk, y_t, to.at);
        else if (to.dtype == ffk::FLOAT16)
            write_rows<uint16_t, ffk::FLOAT16>(block, chunk, y_t, to.at);
        else
            write_rows<float, ffk::FLOAT32>(block, chunk, y_t, to.at);
    }

    template <class Number, ffk::Dtype DTYPE>
    void write_rows(const Block& block, int64_t chunk, const float* y_t, void* to) const {
        const int64_t first = chunks.first(chunk), units = chunks.size(chunk), out = out_of(call),
                      width = stride;
        for (int64_t g = 0; g < block.groups; g++) {
            Number* y = static_cast<Number*>(to) + block.row(g, 0) * out + first;
            const int64_t count = block.count(g);
            for (int64_t i = 0; i < count; i += LANES)
                for (int64_t o = 0; o < units; o += LANES) {
                    // The last units come once more, with those before them.
                    const int64_t unit = units < LANES ? 0 : smaller(o, units - LANES),
                                  valid = smaller(LANES, units - unit);
                    const float* from = y_t + unit * width + block.column(g, i);
                    vec v[LANES];
#pragma GCC unroll 16
                    for (int j = 0; j < LANES; j++)
                        v[j] = j < valid ? load(from + j * width) : vec{};
                    transpose(v);
#pragma GCC unroll 16
                    for (int j = 0; j < LANES; j++)
                        if (i + j < count) write<DTYPE>(v[j], valid, y + (i + j) * out + unit);
                }
        }
    }

    template <ffk::Dtype>
    static void write(vec values, int64_t n, float* to) {
        if (n == LANES)
            store(to, values);
        else
            std::memcpy(to, &values, size_t(n) * 4);
    }
    template <ffk::Dtype DTYPE>
    static void write(vec values, int64_t n, uint16_t* to) {
        const vec_of_halves numbers =
            DTYPE == ffk::BFLOAT16 ? to_bfloat16(values) : to_float16(values);
        if (n == LANES)
            store(to, numbers);
        else
            std::memcpy(to, &numbers, size_t(n) * 2);
    }
};

}  // namespace
