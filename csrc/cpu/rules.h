// The optimizers' rules on a piece of a parameter whose gradient has just been formed
// (ffkernels/backends/eager/rules.py).
#pragma once
#include "interface.h"
#include "vector.h"

namespace {

// torch.optim.SGD: g += decay p; m = momentum m + (1 - dampening) g; p -= lr (m, or g + momentum
// m). Decoupled: p *= 1 - lr decay instead. torch.optim.Adam: m = beta1 m + (1 - beta1) g; v =
// beta2 v + (1 - beta2) g^2; p -= lr / c1 m / (sqrt(v) / sqrt(c2) + eps).
struct Rule {
    float sign, decay, decoupled, lr, momentum, kept;
    bool nesterov, first;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_root, eps;

    Rule(int kind, const ffk::Slot& slot) {
        const ffk::Numbers& u = slot.numbers;
        sign = u.maximize != 0 ? -1.f : 1.f;
        decay = u.decoupled != 0 ? 0.f : float(u.decay);
        decoupled = u.decoupled != 0 ? float(1 - u.lr * u.decay) : 1.f;
        lr = float(u.lr);
        momentum = float(u.momentum), kept = float(1 - u.dampening);
        nesterov = u.nesterov != 0, first = u.first_step != 0;
        if (kind != ffk::ADAM) return;
        const double step = double(*slot.state[2]) + 1;
        lr = float(u.lr / (1 - __builtin_pow(u.beta1, step)));
        inverse_root = float(1 / __builtin_sqrt(1 - __builtin_pow(u.beta2, step)));
        beta1 = float(u.beta1), one_minus_beta1 = float(1 - u.beta1), beta2 = float(u.beta2),
        one_minus_beta2 = float(1 - u.beta2);
        eps = float(u.eps);
    }

    // `p`, `m`, `v` are read and written; SGD without momentum has no `m`.
    template <int KIND>
    __attribute__((always_inline)) void apply(vec g, float* p, float* m, float* v) const {
        if (KIND == ffk::GRAD) return store(m, g);
        vec w = load(p);
        g = g * sign + w * decay;
        if (KIND == ffk::ADAM) {
            // A sum of both parts: m + (g - m)(1 - beta1) loses a gradient that is small beside m
            // where beta1 is small.
            const vec mean = load(m) * beta1 + g * one_minus_beta1;
            const vec square = load(v) * beta2 + g * g * one_minus_beta2;
            store(m, mean), store(v, square);
            store(p, w * decoupled - mean * lr / (square_root(square) * inverse_root + eps));
            return;
        }
        if (m != nullptr) {
            const vec buffer = first ? g : load(m) * momentum + g * kept;
            store(m, buffer);
            g = nesterov ? g + buffer * momentum : buffer;
        }
        store(p, w * decoupled - g * lr);
    }

    // `n` elements of a row; what does not fill a vector goes through one that is wide enough.
    template <int KIND>
    void apply(const float* g, int64_t n, float* p, float* m, float* v) const {
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES)
            apply<KIND>(load(g + j), p + j, m != nullptr ? m + j : nullptr,
                        KIND == ffk::ADAM ? v + j : nullptr);
        if (j == n) return;
        const size_t bytes = size_t(n - j) * 4;
        float gradient[LANES] = {}, own[3][LANES] = {};
        float* given[3] = {p, m, v};
        std::memcpy(gradient, g + j, bytes);
        for (int i = 0; i < 3; i++)
            if (given[i] != nullptr) std::memcpy(own[i], given[i] + j, bytes);
        apply<KIND>(load(gradient), own[0], m != nullptr ? own[1] : nullptr, own[2]);
        for (int i = 0; i < 3; i++)
            if (given[i] != nullptr) std::memcpy(given[i] + j, own[i], bytes);
    }
};

}  // namespace
