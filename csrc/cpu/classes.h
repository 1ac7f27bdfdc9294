// Class groups: the goodness of each row's groups in, the loss and a coefficient for each row and
// group out (ffkernels/objectives/classes.py).
#pragma once
#include "block.h"
#include "objective.h"
#include "peers.h"

namespace {

// A row's loss by the goodness of its classes, and the loss's slopes by them.
struct ClassObjective {
    const ffk::Call& call;
    int64_t classes;
    float sign, temperature;

    explicit ClassObjective(const ffk::Call& c)
        : call(c),
          classes(c.goal.classes),
          sign(c.goal.maximize ? 1 : -1),
          temperature(float(c.goal.temperature)) {}

    bool there() const {
        return call.goal.loss == ffk::CROSS_ENTROPY || call.goal.loss == ffk::PVN
               || call.goal.loss == ffk::CWC;
    }

    // The weighted loss of row `i`. `values[k * stride]`: goodness of class k, which becomes the
    // weighted slope by it.
    float of_row(int64_t i, float* values, int64_t stride) const {
        const int64_t label = call.rows.labels[i];
        // What nobody has checked, in compiled code, takes no part and shows in the loss.
        const bool known = label >= 0 && label < classes;
        float loss = __builtin_nanf("");
        if (known && call.goal.loss == ffk::CROSS_ENTROPY)
            loss = cross_entropy(label, values, stride);
        else if (known)
            loss = call.goal.loss == ffk::CWC ? cwc(label, values, stride)
                                              : pvn(label, values, stride);
        float weight = 1 / float(rows_of(call, 0));
        if (call.rows.sample_weight != nullptr) weight *= call.rows.sample_weight[i];
        bool left_out = true;
        for (int64_t k = 0; known && k < classes; k++)
            left_out =
                left_out && __builtin_fabsf(values[k * stride]) < float(call.goal.skip_below);
        const float factor = weight * (sign / temperature);
        for (int64_t k = 0; k < classes; k++)
            values[k * stride] = left_out ? 0 : values[k * stride] * factor;
        return weight * loss;
    }

    float logit(float goodness) const { return sign * goodness / temperature; }

    // Each of these: the loss; goodness becomes the slope by the logit `sign goodness / T`.
    float cross_entropy(int64_t label, float* values, int64_t stride) const {
        int64_t first = 0;
        for (int64_t k = 0; k < classes; k++) {
            values[k * stride] = logit(values[k * stride]);
            if (values[k * stride] > values[first * stride]) first = k;
        }
        const float largest = values[first * stride], of_label = values[label * stride] - largest;
        // What the largest adds is one: the sum without it keeps the digits of a loss near zero.
        double rest = 0, all = 0;
        for (int64_t k = 0; k < classes; k++) {
            const float below = values[k * stride] - largest;
            values[k * stride] = __builtin_expf(below);
            if (k != first) rest += values[k * stride];
            all += below;
        }
        const double smoothing = call.goal.label_smoothing, share = smoothing / double(classes),
                     others = label == first ? rest : rest + 1 - values[label * stride];
        for (int64_t k = 0; k < classes; k++)
            values[k * stride] =
                float(k == label ? smoothing - share - others / (1 + rest)
                                 : double(values[k * stride]) / (1 + rest) - share);
        // Logits may be infinite, of which nothing is nothing.
        const double spread = share == 0 ? 0 : share * all;
        const double of_own = smoothing == 1 ? 0 : (1 - smoothing) * of_label;
        return float(__builtin_log1p(rest) - of_own - spread);
    }

    float cwc(int64_t label, float* values, int64_t stride) const {
        constexpr float MOST = 50;
        constexpr double EPS = 1e-9;
        double others = 0;
        for (int64_t k = 0; k < classes; k++) {
            const float t = logit(values[k * stride]),
                        clamped = t > MOST    ? MOST
                                  : t < -MOST ? -MOST
                                              : t,
                        power = __builtin_expf(clamped);
            if (k != label) others += power;
            // A power has no sign: that of one whose logit is clamped is lent to say so.
            values[k * stride] = clamped != t ? -power : power;
        }
        const double own = __builtin_fabsf(values[label * stride]), all = own + others + EPS;
        for (int64_t k = 0; k < classes; k++) {
            const float power = values[k * stride];
            const double part = k == label ? -others * (own / (own + EPS)) : power;
            values[k * stride] = power < 0 ? 0 : float(part / all);
        }
        return float(__builtin_log1p(others / (own + EPS)));
    }

    float pvn(int64_t label, float* values, int64_t stride) const {
        const float theta = float(call.goal.threshold_pos),
                    half = call.goal.reduction == ffk::REDUCE_MEAN ? 0.5f : 1;
        double others = 0;
        for (int64_t k = 0; k < classes; k++)
            if (k != label) others += values[k * stride];
        const float own = logit(theta - values[label * stride]);
        float loss = softplus(own);
        if (classes > 1) {
            const float other = logit(float(others / double(classes - 1) - theta)),
                        slope = half * sigmoid(other) / float(classes - 1);
            loss += softplus(other);
            for (int64_t k = 0; k < classes; k++) values[k * stride] = slope;
        }
        values[label * stride] = -half * sigmoid(own);
        return half * loss;
    }
};

// The part of a step that class groups have.
struct Classes {
    const ffk::Call& call;
    ClassObjective objective;
    Groups groups;
    Chunks chunks;
    int64_t width;   // columns
    bool squares;    // whether squared activities are summed, or activities
    float* partial;  // [segments, width]: a segment is what of a group lies in one chunk, so that
                     // no sum depends on who adds it
    float* values;   // [classes, width]: goodness, then what y or act'(z) is multiplied by
    float* loss;     // per column

