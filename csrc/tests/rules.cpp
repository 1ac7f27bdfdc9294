// The optimizers' rules against their formulas in long double, over rows of every length.
#include "../cpu/rules.h"
#include "check.h"

namespace {

struct Options {
    const char* name;
    double lr, momentum, dampening, beta1, beta2, eps, decay;
    bool nesterov = false, maximize = false, first = false, decoupled = false;
    float steps = 0;
};

ffk::Slot record(const Options& o, float* m, float* v, float* steps) {
    ffk::Slot slot{};
    ffk::Numbers& u = slot.numbers;
    slot.state[0] = m, slot.state[1] = v, slot.state[2] = steps;
    u.lr = o.lr, u.momentum = o.momentum, u.dampening = o.dampening;
    u.beta1 = o.beta1, u.beta2 = o.beta2, u.eps = o.eps, u.decay = o.decay;
    u.nesterov = o.nesterov, u.maximize = o.maximize, u.first_step = o.first,
    u.decoupled = o.decoupled;
    return slot;
}

// A number, and how large the terms are that it is the sum of: by these its rounding goes.
struct Sum {
    long double value, size;
};
Sum operator+(Sum a, Sum b) { return {a.value + b.value, a.size + b.size}; }
Sum operator*(long double factor, Sum a) { return {factor * a.value, fabsl(factor) * a.size}; }
Sum of(long double value) { return {value, fabsl(value)}; }

struct Element {
    Sum p, m, v;
};

// torch.optim.SGD, and SGD with decoupled decay.
Element sgd(const Options& o, long double g, long double p, long double m, bool has_m) {
    Sum moved = (o.maximize ? -1 : 1) * of(g) + (o.decoupled ? 0 : o.decay) * of(p), buffer = of(m);
    if (has_m) {
        buffer = o.first ? moved : o.momentum * of(m) + (1 - (long double)o.dampening) * moved;
        moved = o.nesterov ? moved + o.momentum * buffer : buffer;
    }
    const long double kept = o.decoupled ? 1 - (long double)o.lr * o.decay : 1;
    return {kept * of(p) + -o.lr * moved, buffer, {}};
}

// torch.optim.Adam and AdamW.
Element adam(const Options& o, long double g, long double p, long double m, long double v) {
    const Sum gradient = (o.maximize ? -1 : 1) * of(g) + (o.decoupled ? 0 : o.decay) * of(p);
    const Sum mean = o.beta1 * of(m) + (1 - (long double)o.beta1) * gradient;
    const Sum square = o.beta2 * of(v)
                       + (1 - (long double)o.beta2)
                             * Sum{gradient.value * gradient.value, gradient.size * gradient.size};
    const long double step = o.steps + 1.L, c1 = 1 - powl(o.beta1, step),
                      c2 = 1 - powl(o.beta2, step);
    const long double root = sqrtl(square.value) / sqrtl(c2) + o.eps,
                      kept = o.decoupled ? 1 - (long double)o.lr * o.decay : 1;
    Sum update = o.lr / c1 / root * mean;
    update.size *= square.value > 0 ? square.size / square.value : 1;
    return {kept * of(p) + -1.L * update, mean, square};
}

template <int KIND>
void row(const Options& o, int64_t n, bool has_m) {
    const auto gradient = check::numbers(n), p = check::numbers(n, 0.1f), m = check::numbers(n);
    auto v = check::numbers(n);
    for (float& value : v) value *= value;
    auto new_p = p, new_m = m, new_v = v;
    float steps = o.steps;
    const Rule rule(KIND, record(o, new_m.data(), new_v.data(), &steps));
    rule.apply<KIND>(gradient.data(), n, new_p.data(), has_m ? new_m.data() : nullptr,
                     KIND == ffk::ADAM ? new_v.data() : nullptr);
    for (size_t i = 0; i < size_t(n); i++) {
        Element e{{p[i], 0}, {gradient[i], 0}, {v[i], 0}};
        if (KIND == ffk::ADAM) e = adam(o, gradient[i], p[i], m[i], v[i]);
        if (KIND == ffk::SGD) e = sgd(o, gradient[i], p[i], m[i], has_m), e.v = {v[i], 0};
        if (KIND == ffk::SGD && !has_m) e.m = {m[i], 0};
        const auto near = [&](const char* what, float got, Sum expected) {
            check::near(got, double(expected.value), 8 * check::HALF_ULP * double(expected.size),
                        "%s, %lld elements: %s[%zu]", o.name, (long long)n, what, i);
        };
        near("parameter", new_p[i], e.p), near("state 0", new_m[i], e.m),
            near("state 1", new_v[i], e.v);
    }
}

}  // namespace

int main() {
    const Options of_sgd[] = {
        {"sgd", 0.1, 0, 0, 0, 0, 0, 0},
        {"sgd with decay", 0.1, 0, 0, 0, 0, 0, 0.3},
        {"sgd, first step", 0.1, 0.9, 0.4, 0, 0, 0, 0.3, false, false, true},
        {"sgd, dampened, maximized", 0.1, 0.9, 0.4, 0, 0, 0, 0.3, false, true},
        {"sgd, nesterov", 0.1, 0.9, 0, 0, 0, 0, 0.3, true},
        {"sgdw", 0.1, 0.9, 0.1, 0, 0, 0, 0.5, false, true, false, true}};
    const Options of_adam[] = {
        {"adam, step 1", 0.01, 0, 0, 0.9, 0.999, 1e-8, 0},
        {"adam, step 1000", 0.01, 0, 0, 0.9, 0.999, 1e-8, 0.2, false, false, false, false, 999},
        {"adam, small betas, maximized", 0.5, 0, 0, 1e-3, 0.1, 0.1, 0.2, false, true},
        {"adam, betas near 1", 0.01, 0, 0, 0.9999, 0.9999999, 1e-8, 0},
        {"adamw, step 5", 0.01, 0, 0, 0.9, 0.999, 1e-8, 0.2, false, false, false, true, 4}};
    for (const int64_t n : {1, LANES - 1, LANES, LANES + 1, 3 * LANES + 2}) {
        for (const Options& o : of_sgd)
            for (const bool has_m : {true, false}) row<ffk::SGD>(o, n, has_m);
        for (const Options& o : of_adam) row<ffk::ADAM>(o, n, true);
        row<ffk::GRAD>({"grad", 0.1, 0, 0, 0, 0, 0, 0.3}, n, true);
    }
    return check::result();
}
