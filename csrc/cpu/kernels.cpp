// What the library is called for, compiled once for each instruction set (FFK_SET names it).
#include "kernels.h"

#include "classes.h"
#include "convolution.h"
#include "forward.h"
#include "given.h"
#include "update.h"

namespace {

// As large as any block is.
Block largest_block(const ffk::Call& call, int64_t blocks, Field field) {
    Block b = block_of(call, 0, 1, field);
    for (int side = 0; side < 2; side++) b.rows[side] = pieces(b.rows[side], blocks);
    b.stride = field.copies ? up_to(b.rows[0], LANES) : b.rows[0];
    return b;
}

// A forward pass over the whole batch, in the memory that it is given.
struct WholeForward {
    ffk::Call call;
    int64_t blocks;
    Field field;
    Forward forward;

    WholeForward(const ffk::Call& c, Field f, Memory& memory)
        : call(c),
          blocks(larger(1, pieces(rows_of(c, 0) + rows_of(c, 1), BLOCK_ROWS))),
          field(f),
          forward(call, largest_block(call, blocks, field), LEFT_NOTHING, false, memory) {}
    WholeForward(const WholeForward&) = delete;

    void run() const {
        for (int64_t index = 0; index < blocks; index++)
            forward.run(block_of(call, index, blocks, field));
    }
};

int linear_forward(const ffk::Call& call) {
    const Field field = label_field(call, true);
    return with_memory([&](Memory& memory, bool real) {
        const WholeForward forward(call, field, memory);
        if (real) forward.run();
    });
}

// How many blocks a step works through a batch in.
int64_t blocks_of_step(const ffk::Call& call) {
    const int64_t rows = rows_of(call, 0) + rows_of(call, 1);
    const int64_t rows_at_once = rows * out_of(call) <= SINGLE_BLOCK
                                     ? larger(1, rows)
                                     : larger(BLOCK_ROWS, SINGLE_BLOCK / 4 / out_of(call));
    return larger(1, pieces(rows, rows_at_once));
}

// Coefficients per column, and goodness where it is asked for; returns the block's part of the
// loss.
double coefficients(const Objective& objective, const Block& block, const float* sumsq,
                    float* coefficient) {
    double loss = 0;
    std::memset(coefficient, 0, size_t(block.columns()) * 4);
    float* goodness = objective.call.outputs.goodness_out;
    for (int64_t g = 0; goodness != nullptr && g < block.groups; g++)
        for (int64_t i = 0; i < block.count(g); i++)
            goodness[block.row(g, i)] = objective.goodness(sumsq[block.column(g, i)]);
    if (objective.paired()) {
        for (int64_t i = 0; i < block.rows[0]; i++) {
            const int64_t other = block.column(1, i);
            Terms pos, neg;
            objective.of_pair(block.row(0, i), sumsq[i], sumsq[other], pos, neg);
            coefficient[i] = pos.coefficient, coefficient[other] = neg.coefficient;
            loss += pos.loss;
        }
        return loss;
    }
    for (int64_t g = 0; g < block.groups; g++)
        for (int64_t i = 0; i < block.count(g); i++) {
            const int64_t column = block.column(g, i);
            const Terms terms = objective.of_row(block.row(g, i), sumsq[column]);
            coefficient[column] = terms.coefficient;
            loss += terms.loss;
        }
    return loss;
}

// What the forward pass has kept of some units [units, stride] to y act'(z), or, under a gated
// pull, by the rows' coefficients `weights` to dLoss/dz.
void apply_slopes(const ffk::Call& call, const Peers& peers, const Block& block,
                  const float* weights, int64_t first, int64_t units, int64_t stride, float* kept) {
    with_activation(call, [&](auto act) {
        for (int64_t o = 0; o < units; o++)
            for (int64_t column = 0; column < block.columns(); column += LANES) {
                const Active a = act(load(kept + o * stride + column));
                vec dz = a.y * a.slope;
                if (peers.gated()) {
                    const vec weight = load(weights + column);
                    // A row without a part in the loss may hold anything.
                    dz = weight != 0 ? dz * weight : vec{};
                    dz += peers.pulled(first + o, column, a.slope);
                }
                store(kept + o * stride + column, dz);
            }
    });
}

int linear_step(const ffk::Call& call) {
    const int64_t blocks = blocks_of_step(call);
    const Field field = label_field(call, false);
    const Objective objective(call);
    ffk::Call again = call;
    // A product that was brought is of the weight before the update.
    Field field_again = field;
    field_again.known = false;
    again.outputs.y = call.outputs.y_after, again.outputs.sumsq = call.outputs.sumsq_after;
    return with_memory([&](Memory& memory, bool real) {
        // What comes after the update has its memory before it, over that of the step.
        Memory after_memory = memory;
        const WholeForward after(again, field_again, after_memory);
        const Block largest = largest_block(call, blocks, field);
        Peers peers(call, largest, memory);
        const Classes classes(call, largest, memory);
        // Sums over peers or classes, and what joins a slope, need more than the slope.
        const bool is_plain = !peers.there() && !classes.there();
        const Left left = is_curved(call) && is_plain ? LEFT_SLOPED : LEFT_VALUES;
        const Forward forward(call, largest, left, classes.there(), memory);
        Update update(call, peers, largest, blocks, memory);
        float* kept = memory.take(up_to(out_of(call), TILE_ROWS) * forward.stride);
        float* coefficient = memory.take(largest.columns());
        float* weights = memory.take(peers.gated() ? largest.columns() : 0);
        memory.used = larger(memory.used, after_memory.used);
        if (!real) return;
        // y of a ReLU is y act'(z).
        const bool is_sloped =
            left == LEFT_SLOPED
            || (!peers.gated()
                && (call.layer.activation == ffk::RELU || call.layer.activation == ffk::IDENTITY));
        double loss = 0;
        const auto show = [&](const Block& block, int64_t chunk) {
            const int64_t first = forward.chunks.first(chunk);
            peers.see(block, first, forward.chunks.size(chunk), kept + first * forward.stride,
                      forward.stride);
        };
        if (peers.there()) peers.start();
        // A gated pull hangs on the rows of all blocks: several are worked through twice.
        const bool ahead = peers.gated() && blocks > 1;
        for (int64_t index = 0; ahead && index < blocks; index++) {
            const Block block = block_of(call, index, blocks, field);
            peers.mark(block);
            forward.run(block, kept, [&](int64_t chunk, const float*) { show(block, chunk); });
        }
        if (ahead) peers.finish();
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(call, index, blocks, field);
            if (peers.there()) peers.mark(block);
            forward.run(block, kept, [&](int64_t chunk, const float* y) {
                if (classes.there()) classes.see(block, chunk, y, forward.stride);
                if (peers.there() && !ahead) show(block, chunk);
            });
            if (peers.straight()) peers.weigh(block, forward.scale);
            if (peers.there() && !ahead && index == blocks - 1) peers.finish();
            if (classes.there())
                loss += classes.solve(block, coefficient);
            else
                loss += coefficients(objective, block, forward.sumsq, coefficient);
            if (peers.gated()) peers.take_over(block, coefficient, weights);
            update.run(block, index, coefficient, forward.scale, forward.stride,
                       [&](int64_t chunk, int) {
                           const Chunks& chunks = forward.chunks;
                           float* of_chunk = kept + chunks.first(chunk) * forward.stride;
                           if (classes.there())
                               classes.apply(block, chunk, of_chunk, forward.stride, peers);
                           else if (!is_sloped)
                               apply_slopes(call, peers, block, weights, chunks.first(chunk),
                                            chunks.size(chunk), forward.stride, of_chunk);
                           return of_chunk;
                       });
        }
        *call.outputs.loss_out = float(loss);
        if (again.outputs.sumsq != nullptr) after.run();
    });
}

