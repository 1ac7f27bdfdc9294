// A block of the joint batch and the memory its step works in.
#pragma once
#include "activation.h"
#include "threads.h"

namespace {

// Rows that a pass over the weight serves at once; a batch of more elements than SINGLE_BLOCK is
// worked through in blocks.
constexpr int64_t BLOCK_ROWS = 1024, SINGLE_BLOCK = int64_t(1) << 22;
// Tasks are runs of whole tiles; their size follows from the layer's shape alone, so that no sum
// depends on the number of threads.
constexpr int64_t TASKS = 16, MOST_TILES = 16, FEW_TILES = 4, LARGE_BATCH = 512;
// Fewer multiplications than this are not worth waking a second thread for.
constexpr int64_t SMALL_WORK = int64_t(1) << 18, SMALL_TILES = 128 / TILE_ROWS;
// A label field's part of a sum is added in one piece, number by number: a wide one loses digits.
constexpr int64_t WIDEST_FIELD = 128;
inline bool is_small(int64_t multiplications) { return multiplications < SMALL_WORK; }

struct Chunks {
    int64_t out, rows;

    // Of a batch of so many operands.
    Chunks(const ffk::Call& call, int64_t batch) : out(out_of(call)) {
        const int64_t tiles = pieces(out, TILE_ROWS),
                      most = batch > LARGE_BATCH ? MOST_TILES : FEW_TILES;
        // One thread works through a small step; its chunks need not be many.
        rows = TILE_ROWS
               * (is_small(batch * in_of(call) * out)
                      ? smaller(tiles, SMALL_TILES)
                      : larger(1, smaller(most, pieces(tiles, TASKS))));
    }
    int64_t count() const { return pieces(out, rows); }
    int64_t first(int64_t chunk) const { return chunk * rows; }
    int64_t size(int64_t chunk) const { return smaller(rows, out - first(chunk)); }
};

// Groups of consecutive units, of sizes that differ by one at most, the larger ones first.
struct Groups {
    int64_t units, count;

    int64_t first(int64_t group) const {
        return group * (units / count) + smaller(group, units % count);
    }
    int64_t size(int64_t group) const { return first(group + 1) - first(group); }
    int64_t of(int64_t unit) const {
        const int64_t size = units / count, larger_ones = units % count,
                      end = larger_ones * (size + 1);
        return unit < end ? unit / (size + 1) : larger_ones + (unit - end) / size;
    }
};

// Where rows differ from the positive rows whose copies they are; `copies` 0 where they are none.
// `known`: the caller has brought the product of all other columns.
struct Field {
    int64_t first = 0, count = 0, copies = 0;
    bool known = false;
};

// Rows of a block come in groups: the positives, the negatives; copies of the positives under other
// labels are a group each. Group g is rows [g positives + start[g > 0], ... + rows[g > 0]) of the
// joint batch. In vectors "per column" (of products with rows as columns) groups follow each other;
// those of copies start at whole vectors, `stride` apart.
struct Block {
    int64_t positives, groups, start[2], rows[2], stride;
    Field field;

