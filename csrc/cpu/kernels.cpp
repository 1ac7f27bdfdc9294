// What the library is called for, compiled once for each instruction set (FFK_SET names it).
#include "kernels.h"

#include "classes.h"
#include "forward.h"
#include "given.h"
#include "maps.h"
#include "update.h"

namespace {

// Calls `body` twice: to count what it takes, and with memory of that size; 1 where there is none.
template <class F>
int with_memory(F body) {
    Memory count{nullptr};
    body(count, false);
    Memory memory{ffk::workspace(count.used)};
    if (memory.base == nullptr) return 1;
    body(memory, true);
    return 0;
}

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
          forward(call, largest_block(call, blocks, field), false, memory) {}
    WholeForward(const WholeForward&) = delete;

    void run() const {
        for (int64_t index = 0; index < blocks; index++)
            forward.run(block_of(call, index, blocks, field), nullptr);
    }
};

int linear_forward(const ffk::Call& call) {
    const Field field = label_field(call);
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

int linear_step(const ffk::Call& call) {
    const int64_t blocks = blocks_of_step(call);
    const Field field = label_field(call);
    const Objective objective(call);
    ffk::Call again = call;
    again.outputs.y = call.outputs.y_after, again.outputs.sumsq = call.outputs.sumsq_after;
    return with_memory([&](Memory& memory, bool real) {
        // What comes after the update has its memory before it, over that of the step.
        Memory after_memory = memory;
        const WholeForward after(again, field, after_memory);
        const Block largest = largest_block(call, blocks, field);
        const Forward forward(call, largest, true, memory);
        Peers peers(call, largest, memory);
        const Classes classes(call, largest, memory);
        Update update(call, peers, largest, blocks, memory);
        float* y_t = memory.take(up_to(out_of(call), TILE_ROWS) * forward.stride);
        float* coefficient = memory.take(largest.columns());
        memory.used = larger(memory.used, after_memory.used);
        if (!real) return;
        double loss = 0;
        if (peers.there()) peers.start();
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(call, index, blocks, field);
            forward.run(block, y_t, [&](int64_t chunk, const float* y) {
                if (classes.there()) classes.see(block, chunk, y, forward.stride);
            });
            if (peers.there()) {
                peers.see(block, y_t, forward.stride, forward.scale);
                if (index == blocks - 1) peers.finish();
            }
            if (classes.there())
                loss += classes.solve(block, coefficient);
            else
                loss += coefficients(objective, block, forward.sumsq, coefficient);
            update.run(block, index, coefficient, forward.scale, forward.stride,
                       [&](int64_t chunk, int) {
                           float* y = y_t + forward.chunks.first(chunk) * forward.stride;
                           if (classes.there()) classes.apply(block, chunk, y, forward.stride);
                           return y;
                       });
        }
        *call.outputs.loss_out = float(loss);
        if (again.outputs.sumsq != nullptr) after.run();
    });
}

int linear_update(const ffk::Call& call) {
    const int64_t blocks = blocks_of_step(call);
    const Field field = label_field(call);
    return with_memory([&](Memory& memory, bool real) {
        const Block largest = largest_block(call, blocks, field);
        Peers peers(call, largest, memory);
        const Given given(call, largest, peers.there(), memory);
        Update update(call, peers, largest, blocks, memory);
        if (!real) return;
        given.start();
        if (peers.there()) peers.start();
        for (int64_t index = 0; index < blocks; index++) {
            const Block block = block_of(call, index, blocks, field);
            given.weigh(block);
            if (peers.there()) {
                given.read(block);
                peers.see(block, given.y_t, given.stride, given.scale);
                if (index == blocks - 1) peers.finish();
            }
            update.run(block, index, given.coefficient, given.scale, given.stride,
                       [&](int64_t chunk, int worker) {
                           float* y = given.y_of(chunk, worker);
                           if (!peers.there()) given.read(block, chunk, y);
                           given.apply(block, chunk, worker, y);
                           return y;
                       });
        }
    });
}

}  // namespace

#define FFK_TEXT_OF(name) #name
#define FFK_TEXT(name) FFK_TEXT_OF(name)
const ffk::Kernels ffk::FFK_SET{FFK_TEXT(FFK_SET), linear_forward, linear_step,
                                linear_update,     maps_forward,   maps_backward};
