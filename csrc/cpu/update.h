// The backward half: dW = sum_i (c_i r_i y_i act'(z_i)) x_i^T, tile by tile, each handed to the
// optimizer's rule while it is in registers.
#pragma once
#include "peers.h"
#include "rules.h"

namespace {

struct Update {
    const ffk::Call& call;
    const Peers& peers;
    Chunks chunks;
    Rule weight_rule, bias_rule;
    Operands operands;
    int64_t blocks;
    int64_t depth_stride;  // of the left operand's rows, in places
    int64_t sum_stride;    // of the gradient's rows
    float* packed;         // the kept rows of X in panels
    float*
        field_packed;  // per group of copies: its rows, in the panels that the label field touches
    int64_t field_size;
    int32_t* kept;     // operands whose coefficient is not zero, in order
    int32_t* moves;    // per group of copies: whether any of its coefficients is not zero
    int64_t rows;      // as many operands as a block can have
    float* weight_of;  // [groups, rows] per kept operand: c r, of the operand itself and of each of
                       // its copies
    float* bias_weight_of;  // likewise: c
    float* sum;             // [out, in]: the gradient over earlier blocks, if there are several
    float* bias_sum;        // [out]: likewise
    float* scratch;         // per worker: an unpacked row, or the left operands of a chunk and its
                            // unfinished sums
    int64_t scratch_size, left_size;

    Update(const ffk::Call& c, const Peers& p, const Block& largest, int64_t block_count,
           Memory& memory)
        : call(c),
          peers(p),
          chunks(c, largest.operands()),
          weight_rule(c.update.rule, c.update.weight),
          bias_rule(c.layer.bias != nullptr ? c.update.rule : int32_t(ffk::GRAD), c.update.bias),
          operands(operands_of(c)),
          blocks(block_count),
          depth_stride(stride_for(places(c, largest.operands()))),
          sum_stride(stride_for(in_of(c))) {
        rows = largest.operands();
        const Field field = largest.field;
        // Left operands: the groups' sum, and behind it each group's own; without copies one is
        // both.
        const int64_t groups = 1 + field.copies, lefts = field.copies ? 1 + groups : 1;
        packed = memory.take(places(call, rows) * up_to(in_of(call), LANES));
        // A field of n columns touches at most so many panels as n fill, and one more.
        field_size = field.count ? places(call, rows) * (up_to(field.count, PANEL) + PANEL) : 0;
        field_packed = memory.take(field_size * field.copies);
        kept = reinterpret_cast<int32_t*>(memory.take(rows)),
        moves = reinterpret_cast<int32_t*>(memory.take(groups));
        weight_of = memory.take(groups * rows), bias_weight_of = memory.take(groups * rows);
        sum = memory.take(blocks > 1 ? up_to(out_of(call), TILE_ROWS) * sum_stride : 0);
        bias_sum = memory.take(out_of(call));
        // Pairs are formed of two rows of float32, one for the sum and one for a group's own.
        left_size =
            chunks.rows * depth_stride * lefts + (operands != FLOATS ? 2 * up_to(rows, 16) : 0);
        // Unfinished sums are a worker's own where one block's depth is cut; over several blocks
        // they are `sum`.
        const bool is_cut = places(call, rows) > depth_at_once(operands) && blocks == 1;
        scratch_size =
            up_to(larger(2 * in_of(call), left_size + (is_cut ? chunks.rows * sum_stride : 0)), 16);
        scratch = memory.take(scratch_size * call.threads);
    }

    // `coefficient`, `scale`: per column. `y_of(chunk, worker)`: y act'(z) of a chunk's units,
    // [units, stride], whose columns these are.
    template <class F>
    void run(const Block& block, int64_t index, const float* coefficient, const float* scale,
             int64_t stride, F y_of) {
        const int64_t depth = choose(block, coefficient, scale);
        const int workers = workers_for(call, larger(1, depth) * in_of(call) * out_of(call));
        // Panels are as deep as rows are kept: one that is left out is neither packed nor
        // multiplied.
        const Panels panels{in_of(call), places(call, depth)};
        pack(block, depth, panels, workers);
        parallel(chunks.count(), workers, [&](int64_t chunk, int worker) {
            float* left = scratch + worker * scratch_size;
            form(block, index, chunk, depth, y_of(chunk, worker), stride, left);
            with_rule([&](auto kind) {
                constexpr int KIND = decltype(kind)::value;
                if (call.layer.bias != nullptr && index == blocks - 1) update_bias<KIND>(chunk);
                with_operands(operands, [&](auto constant) {
                    multiply<KIND, decltype(constant)::value>(block, index, chunk, panels, left,
                                                              left + left_size);
                });
            });
        });
        if (index == blocks - 1 && call.update.rule == ffk::ADAM) {
            *call.update.weight.state[2] += 1;
            if (call.layer.bias != nullptr) *call.update.bias.state[2] += 1;
        }
    }

