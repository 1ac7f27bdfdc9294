// Peer normalisation, straight through (ffkernels/peer.py): a pull p on each unit towards the mean
// unit's activity. With s = sum of r_i x_i over the n positive rows, dW += p s^T and db += n p: one
// outer product, whatever the rows. Gated, p act'(z_i) joins dLoss/dz of each of them.
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
    bool straight() const { return there() && !call.pull.gated; }
    // Then p act'(z) joins each positive row's dLoss/dz: the pull has to be known before the first
    // of these.
    bool gated() const { return there() && call.pull.gated; }

    void start() {
        std::memset(activity, 0, size_t(up_to(out_of(call), TILE_ROWS)) * 4);
        std::memset(input, 0, size_t(up_to(in_of(call), PANEL)) * 4);
        const int64_t rows = rows_of(call, 0) + rows_of(call, 1);
        for (int64_t i = 0; i < rows; i++) count += is_positive(i);
    }

    bool is_positive(int64_t row) const {
        return call.rows.is_positive != nullptr ? call.rows.is_positive[row] != 0
                                                : row < rows_of(call, 0);
    }

    // Before anything else is done with a block.
    void mark(const Block& block) const {
        std::memset(positive, 0, size_t(block.columns()) * 4);
        for (int64_t g = 0; g < block.groups; g++)
            for (int64_t i = 0; i < block.count(g); i++)
                positive[block.column(g, i)] = is_positive(block.row(g, i));
    }

    // Adds a block's activities of some units: kept [units, stride].
    void see(const Block& block, int64_t first, int64_t units, const float* kept,
             int64_t stride) const {
        for (int64_t o = 0; o < units; o++) {
            const float* of_unit = kept + o * stride;
            activity[first + o] += is_curved(call) ? dot_of_curve(of_unit, block.columns())
                                                   : dot(of_unit, positive, block.columns());
        }
    }

    float dot_of_curve(const float* z, int64_t columns) const {
        vec total = {};
        with_activation(call, [&](auto act) {
            for (int64_t k = 0; k < columns; k += LANES)
                total += act(load(z + k)).y * load(positive + k);
        });
        return sum(total);
    }

    // Adds a block's rows; `scale`: per column.
    void weigh(const Block& block, const float* scale) const {
        for (int64_t g = 0; g < block.groups; g++)
            for (int64_t i = 0; i < block.count(g); i++) {
                const int64_t column = block.column(g, i);
                if (positive[column] == 0) continue;
                const float* row = row_of(call, block.row(g, i)).operands(in_of(call), unpacked);
                for (int64_t k = 0; k < in_of(call); k++) input[k] += scale[column] * row[k];
            }
    }

    // The gated pull has no other way than through dLoss/dz: coefficients go into it first
    // (`weights`, which come as copies), and what is left of them says which rows take part.
    void take_over(const Block& block, float* coefficient, float* weights) const {
        for (int64_t column = 0; column < block.columns(); column++) {
            weights[column] = flushed(coefficient[column]);
            coefficient[column] = weights[column] != 0 || positive[column] != 0;
        }
    }

    // What a vector of columns adds to dLoss/dz, if the pull is gated.
    vec pulled(int64_t unit, int64_t column, vec slope) const {
        return load(positive + column) * activity[unit] * slope;
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