int linear_update(const ffk::Call& call) {
    const int64_t blocks = blocks_of_step(call);
    const Field field = found_field(call);
    return with_memory([&](Memory& memory, bool real) {
        const Block largest = largest_block(call, blocks, field);
        Peers peers(call, largest, memory);
        const Given given(call, peers, largest, memory);
        Update update(call, peers, largest, blocks, memory);
        if (!real) return;
        given.start();
        if (peers.there()) peers.start();
        // As in `linear_step`.
        const bool ahead = peers.gated() && blocks > 1;
        for (int64_t index = 0; ahead && index < blocks; index++) {
            const Block block = block_of(call, index, blocks, field);
            peers.mark(block);
            given.show(block);
        }
        if (ahead) peers.finish();
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(call, index, blocks, field);
            if (peers.there()) peers.mark(block);
            given.weigh(block);
            if (peers.there() && !ahead) {
                given.show(block);
                if (peers.straight()) peers.weigh(block, given.scale);
                if (index == blocks - 1) peers.finish();
            }
            update.run(block, index, given.coefficient, given.scale, given.stride,
                       [&](int64_t chunk, int worker) {
                           float* y = given.y_of(chunk, worker);
                           if (!peers.there() || ahead) given.read(block, chunk, y);
                           given.apply(block, chunk, worker, y);
                           return y;
                       });
        }
    });
}

}  // namespace

#define FFK_TEXT_OF(name) #name
#define FFK_TEXT(name) FFK_TEXT_OF(name)
const ffk::Kernels ffk::FFK_SET{FFK_TEXT(FFK_SET),   MULTIPLIES_SPLIT_PAIRS, linear_forward,
                                linear_step,         linear_update,          maps_forward,
                                maps_backward,       maps_products,          convolution_forward,
                                convolution_gradient};
