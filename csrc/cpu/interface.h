// The library's face: plain C, called through ctypes by ffkernels/backends/native/library.py, which
// mirrors `Call`. No torch header and no Python symbol: one build serves every version of both.
#pragma once
#include <cstdint>

namespace ffk {

// Raised whenever `Call` or the meaning of a field changes; a library with another number is
// refused.
constexpr int INTERFACE = 4;

enum Norm : int32_t { NORM_NONE, NORM_L2, NORM_RMS };
enum EpsMode : int32_t { EPS_ADD, EPS_CLAMP, EPS_INSIDE };
enum Activation : int32_t { RELU, LEAKY_RELU, IDENTITY };
enum Goodness : int32_t { GOODNESS_MEAN, GOODNESS_SUM, GOODNESS_NORM };
enum Loss : int32_t { LOGISTIC, SYMBA, SWISH };
enum Reduction : int32_t { REDUCE_MEAN, SUM_OF_MEANS };
enum Rule : int32_t { GRAD, SGD, ADAM };

// How one parameter is updated. `state`: grad {gradient}, sgd {momentum buffer or null}, adam
// {exp_avg, exp_avg_sq, step}.
struct Update {
    float* state[3];
    double lr, momentum, dampening, beta1, beta2, eps, weight_decay;
    int32_t nesterov, maximize, first_step, decoupled;
};

// One call of either operator (ffkernels/ops.py); everything in row-major order, strides in
// elements.
struct Call {
    const void*
        x[2];  // [rows[side], in]: positive, negative side; float32 or, with x_bfloat16, bfloat16
    int64_t rows[2], x_stride[2];
    int64_t in, out;
    const float* input_sumsq;    // [rows] or null
    float* weight;               // [out, in]
    float* bias;                 // [out] or null
    void* y;                     // [rows, out], float32 or, with bfloat16, bfloat16; or null
    float* sumsq;                // [rows]
    const uint8_t* is_positive;  // [rows] or null
    const float* sample_weight;  // [rows], [pairs] for a pair loss, or null
    const float* threshold;      // [rows] or, with threshold_is_one, [1]; or null
    float* loss;                 // [1]
    float* peer_mean;  // [out] running means of peer normalisation, straight through; or null
    double eps, threshold_pos, threshold_neg, temperature, alpha, skip_below, peer_strength,
        peer_momentum;
    int32_t x_bfloat16, bfloat16;  // bfloat16: operands of the products are rounded to it
    int32_t norm, eps_mode, activation;
    int32_t goodness, loss_kind, maximize, reduction, threshold_is_one;
    int32_t rule, threads;
    Update weight_update, bias_update;
};

}  // namespace ffk

#pragma GCC visibility push(default)
extern "C" {
int ffk_interface();
// The instruction set in use for float32 or for bfloat16 products; `ffk_limit` chooses one by name
// for both, or the best again where it is empty, and returns 0, or 1 if this CPU lacks it.
const char* ffk_instruction_set(int bfloat16);
int ffk_limit(const char* name);
// The OpenMP runtime's entry point `GOMP_parallel`, so that torch's own threads do the work; null:
// std::thread.
void ffk_use_threads(void* gomp_parallel);
// 0, or 1 where memory ran out: then nothing has been written.
int ffk_linear_forward(const ffk::Call* call);
int ffk_linear_step(const ffk::Call* call);
}
#pragma GCC visibility pop
