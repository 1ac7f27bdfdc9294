// Steps on one thread and on several, over one memory: the same bits, and, built with
// -fsanitize=thread, no race. Python and torch stay out of it, because a race detector knows
// nothing of the threads of a runtime that was not built for it.
#include "../cpu/kernels.h"
#include "check.h"

namespace {

struct Layer {
    std::vector<float> x_pos, x_neg, weight, bias, state[4], y, sumsq;
    float steps[2] = {0, 0}, loss = 0;

    Layer(int64_t n_pos, int64_t n_neg, int64_t in, int64_t out) {
        check::seed = 1;
        x_pos = check::numbers(n_pos * in), x_neg = check::numbers(n_neg * in);
        weight = check::numbers(out * in), bias = check::numbers(out);
        if (n_pos == n_neg)  // copies: one column differs
            for (int64_t i = 0; i < n_neg * in; i++)
                if (i % in != 0) x_neg[size_t(i)] = x_pos[size_t(i)];
        for (int i = 0; i < 4; i++) state[i].resize(i < 2 ? weight.size() : bias.size());
        y.resize(size_t((n_pos + n_neg) * out)), sumsq.resize(size_t(n_pos + n_neg));
    }

    int step(int64_t n_pos, int64_t n_neg, int64_t in, int64_t out, int threads) {
        ffk::Call call{};
        call.rows.x_pos = {x_pos.data(), n_pos, in, in, ffk::FLOAT32};
        call.rows.x_neg = {x_neg.data(), n_neg, in, in, ffk::FLOAT32};
        call.layer.weight = {weight.data(), out, in, in, ffk::FLOAT32},
        call.layer.bias = bias.data();
        call.layer.norm = ffk::NORM_L2, call.layer.eps = 1e-4;
        call.outputs.y = {y.data(), n_pos + n_neg, out, out, ffk::FLOAT32};
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
        return ffk::FFK_SET.linear_step(call);
    }
};

void same(const char* what, const std::vector<float>& one, const std::vector<float>& several,
          const char* layer) {
    for (size_t i = 0; i < one.size(); i++)
        check::same(check::bits_of(several[i]), check::bits_of(one[i]),
                    "%s: %s[%zu] on four threads", layer, what, i);
}

}  // namespace

int main() {
    const int64_t shapes[][4] = {
        {40, 40, 70, 90}, {130, 70, 450, 60}, {500, 500, 30, 40}, {2100, 2100, 10, 1100}};
    for (const auto& s : shapes) {
        Layer one(s[0], s[1], s[2], s[3]), several(s[0], s[1], s[2], s[3]);
        char name[80];
        std::snprintf(name, sizeof(name), "%lld + %lld rows, %lld -> %lld", (long long)s[0],
                      (long long)s[1], (long long)s[2], (long long)s[3]);
        for (int step = 0; step < 2; step++) {
            check::same(one.step(s[0], s[1], s[2], s[3], 1), 0, "%s: status on one thread", name);
            check::same(several.step(s[0], s[1], s[2], s[3], 4), 0, "%s: status on four", name);
        }
        same("weight", one.weight, several.weight, name),
            same("bias", one.bias, several.bias, name);
        same("y", one.y, several.y, name), same("sumsq", one.sumsq, several.sumsq, name);
        same("loss", {one.loss}, {several.loss}, name);
        check::same(one.loss > 0, 1, "%s: whether the loss is a positive number", name);
    }
    return check::result();
}
