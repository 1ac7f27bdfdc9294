// A block of the joint batch and the memory its step works in.
#pragma once
#include "rows.h"
#include "threads.h"

namespace {

// Rows that a pass over the weight serves at once; a batch of more elements than SINGLE_BLOCK is worked through in blocks.
constexpr int64_t BLOCK_ROWS = 1024, SINGLE_BLOCK = int64_t(1) << 22;
// Tasks are runs of whole tiles; their size follows from the layer's shape alone, so that no sum depends on the number of threads.
constexpr int64_t TASKS = 16, MOST_TILES = 16;
// Fewer multiplications than this are not worth waking a second thread for.
constexpr int64_t SMALL_WORK = int64_t(1) << 18;

struct Chunks {
    int64_t out, rows;

    explicit Chunks(int64_t out_features, int64_t batch) : out(out_features) {
        const int64_t tiles = pieces(out, TILE_ROWS), most = batch > 512 ? MOST_TILES : 4;
        rows = TILE_ROWS * larger(1, smaller(most, pieces(tiles, TASKS)));
    }
    int64_t count() const { return pieces(out, rows); }
    int64_t first(int64_t chunk) const { return chunk * rows; }
    int64_t size(int64_t chunk) const { return smaller(rows, out - first(chunk)); }
};

// Where negative rows differ from their positive twins; `count` 0 where they are no twins.
struct Field {
    int64_t first = 0, count = 0;
    bool twins = false;
};

// Rows [start[side], start[side] + rows[side]) of both sides. In vectors "per column" (of products with rows as columns) positives come first; negatives
// start at `negative`, which is the next column, or, for twins, the next whole vector.
struct Block {
    int64_t start[2], rows[2], negative;
    Field field;

    int64_t columns() const { return up_to(negative + rows[1], LANES); }
    int64_t column(int side, int64_t i) const { return side == 0 ? i : negative + i; }
    int64_t operands() const { return field.twins ? rows[0] : rows[0] + rows[1]; }
};

inline Block block_of(const ffk::Call& call, int64_t index, int64_t blocks, Field field) {
    Block b{};
    for (int side = 0; side < 2; side++) {
        b.start[side] = call.rows[side] * index / blocks;
        b.rows[side] = call.rows[side] * (index + 1) / blocks - b.start[side];
    }
    b.field = field;
    b.negative = field.twins ? up_to(b.rows[0], LANES) : b.rows[0];
    return b;
}

// Sides whose rows hold the same bits in all but one short run of columns share their products.
inline Field label_field(const ffk::Call& call) {
    const int64_t pairs = call.rows[0], bytes = call.x_bfloat16 ? 2 : 4, most = call.in / 8;
    Field field;
    if (pairs == 0 || pairs != call.rows[1] || call.is_positive != nullptr) return field;
    int64_t first = call.in, last = -1;
    for (int64_t i = 0; i < pairs; i += larger(1, pairs / 64)) {
        const char* a = static_cast<const char*>(row_of(call, 0, i).at);
        const char* b = static_cast<const char*>(row_of(call, 1, i).at);
        for (int64_t k = 0; k < call.in; k++) {
            if (std::memcmp(a + k * bytes, b + k * bytes, size_t(bytes)) == 0) continue;
            first = smaller(first, k), last = larger(last, k);
            if (last - first >= most) return field;
        }
    }
    field.first = last < 0 ? 0 : first, field.count = last < 0 ? 0 : last + 1 - first;
    const int64_t after = field.first + field.count;
    for (int64_t i = 0; i < pairs; i++) {
        const char* a = static_cast<const char*>(row_of(call, 0, i).at);
        const char* b = static_cast<const char*>(row_of(call, 1, i).at);
        if (std::memcmp(a, b, size_t(field.first * bytes)) != 0) return field;
        if (std::memcmp(a + after * bytes, b + after * bytes, size_t((call.in - after) * bytes)) != 0) return field;
    }
    field.twins = true;
    return field;
}

// x_neg - x_pos of twins in a column of their field; zero in any other.
inline float change_of(const ffk::Call& call, const Block& block, int64_t twin, int64_t column) {
    if (column < block.field.first || column >= block.field.first + block.field.count) return 0;
    return row_of(call, 1, block.start[1] + twin)[column] - row_of(call, 0, block.start[0] + twin)[column];
}

inline int workers_for(const ffk::Call& call, int64_t multiplications) {
    return multiplications < SMALL_WORK ? 1 : call.threads;
}

// Hands out pieces of one allocation; with no memory behind it, only counts.
struct Memory {
    float* base;
    size_t used = 0;

    float* take(int64_t floats) {
        const size_t at = used;
        used += size_t(up_to(floats, 16));
        return base == nullptr ? nullptr : base + at;
    }
};

// A row length that no power of two divides, so that rows do not fall onto the same cache lines.
inline int64_t stride_for(int64_t columns) {
    const int64_t stride = up_to(columns, 16);
    return stride % 256 == 0 ? stride + 16 : stride;
}

template <class F>
void parallel(int64_t tasks, int workers, const F& f) {
    ffk::run_tasks(tasks, workers, [](void* context, int64_t task, int worker) {
        (*static_cast<const F*>(context))(task, worker);
    }, const_cast<F*>(&f));
}

}  // namespace
