// A row's coefficient and loss, and a pair's, against their formulas in long double, for logits up
// to the ends of float32.
#include "../cpu/objective.h"
#include "check.h"

namespace {

using Long = long double;

// Everything that a call says of the objective.
struct Options {
    ffk::Goodness goodness;
    ffk::Loss loss = ffk::LOGISTIC;
    ffk::Reduction reduction = ffk::REDUCE_MEAN;
    bool maximize = true, mixed = false, weighted = false, own_thresholds = false;
    double temperature = 1, skip_below = 0;
};

constexpr int64_t PAIRS = 3, ROWS = 2 * PAIRS, UNITS = 7;
constexpr double THRESHOLD[2] = {0.25, 1.5}, ALPHA = 4;  // of negative and positive rows
const uint8_t IS_POSITIVE[ROWS] = {1, 1, 0, 1, 1, 0};
const float WEIGHT[ROWS] = {0.5, 2, 0, 1, 3, 0.125}, OWN[ROWS] = {0, 1, 2, -3, 40, 5};

ffk::Call call_of(const Options& o) {
    ffk::Call c{};
    c.rows.x_pos.rows = c.rows.x_neg.rows = PAIRS, c.layer.weight.rows = UNITS;
    c.rows.is_positive = o.mixed ? IS_POSITIVE : nullptr;
    c.rows.sample_weight = o.weighted ? WEIGHT : nullptr;
    c.goal = {o.goodness, THRESHOLD[1], THRESHOLD[0], o.own_thresholds ? OWN : nullptr,
              o.loss,     o.maximize,   o.reduction,  o.temperature,
              ALPHA,      o.skip_below};
    return c;
}

Long goodness(const Options& o, Long q) {
    if (o.goodness == ffk::GOODNESS_NORM) return sqrtl(q);
    return o.goodness == ffk::GOODNESS_MEAN ? q / UNITS : q;
}

Long slope(const Options& o, Long q) {
    if (o.goodness == ffk::GOODNESS_NORM) return q > 0 ? 1 / sqrtl(q) : 0;
    return o.goodness == ffk::GOODNESS_MEAN ? 2.L / UNITS : 2;
}

// A loss at the logit `t`, and its derivative, with what float32 may make of them where the logit
// itself is off by `dt`.
struct Point {
    Long value, steepness, value_off, steepness_off;
};

Point at(ffk::Loss loss, Long t, Long dt) {
    const Long s = 1 / (1 + expl(-t)), rest = 1 / (1 + expl(t)), u = 8 * check::HALF_ULP;
    const Long tiny = check::SMALLEST * (1 + fabsl(t));
    if (loss != ffk::SWISH) {
        const Long value = log1pl(expl(-fabsl(t))) + (t > 0 ? t : 0);
        return {value, s, u * value + dt * s + tiny, u * s + dt * s * rest + tiny};
    }
    const Long curve = s * rest * (2 + fabsl(t));
    // One minus a sigmoid is as far off as the sigmoid.
    return {t * s, s * (1 + t * rest), u * fabsl(t) * s + dt * s * (1 + fabsl(t) * rest) + tiny,
            u * s * (1 + fabsl(t)) + dt * curve + tiny};
}

void compare(const char* what, const Options& o, float q, float q_neg, Terms got, Long weight,
             Long factor, Long t, Long dt) {
    const Point p = at(o.loss, t, dt);
    const bool out = fabsl(p.steepness) < o.skip_below;
    if (fabsl(fabsl(p.steepness) - o.skip_below) <= p.steepness_off && o.skip_below > 0) return;
    const Long size = fabsl(weight * factor), u = 16 * check::HALF_ULP;
    const auto near = [&](const char* term, float value, Long expected, Long off) {
        check::near(value, double(expected), double(off),
                    "%s of %s (goodness %d, loss %d, temperature %g, sums of squares %g and %g)",
                    term, what, o.goodness, o.loss, o.temperature, q, q_neg);
    };
    near("loss", got.loss, weight * p.value, weight * (p.value_off + u * fabsl(p.value)));
    near("coefficient", got.coefficient, out ? 0 : weight * factor * p.steepness,
         size * (p.steepness_off + u * fabsl(p.steepness)) + check::SMALLEST);
}

void rows(const Options& o, float q) {
    const ffk::Call call = call_of(o);
    const Objective objective(call);
    int64_t positives = 0;
    for (int64_t i = 0; i < ROWS; i++) positives += o.mixed ? IS_POSITIVE[i] : i < PAIRS;
    for (int64_t i = 0; i < ROWS; i++) {
        const bool positive = o.mixed ? IS_POSITIVE[i] : i < PAIRS;
        const int64_t alike = positive ? positives : ROWS - positives,
                      shared = o.reduction == ffk::REDUCE_MEAN ? ROWS : alike;
        const Long sign = positive == o.maximize ? -1 : 1, scale = sign / o.temperature,
                   theta = o.own_thresholds ? Long(OWN[i]) : THRESHOLD[positive],
                   g = goodness(o, q), weight = (o.weighted ? WEIGHT[i] : 1.L) / shared;
        compare(positive ? "a positive row" : "a negative row", o, q, 0, objective.of_row(i, q),
                weight, scale * slope(o, q), scale * (g - theta),
                8 * check::HALF_ULP * fabsl(scale) * (g + fabsl(theta)));
    }
}

void pairs(const Options& o, float q_pos, float q_neg) {
    const ffk::Call call = call_of(o);
    const Objective objective(call);
    for (int64_t i = 0; i < PAIRS; i++) {
        const Long scale = o.maximize ? -ALPHA : ALPHA, g_pos = goodness(o, q_pos),
                   g_neg = goodness(o, q_neg), t = scale * (g_pos - g_neg),
                   dt = 8 * check::HALF_ULP * fabsl(scale) * (g_pos + g_neg),
                   weight = (o.weighted ? WEIGHT[i] : 1.L) / PAIRS;
        Terms pos, neg;
        objective.of_pair(i, q_pos, q_neg, pos, neg);
        compare("a pair's positive row", o, q_pos, q_neg, pos, weight, scale * slope(o, q_pos), t,
                dt);
        check::near(neg.loss, 0, 0, "loss of a pair's negative row");
        neg.loss = pos.loss;
        compare("a pair's negative row", o, q_pos, q_neg, neg, weight, -scale * slope(o, q_neg), t,
                dt);
    }
}

}  // namespace

int main() {
    const float sums[] = {0, 1e-30f, 1e-6f, 0.3f, 1.75f, 10.5f, 90, 700, 1e4f, 1e10f, 1e30f};
    for (int flags = 0; flags < 32; flags++)
        for (const auto kind : {ffk::GOODNESS_MEAN, ffk::GOODNESS_SUM, ffk::GOODNESS_NORM})
            for (const double skip_below : {0., 0.1}) {
                Options o{kind};
                o.reduction = flags & 1 ? ffk::REDUCE_SUM_OF_MEANS : ffk::REDUCE_MEAN;
                o.maximize = flags & 2, o.mixed = flags & 4, o.weighted = flags & 8;
                o.own_thresholds = flags & 16, o.skip_below = skip_below;
                for (const float q : sums) {
                    for (const double temperature : {0.01, 1., 30.})
                        o.temperature = temperature, o.loss = ffk::LOGISTIC, rows(o, q);
                    for (const float q_neg : sums)
                        for (const auto loss : {ffk::SYMBA, ffk::SWISH})
                            if (!o.mixed && !o.own_thresholds) o.loss = loss, pairs(o, q, q_neg);
                }
            }
    return check::result();
}