    // Groups before another are as large as the positives' one: a third is there with copies alone.
    int64_t row(int64_t group, int64_t i) const { return group * positives + start[group > 0] + i; }
    int64_t count(int64_t group) const { return rows[group > 0]; }
    int64_t column(int64_t group, int64_t i) const { return group * stride + i; }
    // The last group's end, whose rows are as many as those of any other but the first.
    int64_t columns() const { return up_to(column(groups - 1, rows[1]), LANES); }
    // The row of the joint batch that is multiplied as the i-th, and the number of these.
    int64_t operand_row(int64_t i) const { return i < rows[0] ? row(0, i) : row(1, i - rows[0]); }
    int64_t operands() const { return field.copies ? rows[0] : rows[0] + rows[1]; }
};

inline Block block_of(const ffk::Call& call, int64_t index, int64_t blocks, Field field) {
    Block b{};
    for (int side = 0; side < 2; side++) {
        const int64_t all = rows_of(call, field.copies ? 0 : side);
        // Blocks differ by a row at most, and the largest has pieces(all, blocks).
        b.start[side] = all * index / blocks;
        b.rows[side] = all * (index + 1) / blocks - b.start[side];
    }
    b.positives = rows_of(call, 0), b.groups = field.copies ? 1 + field.copies : 2;
    b.field = field;
    b.stride = field.copies ? up_to(b.rows[0], LANES) : b.rows[0];
    return b;
}

inline int workers_for(const ffk::Call& call, int64_t multiplications) {
    return is_small(multiplications) ? 1 : call.threads;
}

template <class F>
void parallel(int64_t tasks, int workers, const F& f) {
    ffk::run_tasks(
        tasks, workers,
        [](void* context, int64_t task, int worker) {
            (*static_cast<const F*>(context))(task, worker);
        },
        const_cast<F*>(&f));
}

// The rows of the second side may hold the same bits as those of the first, one after the other and
// over again, in all but one short run of columns: then they share their products.
inline Field found_field(const ffk::Call& call) {
    const int64_t pairs = rows_of(call, 0), others = rows_of(call, 1),
                  bytes = bytes_of(call.rows.x_pos.dtype),
                  most = smaller(in_of(call) / 8, WIDEST_FIELD);
    if (pairs == 0 || others == 0 || others % pairs != 0 || call.rows.is_positive != nullptr)
        return {};
    const auto numbers = [&](int64_t row) {
        return static_cast<const char*>(row_of(call, row).at);
    };
    int64_t first = in_of(call), last = -1;
    // A sample of the rows says where the field is; then all are held against it.
    for (int64_t i = 0; i < others; i += larger(1, others / 64)) {
        const char *a = numbers(i % pairs), *b = numbers(pairs + i);
        constexpr int64_t STEP = 16;
        for (int64_t k = 0; k < in_of(call); k += STEP) {
            const int64_t end = smaller(in_of(call), k + STEP);
            if (std::memcmp(a + k * bytes, b + k * bytes, size_t((end - k) * bytes)) == 0) continue;
            for (int64_t j = k; j < end; j++)
                if (std::memcmp(a + j * bytes, b + j * bytes, size_t(bytes)) != 0)
                    first = smaller(first, j), last = larger(last, j);
            if (last - first >= most) return {};
        }
    }
    // Equal rows share all of it; a field of one column keeps the rest of the code the same.
    if (last < 0) first = last = 0;
    const int64_t after = last + 1;
    constexpr int64_t RUN = 64;
    int differs = 0;
    parallel(pieces(others, RUN), workers_for(call, others * in_of(call)), [&](int64_t run, int) {
        for (int64_t i = run * RUN; i < smaller(others, (run + 1) * RUN); i++) {
            const char *a = numbers(i % pairs), *b = numbers(pairs + i);
            if (std::memcmp(a, b, size_t(first * bytes)) == 0
                && std::memcmp(a + after * bytes, b + after * bytes,
                               size_t((in_of(call) - after) * bytes))
                       == 0)
                continue;
            __atomic_store_n(&differs, 1, __ATOMIC_RELAXED);
            return;
        }
    });
    if (differs) return {};
    return {first, after - first, others / pairs};
}

// Likewise; where the caller has brought a product it stands for rows that differ from the positive
// ones within its label field alone, and for positive rows that are `alone`. Of others nothing is
// known, and they are multiplied.
inline Field label_field(const ffk::Call& call, bool alone) {
    const int64_t columns = call.rows.label_field;
    // A product is to be left of all other columns.
    if (call.outputs.product_out.at != nullptr) return {0, columns};
    const Field found = found_field(call);
    if (call.rows.product.at == nullptr || rounds(call) || operands_of(call) != FLOATS
        || columns > WIDEST_FIELD)
        return found;
    if (found.copies ? found.first + found.count > columns : !alone || rows_of(call, 1) > 0)
        return found;
    return {0, columns, found.copies, true};
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

// A row length that no power of two divides, so that rows do not fall onto the same cache lines.
inline int64_t stride_for(int64_t columns) {
    const int64_t stride = up_to(columns, 16);
    return stride % 256 == 0 ? stride + 16 : stride;
}

}  // namespace
