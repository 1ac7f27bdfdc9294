// A row's loss by the goodness of its classes, and its slopes, against their formulas in long
// double.
#include "../cpu/classes.h"
#include "check.h"

namespace {

using Long = long double;

struct Options {
    ffk::Loss loss;
    int64_t classes;
    bool maximize, weighted;
    ffk::Reduction reduction;
    double temperature, smoothing, skip_below;
};

constexpr int64_t ROWS = 4, STRIDE = 3;
constexpr double THRESHOLD = 0.75;
const float WEIGHT[ROWS] = {0.5, 2, 0, 1};

Long softplus_of(Long t) { return log1pl(expl(-fabsl(t))) + (t > 0 ? t : 0); }
Long sigmoid_of(Long t) { return 1 / (1 + expl(-t)); }

// The loss of logits `t` (`theta`: the threshold's), and its slopes by them.
Long expected(const Options& o, const std::vector<Long>& t, Long theta, int64_t label,
              std::vector<Long>& slope) {
    const Long half = o.reduction == ffk::REDUCE_MEAN ? 0.5L : 1, count = Long(o.classes);
    Long largest = t[0], sum = 0, all = 0;
    for (const Long v : t) largest = std::max(largest, v), all += v;
    if (o.loss == ffk::PVN) {
        const Long others = o.classes > 1 ? (all - t[size_t(label)]) / (count - 1) : 0,
                   above = theta - t[size_t(label)], below = others - theta;
        for (int64_t k = 0; k < o.classes; k++)
            slope[size_t(k)] =
                k == label ? -half * sigmoid_of(above) : half * sigmoid_of(below) / (count - 1);
        return half * (softplus_of(above) + (o.classes > 1 ? softplus_of(below) : 0));
    }
    if (o.loss == ffk::CROSS_ENTROPY) {
        for (const Long v : t) sum += expl(v - largest);
        Long others = 0;
        for (int64_t k = 0; k < o.classes; k++)
            if (k != label) others += expl(t[size_t(k)] - largest) / sum;
        const Long share = o.smoothing / count;
        for (int64_t k = 0; k < o.classes; k++)
            slope[size_t(k)] = k == label ? -others + o.smoothing - share
                                          : expl(t[size_t(k)] - largest) / sum - share;
        return largest + logl(sum) - (1 - Long(o.smoothing)) * t[size_t(label)] - share * all;
    }
    std::vector<Long> power;
    for (const Long v : t) power.push_back(expl(std::min(50.L, std::max(-50.L, v))));
    for (int64_t k = 0; k < o.classes; k++)
        if (k != label) sum += power[size_t(k)];
    const Long own = power[size_t(label)], eps = 1e-9L;
    for (int64_t k = 0; k < o.classes; k++) {
        const Long part = k == label ? -sum * own / (own + eps) : power[size_t(k)];
        slope[size_t(k)] = fabsl(t[size_t(k)]) > 50 ? 0 : part / (own + sum + eps);
    }
    return log1pl(sum / (own + eps));
}

void row(const Options& o, float size) {
    ffk::Call call{};
    int64_t labels[ROWS];
    call.rows.x_pos.rows = ROWS, call.rows.labels = labels;
    call.rows.sample_weight = o.weighted ? WEIGHT : nullptr;
    call.goal.loss = o.loss, call.goal.classes = o.classes, call.goal.maximize = o.maximize;
    call.goal.reduction = o.reduction, call.goal.temperature = o.temperature;
    call.goal.threshold_pos = THRESHOLD, call.goal.label_smoothing = o.smoothing;
    call.goal.skip_below = o.skip_below;
    const ClassObjective objective(call);
    const size_t count = size_t(o.classes);
    for (int64_t i = 0; i < ROWS; i++) {
        labels[i] = int64_t(check::chance() * double(o.classes));
        const std::vector<float> goodness = check::numbers(o.classes, size);
        std::vector<float> values(count * STRIDE);
        const Long sign = o.maximize ? 1 : -1, scale = sign / Long(float(o.temperature));
        std::vector<Long> t(count), slope(count);
        Long reach = fabsl(scale * THRESHOLD);
        for (size_t k = 0; k < count; k++) {
            values[k * STRIDE] = goodness[k], t[k] = scale * goodness[k];
            reach = std::max(reach, fabsl(t[k]));
        }
        const Long loss = expected(o, t, scale * THRESHOLD, labels[i], slope),
                   weight = (o.weighted ? WEIGHT[i] : 1.L) / ROWS,
                   // Of a logit, whose error a loss hands on; slopes are as steep as one at most.
            off = 8 * check::HALF_ULP * (1 + reach);
        bool left_out = true, doubtful = false;
        for (const Long s : slope) {
            left_out = left_out && fabsl(s) < o.skip_below;
            doubtful = doubtful || (o.skip_below > 0 && fabsl(fabsl(s) - o.skip_below) < off);
        }
        if (doubtful) continue;
        const float got = objective.of_row(i, values.data(), STRIDE);
        check::near(got, double(weight * loss),
                    double(weight * (off + 8 * check::HALF_ULP * fabsl(loss))),
                    "loss %d of %lld classes of goodness up to %g (temperature %g, smoothing %g)",
                    o.loss, (long long)o.classes, double(size), o.temperature, o.smoothing);
        for (size_t k = 0; k < count; k++) {
            // CwC's slope jumps where its logits are clamped.
            if (o.loss == ffk::CWC && fabsl(fabsl(t[k]) - 50) < off) continue;
            const Long s = left_out ? 0 : slope[k];
            check::near(
                values[k * STRIDE], double(weight * scale * s),
                double(fabsl(weight * scale) * off * std::min(1.L, 4 * fabsl(s) + off)
                       + check::SMALLEST + (o.smoothing > 0 ? fabsl(weight * scale) * off : 0)),
                "slope of loss %d by class %zu of %zu, label %lld, goodness up to %g "
                "(temperature %g, smoothing %g)",
                o.loss, k, count, (long long)labels[i], double(size), o.temperature, o.smoothing);
        }
    }
}

void unknown_label() {
    ffk::Call call{};
    const int64_t labels[] = {-1, 3};
    call.rows.x_pos.rows = 2, call.rows.labels = labels;
    call.goal.classes = 3, call.goal.temperature = 1;
    for (const auto loss : {ffk::CROSS_ENTROPY, ffk::PVN, ffk::CWC})
        for (int64_t i = 0; i < 2; i++) {
            call.goal.loss = loss;
            float values[3] = {1, 2, 3};
            check::near(ClassObjective(call).of_row(i, values, 1), NAN, 0,
                        "loss %d of the label %lld", loss, (long long)labels[i]);
            for (const float value : values)
                check::near(value, 0, 0, "slope of loss %d under the label %lld", loss,
                            (long long)labels[i]);
        }
}

}  // namespace

int main() {
    for (const int64_t classes : {1, 2, 10, 100})
        for (int flags = 0; flags < 8; flags++)
            for (const double temperature : {0.1, 1., 7.})
                for (const double skip_below : {0., 0.2})
                    for (const float size : {0.f, 1e-3f, 1.f, 20.f, 300.f, 1e6f}) {
                        Options o{ffk::PVN, classes, bool(flags & 1), bool(flags & 2)};
                        o.reduction = flags & 4 ? ffk::REDUCE_SUM_OF_MEANS : ffk::REDUCE_MEAN;
                        o.temperature = temperature, o.skip_below = skip_below;
                        row(o, size);
                        o.loss = ffk::CWC, row(o, size);
                        o.loss = ffk::CROSS_ENTROPY, row(o, size);
                        o.smoothing = 0.1, row(o, size);
                    }
    unknown_label();
    return check::result();
}