    Classes(const ffk::Call& c, const Block& largest, Memory& memory)
        : call(c),
          objective(c),
          groups{out_of(c), c.goal.classes},
          chunks(c, largest.operands()),
          width(largest.columns()),
          squares(c.goal.goodness != ffk::GOODNESS_ACTIVITY) {
        if (!there()) return;
        partial = memory.take((chunks.count() + groups.count) * width);
        values = memory.take(groups.count * width), loss = memory.take(width);
    }

    bool there() const { return objective.there(); }

    // Calls `f` with each group that has units in a chunk, and the first and the end of them.
    template <class F>
    void each_segment(int64_t chunk, F f) const {
        const int64_t first = chunks.first(chunk), size = chunks.size(chunk);
        for (int64_t o = 0; o < size;) {
            const int64_t group = groups.of(first + o),
                          end = smaller(size, groups.first(group + 1) - first);
            f(group, o, end);
            o = end;
        }
    }

    // Of segments in order, the chunk or the group grows.
    float* segment(int64_t chunk, int64_t group) const { return partial + (chunk + group) * width; }

    // Sums over a chunk's units; y [units, stride].
    void see(const Block& block, int64_t chunk, const float* y, int64_t stride) const {
        each_segment(chunk, [&](int64_t group, int64_t first, int64_t end) {
            for (int64_t column = 0; column < block.columns(); column += LANES) {
                vec total = {};
                for (int64_t o = first; o < end; o++) {
                    const vec activity = load(y + o * stride + column);
                    total += squares ? activity * activity : activity;
                }
                store(segment(chunk, group) + column, total);
            }
        });
    }

    // Sums to coefficients: which rows have any, 1 or 0 per column; returns the block's loss.
    double solve(const Block& block, float* any) const {
        std::memset(any, 0, size_t(block.columns()) * 4);
        parallel(block.columns() / LANES, workers_for(call, block.columns() * groups.count * 64),
                 [&](int64_t vector, int) {
                     const int64_t column = vector * LANES;
                     for (int64_t k = 0; k < groups.count; k++) form_goodness(k, column);
                     for (int64_t i = column; i < smaller(block.rows[0], column + LANES); i++)
                         any[i] = solve_row(block.row(0, i), i);
                     // Columns without a row have activities of their own, and no part in a sum.
                     for (int64_t k = 0; k < groups.count; k++)
                         for (int64_t i = larger(column, block.rows[0]); i < column + LANES; i++)
                             values[k * width + i] = 0;
                 });
        double total = 0;
        for (int64_t i = 0; i < block.rows[0]; i++) total += loss[i];
        return total;
    }

    void form_goodness(int64_t k, int64_t column) const {
        const int64_t last = (groups.first(k + 1) - 1) / chunks.rows;
        vec total = {};
        for (int64_t chunk = groups.first(k) / chunks.rows; chunk <= last; chunk++)
            total += load(segment(chunk, k) + column);
        const bool sum = call.goal.goodness == ffk::GOODNESS_SUM;
        store(values + k * width + column, sum ? total : total / float(groups.size(k)));
    }

    float solve_row(int64_t row, int64_t column) const {
        float* goodness = call.outputs.goodness_out;
        for (int64_t k = 0; goodness != nullptr && k < groups.count; k++)
            goodness[row * groups.count + k] = values[k * width + column];
        float any = 0;
        loss[column] = objective.of_row(row, values + column, width);
        for (int64_t k = 0; k < groups.count; k++) {
            float& value = values[k * width + column];
            const float size = call.goal.goodness == ffk::GOODNESS_SUM ? 1 : float(groups.size(k));
            value = flushed(value * (squares ? 2 : 1) / size);
            if (value != 0) any = 1;
        }
        return any;
    }

    // What the forward pass has kept of a chunk's units to dLoss/dz.
    void apply(const Block& block, int64_t chunk, float* kept, int64_t stride,
               const Peers& peers) const {
        with_activation(call, [&](auto act) {
            each_segment(chunk, [&](int64_t group, int64_t first, int64_t end) {
                for (int64_t column = 0; column < block.columns(); column += LANES) {
                    const vec c = load(values + group * width + column);
                    for (int64_t o = first; o < end; o++) {
                        float* at = kept + o * stride + column;
                        const Active a = act(load(at));
                        vec dz = squares ? flushed(a.y * a.slope * c) : a.slope * c;
                        if (peers.gated())
                            dz += peers.pulled(chunks.first(chunk) + o, column, a.slope);
                        store(at, dz);
                    }
                }
            });
        });
    }
};

}  // namespace