    template <class F>
    void with_rule(F f) const {
        if (call.update.rule == ffk::ADAM)
            f(Constant<ffk::ADAM>{});
        else if (call.update.rule == ffk::SGD)
            f(Constant<ffk::SGD>{});
        else
            f(Constant<ffk::GRAD>{});
    }

    // Operands that are not saturated; the others' part of the gradient is exactly zero.
    int64_t choose(const Block& block, const float* coefficient, const float* scale) {
        int64_t depth = 0;
        std::memset(moves, 0, size_t(1 + block.field.copies) * 4);
        for (int64_t i = 0; i < block.operands(); i++) {
            bool moved = false;
            for (int64_t g = 0; g <= block.field.copies; g++) {
                const int64_t column = g * block.stride + i;
                const float c = flushed(coefficient[column]);
                // Written before it is known whether the row stays; if not, the next one takes its
                // place.
                weight_of[g * rows + depth] = c * scale[column],
                                     bias_weight_of[g * rows + depth] = c;
                if (c != 0) moved = true, moves[g] = 1;
            }
            kept[depth] = int32_t(i);
            if (moved) depth++;
        }
        return depth;
    }

    void pack(const Block& block, int64_t depth, const Panels& panels, int workers) const {
        parallel(pieces(panels.depth, LANES), workers, [&](int64_t group, int worker) {
            float* own = scratch + worker * scratch_size;
            for (int64_t k = group * LANES; k < smaller(panels.depth, (group + 1) * LANES); k++) {
                // A place along the depth is one kept row, or two as pairs.
                const float* row = operands != FLOATS ? two_rows(block, k, depth, own)
                                                      : row_at(block, k).operands(in_of(call), own);
                pack_row(row, panels, k, packed);
                for (int64_t g = 0; block.field.copies && g <= block.field.copies; g++)
                    if (moves[g]) pack_own(block, g, depth, panels, k);
            }
        });
    }

    Row row_at(const Block& block, int64_t k) const {
        return row_of(call, block.operand_row(kept[k]));
    }

    // The two kept rows of a place (zeros beyond the last) as one row of pairs.
    const float* two_rows(const Block& block, int64_t place, int64_t depth, float* own) const {
        const int64_t k = 2 * pair_in(operands, place);
        if (k >= depth) {
            std::memset(own, 0, size_t(in_of(call)) * 4);
            return own;
        }
        const float* first = row_at(block, k).operands(in_of(call), own);
        const bool alone = k + 1 == depth;
        const float* second =
            alone ? first : row_at(block, k + 1).operands(in_of(call), own + in_of(call));
        const bool rests = is_rest(operands, place);
        for (int64_t j = 0; j < in_of(call); j += LANES) {
            const int64_t n = in_of(call) - j;
            const auto half = [&](const float* row) {
                const vec values = load_some(row + j, n);
                if (operands == BFLOAT16_PAIRS) return values;
                const Parts parts = parts_of(values);
                return rests ? parts.rest : parts.nearest;
            };
            store_some(own + j, paired(half(first), alone ? vec{} : half(second)), n);
        }
        return own;
    }

