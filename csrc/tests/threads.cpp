// Steps on one thread and on several, over one memory: the same bits, and, built with
// -fsanitize=thread, no race. Python and torch stay out of it, because a race detector knows
// nothing of the threads of a runtime that was not built for it.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/interface.h"

namespace {

struct Layer {
    std::vector<float> x_pos, x_neg, weight, bias, state[4], y, sumsq;
    float steps[2] = {0, 0}, loss = 0;

    Layer(int64_t n_pos, int64_t n_neg, int64_t in, int64_t out) {
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        auto draw = [&](int64_t n) {
            std::vector<float> values(static_cast<size_t>(n));
            for (float& value : values) value = normal(random);
            return values;
        };
        x_pos = draw(n_pos * in), x_neg = draw(n_neg * in), weight = draw(out * in),
        bias = draw(out);
        if (n_pos == n_neg)  // twins: one column differs
            for (int64_t i = 0; i < n_neg * in; i++)
                if (i % in != 0) x_neg[size_t(i)] = x_pos[size_t(i)];
        for (int i = 0; i < 4; i++) state[i].resize(i < 2 ? weight.size() : bias.size());
        y.resize(size_t((n_pos + n_neg) * out)), sumsq.resize(size_t(n_pos + n_neg));
    }

    int step(int64_t n_pos, int64_t n_neg, int64_t in, int64_t out, int threads) {
        ffk::Call call{};
        call.rows.x_pos = {x_pos.data(), n_pos, in, in, 0};
        call.rows.x_neg = {x_neg.data(), n_neg, in, in, 0};
        call.layer.weight = {weight.data(), out, in, in, 0}, call.layer.bias = bias.data();
        call.layer.norm = ffk::NORM_L2, call.layer.eps = 1e-4;
        call.outputs.y = {y.data(), n_pos + n_neg, out, out, 0};
        call.outputs.sumsq = sumsq.data(), call.outputs.loss_out = &loss;
        call.goal.temperature = call.goal.alpha = 1, call.goal.maximize = 1;
        call.goal.threshold_pos = call.goal.threshold_neg = 0.5;
        call.update.rule = ffk::ADAM, call.threads = threads;
        for (int i = 0; i < 2; i++) {
            ffk::Slot& slot = i ? call.update.bias : call.update.weight;
            slot.state[0] = state[2 * i].data(), slot.state[1] = state[2 * i + 1].data(),
            slot.state[2] = &steps[i];
            slot.numbers.lr = 0.01, slot.numbers.beta1 = 0.9, slot.numbers.beta2 = 0.999,
            slot.numbers.eps = 1e-8;
        }
        return ffk_linear_step(&call);
    }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
    const int64_t shapes[][4] = {
        {40, 40, 70, 90}, {130, 70, 450, 60}, {500, 500, 30, 40}, {2100, 2100, 10, 1100}};
    int failures = 0;
    for (const auto& s : shapes) {
        Layer one(s[0], s[1], s[2], s[3]), several(s[0], s[1], s[2], s[3]);
        for (int step = 0; step < 2; step++)
            failures +=
                one.step(s[0], s[1], s[2], s[3], 1) + several.step(s[0], s[1], s[2], s[3], 4);
        const bool equal = same(one.weight, several.weight) && same(one.bias, several.bias)
                           && same(one.y, several.y) && same(one.sumsq, several.sumsq)
                           && one.loss == several.loss && one.loss == one.loss && one.loss > 0;
        std::printf("%lld + %lld rows, %lld -> %lld: %s\n", (long long)s[0], (long long)s[1],
                    (long long)s[2], (long long)s[3], equal ? "same" : "DIFFERENT");
        failures += !equal;
    }
    return failures != 0;
}
