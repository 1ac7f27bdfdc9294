// Peer normalisation, straight through (ffkernels/peer.py): a pull p on each unit towards the mean
// unit's activity. With s = sum of r_i x_i over the n positive rows, dW += p s^T and db += n p: one
// outer product, whatever the rows.
#pragma once
#include "block.h"

namespace {

struct Peers {
    const ffk::Call& call;
    float* activity;  // [out]: sums over the positive rows; then p
    float* input;     // [in]: s
    float* positive;  // per column: 1 for a positive row, else 0
    float* unpacked;  // [in]: a row
    double count = 0;

    Peers(const ffk::Call& c, const Block& largest, Memory& memory) : call(c) {
        if (!there()) return;
        activity = memory.take(up_to(out_of(call), TILE_ROWS)),
        input = memory.take(up_to(in_of(call), PANEL));
        positive = memory.take(largest.columns()), unpacked = memory.take(in_of(call));
    }

    bool there() const { return call.pull.mean != nullptr; }

    void start() {
        std::memset(activity, 0, size_t(up_to(out_of(call), TILE_ROWS)) * 4);
        std::memset(input, 0, size_t(up_to(in_of(call), PANEL)) * 4);
    }

    // Adds a block's rows: y_t [out, stride] and the row scales, per column.
    void see(const Block& block, const float* y_t, int64_t stride, const float* scale) {
        std::memset(positive, 0, size_t(block.columns()) * 4);
        for (int64_t g = 0; g < block.groups; g++)
            for (int64_t i = 0; i < block.count(g); i++) {
                const int64_t at = block.row(g, i), column = block.column(g, i);
                if (call.rows.is_positive != nullptr ? !call.rows.is_positive[at] : g != 0)
                    continue;
                const float* row = row_of(call, at).operands(in_of(call), unpacked);
                positive[column] = 1, count += 1;
                for (int64_t k = 0; k < in_of(call); k++) input[k] += scale[column] * row[k];
            }
        for (int64_t o = 0; o < out_of(call); o++)
            activity[o] += dot(y_t + o * stride, positive, block.columns());
    }

    // Moves the running means, and makes p of them; without positive rows neither.
    void finish() {
        double total = 0;
        for (int64_t o = 0; o < out_of(call); o++) {
            float& mean = call.pull.mean[o];
            // A sum of both parts: nothing is lost of a mean that is small beside the old one.
            if (count > 0)
                mean = float(call.pull.momentum) * mean
                       + float(1 - call.pull.momentum) * (activity[o] / float(count));
            total += mean;
        }
        const float whole = float(total / double(out_of(call))),
                    strength = count > 0 ? float(call.pull.strength / count) : 0;
        for (int64_t o = 0; o < out_of(call); o++)
            activity[o] = strength * (call.pull.mean[o] - whole);
    }

    float pull(int64_t unit) const { return activity[unit]; }
};

}  // namespace