    // A group's own rows, in the panels that the label field touches; zeros where a row has no part
    // in the sum, whatever it holds.
    void pack_own(const Block& block, int64_t group, int64_t depth, const Panels& panels,
                  int64_t k) const {
        // Whole panels, though the field may end inside one: a tile cannot be cut.
        const int64_t first = block.field.first / PANEL,
                      last = (block.field.first + block.field.count - 1) / PANEL,
                      each = operands != FLOATS ? 2 : 1,
                      of_place = operands != FLOATS ? 2 * pair_in(operands, k) : k;
        for (int64_t p = first; p <= last; p++) {
            const int64_t width = panels.vectors(p) * LANES,
                          valid = smaller(width, in_of(call) - p * PANEL);
            float* into = own_panel(block, group, panels, p) + k * width;
            std::memset(into, 0, size_t(width) * 4);
            for (int64_t i = of_place; i < smaller(depth, of_place + each); i++) {
                if (bias_weight_of[group * rows + i] == 0) continue;
                const Row row = row_of(call, block.row(group, kept[i]));
                // Even rows are the first half of each pair, odd ones the second.
                uint16_t* halves = reinterpret_cast<uint16_t*>(into) + i % 2;
                for (int64_t j = 0; j < valid; j++) {
                    const float value = row[p * PANEL + j];
                    if (operands == FLOATS)
                        into[j] = value;
                    else
                        halves[2 * j] = to_bfloat16(operands == BFLOAT16_PAIRS
                                                        ? value
                                                        : part_of(value, is_rest(operands, k)));
                }
            }
        }
    }

    float* own_panel(const Block& block, int64_t group, const Panels& panels, int64_t panel) const {
        if (group == 0) return packed + panels.offset(panel);
        // As in `packed`, counted from the first panel that the field touches.
        return field_packed + (group - 1) * field_size + panels.offset(panel)
               - panels.offset(block.field.first / PANEL);
    }

    bool touches_field(const Block& block, int64_t panel) const {
        return block.field.copies && panel >= block.field.first / PANEL
               && panel <= (block.field.first + block.field.count - 1) / PANEL;
    }

    // The product's left operands: [units, depth] of c r y act'(z), those of copies added to their
    // row's; and, where there are copies, each group's own behind.
    void form(const Block& block, int64_t index, int64_t chunk, int64_t depth, const float* y_t,
              int64_t stride, float* left) const {
        const int64_t size = chunks.rows * depth_stride, copies = block.field.copies;
        // Behind the left operands; only pairs take it.
        float* unpaired = left + size * (copies ? copies + 2 : 1);
        for (int64_t o = 0; o < chunks.size(chunk); o++) {
            const int64_t unit = chunks.first(chunk) + o;
            float* to = operands != FLOATS ? unpaired : left + o * depth_stride;
            float bias = 0;
            for (int64_t g = 0; g <= copies; g++) {
                if (g > 0 && !moves[g]) continue;
                // Where the group's own lies: place 0 is the sum's.
                float* operand = left + (1 + g) * size + o * depth_stride;
                float* own = !copies              ? to
                             : operands != FLOATS ? unpaired + up_to(depth, 16)
                                                  : operand;
                gather(y_t + o * stride + g * block.stride, bias_weight_of + g * rows, depth,
                       depth == block.operands(), own);
                // Before the row scale goes in: the bias sees c y act'(z) alone.
                bias += dot(own, bias_weight_of + g * rows, depth);
                weigh(own, weight_of + g * rows, depth);
                if (!copies) break;
                // Summed in float32, of numbers that are not rounded yet.
                for (int64_t k = 0; k < depth; k++) to[k] = g > 0 ? to[k] + own[k] : own[k];
                round(own, depth, operand);
            }
            round(to, depth, left + o * depth_stride);
            if (peers.straight() && index == blocks - 1)
                bias += float(peers.count) * peers.pull(unit);
            bias_sum[unit] = index ? bias_sum[unit] + bias : bias;
        }
    }

    // The kept rows' numbers; zero where a row is kept for its copies' sake and has no part in the
    // sum itself, whatever it holds.
    void gather(const float* from, const float* weights, int64_t depth, bool everything,
                float* to) const {
        const int32_t* places = kept;
        for (int64_t k = 0; k < depth; k++) {
            const float value = from[everything ? k : places[k]];
            to[k] = weights[k] != 0 ? value : 0;
        }
    }

    static void weigh(float* values, const float* weights, int64_t n) {
        int64_t k = 0;
        for (; k + LANES <= n; k += LANES)
            store(values + k, flushed(load(values + k) * load(weights + k)));
        for (; k < n; k++) values[k] = flushed(values[k] * weights[k]);
    }

    void round(float* values, int64_t n, float* operand) const {
        if (operands == BFLOAT16_PAIRS)
            to_pairs(values, n, operand);
        else if (operands == SPLIT_PAIRS)
            to_split_pairs(values, n, operand);
        else if (call.layer.compute_dtype == ffk::BFLOAT16)
            round_all(values, n, values);
        else if (call.layer.compute_dtype == ffk::FLOAT16)
            // Coefficients carry 1 / (rows units), and lie below float16's range.
            for (int64_t k = 0; k < n; k += LANES)
                store_some(values + k, to_eleven_digits(load_some(values + k, n - k)), n - k);
    }

