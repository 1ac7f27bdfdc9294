// From sums of squares to row coefficients and the loss: ffkernels/objectives/objective.py,
// Objective.terms, row by row.
#pragma once
#include "rows.h"

namespace {

inline float sigmoid(float t) { return 1 / (1 + __builtin_expf(-t)); }

inline float softplus(float t) {
    return (t > 0 ? t : 0) + __builtin_log1pf(__builtin_expf(t > 0 ? -t : t));
}

struct Terms {
    float coefficient, loss;
};

struct Objective {
    const ffk::Call& call;
    float divisor[2];  // how many rows (or pairs) share the weight of one, for negative and
                       // positive rows

    explicit Objective(const ffk::Call& c) : call(c) {
        const int64_t rows = rows_of(c, 0) + rows_of(c, 1);
        int64_t positives = rows_of(c, 0);
        if (c.rows.is_positive != nullptr) {
            positives = 0;
            for (int64_t i = 0; i < rows; i++) positives += c.rows.is_positive[i] != 0;
        }
        const bool whole = c.goal.reduction == ffk::REDUCE_MEAN;
        divisor[1] = float(larger(1, paired() ? rows_of(c, 0) : whole ? rows : positives));
        divisor[0] = float(larger(1, whole ? rows : rows - positives));
    }

    bool paired() const { return call.goal.loss != ffk::LOGISTIC; }

    float goodness(float q) const {
        if (call.goal.goodness == ffk::GOODNESS_MEAN) return q / float(out_of(call));
        return call.goal.goodness == ffk::GOODNESS_NORM ? __builtin_sqrtf(q) : q;
    }

    // 2 dg/dq, where the slope of a root at zero is taken for zero: such a row has no activity to
    // move.
    float slope(float q, float g) const {
        if (call.goal.goodness == ffk::GOODNESS_MEAN) return 2 / float(out_of(call));
        return call.goal.goodness == ffk::GOODNESS_NORM ? (q > 0 ? 1 / g : 0) : 2;
    }

    // A loss's steepness, or zero where the caller leaves such rows out.
    float unless_left_out(float steepness) const {
        return __builtin_fabsf(steepness) < float(call.goal.skip_below) ? 0 : steepness;
    }

    Terms of_row(int64_t i, float q) const {
        const bool positive =
            call.rows.is_positive != nullptr ? call.rows.is_positive[i] != 0 : i < rows_of(call, 0);
        const float scale =
            ((positive == (call.goal.maximize != 0)) ? -1 : 1) / float(call.goal.temperature);
        float theta = float(positive ? call.goal.threshold_pos : call.goal.threshold_neg);
        if (call.goal.threshold != nullptr) theta = call.goal.threshold[i];
        float weight = 1 / divisor[positive];
        if (call.rows.sample_weight != nullptr) weight *= call.rows.sample_weight[i];
        const float g = goodness(q), t = scale * (g - theta);
        return {weight * scale * unless_left_out(sigmoid(t)) * slope(q, g), weight * softplus(t)};
    }

    // The i-th positive row against the i-th negative one: both coefficients, and the loss in the
    // first.
    void of_pair(int64_t i, float q_pos, float q_neg, Terms& pos, Terms& neg) const {
        const float scale = float(call.goal.maximize ? -call.goal.alpha : call.goal.alpha);
        float weight = 1 / divisor[1];
        if (call.rows.sample_weight != nullptr) weight *= call.rows.sample_weight[i];
        const float g_pos = goodness(q_pos), g_neg = goodness(q_neg), t = scale * (g_pos - g_neg),
                    s = sigmoid(t);
        const bool swish = call.goal.loss == ffk::SWISH;
        const float common = weight * scale * unless_left_out(swish ? s * (1 + t * (1 - s)) : s);
        pos = {common * slope(q_pos, g_pos), weight * (swish ? t * s : softplus(t))};
        neg = {-common * slope(q_neg, g_neg), 0};
    }
};

}  // namespace