    template <int KIND>
    void update_bias(int64_t chunk) const {
        const int64_t first = chunks.first(chunk);
        float* const* state = call.update.bias.state;
        bias_rule.apply<KIND>(bias_sum + first, chunks.size(chunk), call.layer.bias + first,
                              at(state[0], first), at(state[1], first));
    }

    static float* at(float* values, int64_t offset) {
        return values != nullptr ? values + offset : nullptr;
    }

    template <int KIND, Operands OPERANDS>
    void multiply(const Block& block, int64_t index, int64_t chunk, const Panels& panels,
                  const float* left, float* own_sum) const {
        const int64_t first = chunks.first(chunk), size = chunks.size(chunk);
        // Both have rows of sum_stride, and a chunk's first unit at their beginning.
        float* unfinished = blocks > 1 ? sum + first * sum_stride : own_sum;
        // Once even where no row is left: decay and momentum move a weight without a gradient.
        for (int64_t k = 0; k == 0 || k < panels.depth; k += depth_at_once(OPERANDS)) {
            const int64_t depth = smaller(depth_at_once(OPERANDS), panels.depth - k);
            const bool last = k + depth == panels.depth && index == blocks - 1;
            for (int64_t p = 0; p < panels.count(); p++)
                with_vectors(panels.vectors(p), [&](auto vectors) {
                    constexpr int NV = decltype(vectors)::value;
                    const bool touched = touches_field(block, p);
                    each_tile<NV>(size, [&](int64_t o, auto rows) {
                        constexpr int ROWS = decltype(rows)::value;
                        TileRows<ROWS> a(left + o * depth_stride, depth_stride, size - o);
                        float* to = unfinished + o * sum_stride + p * PANEL;
                        Tile<NV, ROWS> tile;
                        Coming coming;
                        if (last) expect<KIND>(first + o, a.valid, p * PANEL, NV, coming);
                        if (!last || k > 0 || index > 0) tile.expect(to, sum_stride);
                        tile.clear();
                        // Untouched panels are equal for all groups: the sum of their left operands
                        // serves them at once.
                        for (int64_t g = 0; g <= (touched ? block.field.copies : 0); g++) {
                            if (touched && !moves[g]) continue;
                            if (touched)
                                a = TileRows<ROWS>(
                                    left + ((1 + g) * chunks.rows + o) * depth_stride, depth_stride,
                                    size - o);
                            tile.template multiply<OPERANDS>(
                                a, k, own_panel(block, g, panels, p) + k * NV * LANES, depth,
                                coming);
                            // Fetched with the first product.
                            coming.count = 0;
                        }
                        if (k > 0 || index > 0) tile.add(to, sum_stride);
                        if (!last) {
                            tile.write(to, sum_stride);
                            return;
                        }
                        if (peers.straight())
                            tile.add_outer(peers.activity + first + o, peers.input + p * PANEL);
                        float finished[ROWS * PANEL];
                        tile.write(finished, PANEL);
                        apply<KIND>(finished, first + o, a.valid, p * PANEL,
                                    smaller(NV * LANES, in_of(call) - p * PANEL));
                    });
                });
        }
    }

    // What the rule will read arrives while the tile is being multiplied.
    template <int KIND>
    void expect(int64_t unit, int valid, int64_t column, int vectors, Coming& coming) const {
        float* const* state = call.update.weight.state;
        for (int m = 0; m < valid; m++)
            for (int v = 0; v < vectors; v++) {
                const int64_t at = (unit + m) * in_of(call) + column + v * LANES;
                if (KIND != ffk::GRAD) coming.add(weight_at(call) + at);
                if (state[0] != nullptr) coming.add(state[0] + at);
                if (KIND == ffk::ADAM) coming.add(state[1] + at);
            }
    }

    template <int KIND>
    void apply(const float* gradient, int64_t unit, int valid, int64_t column,
               int64_t columns) const {
        const Rule rule = weight_rule;
        float* const* state = call.update.weight.state;
        for (int m = 0; m < valid; m++) {
            const int64_t first = (unit + m) * in_of(call) + column;
            rule.apply<KIND>(gradient + m * PANEL, columns, weight_at(call) + first,
                             at(state[0], first), at(state[1], first));
        }
    }
};

}  // namespace
