// Made by `make records` from ffkernels/spec.py, which says what each member is.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ffk {

constexpr int INTERFACE = 201920201;

enum Norm : int32_t { NORM_L2, NORM_RMS, NORM_NONE };
enum EpsMode : int32_t { EPS_ADD, EPS_CLAMP, EPS_INSIDE };
enum Activation : int32_t { RELU, LEAKY_RELU, GELU, SILU, IDENTITY };
enum Precision : int32_t { PRECISION_HIGHEST, PRECISION_HIGH };
enum Goodness : int32_t { GOODNESS_MEAN, GOODNESS_SUM, GOODNESS_NORM, GOODNESS_ACTIVITY };
enum Loss : int32_t { LOGISTIC, SYMBA, SWISH, CROSS_ENTROPY, PVN, CWC };
enum Reduction : int32_t { REDUCE_MEAN, REDUCE_SUM_OF_MEANS };
enum Rule : int32_t { GRAD, SGD, ADAM };
enum Pool : int32_t { POOL_NONE, POOL_MAX, POOL_AVERAGE };
enum Dtype : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

// Row-major; rows lie `stride` numbers apart. `at` is null where there is none.
struct Matrix {
    void* at;
    int64_t rows;
    int64_t columns;
    int64_t stride;
    Dtype dtype;
};

struct Numbers {
    double lr;
    double decay;
    double decoupled;
    double maximize;
    double momentum;
    double dampening;
    double nesterov;
    double first_step;
    double beta1;
    double beta2;
    double eps;
};

struct Slot {
    float* state[3];
    Numbers numbers;
};

struct Rows {
    Matrix x_pos;
    Matrix x_neg;
    const uint8_t* is_positive;
    const float* input_sumsq;
    const float* sample_weight;
    Matrix product;
    int64_t label_field;
    const int64_t* labels;
};

struct Layer {
    Matrix weight;
    float* bias;
    Norm norm;
    double eps;
    EpsMode eps_mode;
    Activation activation;
    Dtype compute_dtype;
    Precision precision;
};

struct Goal {
    Goodness goodness;
    double threshold_pos;
    double threshold_neg;
    const float* threshold;
    Loss loss;
    int32_t maximize;
    Reduction reduction;
    double temperature;
    double alpha;
    double skip_below;
    int64_t classes;
    double label_smoothing;
};

struct PeerPull {
    float* mean;
    double strength;
    double momentum;
    int32_t gated;
};

struct Update {
    Rule rule;
    Slot weight;
    Slot bias;
};

struct Outputs {
    Matrix y;
    float* sumsq;
    float* loss_out;
    Matrix rounded;
    float* goodness_out;
    Matrix y_after;
    float* sumsq_after;
    Matrix product_out;
};

struct Slopes {
    Matrix activity;
    Matrix first;
    Matrix second;
    Matrix basis;
};

struct Call {
    Rows rows;
    Layer layer;
    Goal goal;
    PeerPull pull;
    Update update;
    Outputs outputs;
    Slopes slopes;
    int32_t threads;
};

struct MapsPass {
    int64_t rows;
    int64_t channels;
    int64_t height;
    int64_t width;
    int64_t pooled_height;
    int64_t pooled_width;
    int64_t pool_height;
    int64_t pool_width;
    int64_t pool_stride_height;
    int64_t pool_stride_width;
    int32_t has_gaps;
    Pool pool;
    Activation activation;
    Dtype dtype;
    void* z;
    void* p;
    uint8_t* where;
    const float* scale;
    const float* bias;
    float* pivot;
    int32_t finds_pivot;
    float* first;
    float* spread;
    const float* slope_first;
    const float* slope_second;
    const float* gain;
    const float* shift;
    const float* place_slope;
    const float* place_scale;
    void* dz;
    float* dz_sums;
    void* x;
    const float* weight;
    float* dw;
    int64_t in_channels;
    int64_t in_height;
    int64_t in_width;
    int64_t kernel_height;
    int64_t kernel_width;
    int64_t padding_height;
    int64_t padding_width;
    int64_t groups;
    int32_t threads;
};

// Where the members lie, for a test.
constexpr size_t LAYOUT[] = {
    sizeof(Call),
    offsetof(Call, rows.x_pos.at),
    offsetof(Call, rows.x_pos.rows),
    offsetof(Call, rows.x_pos.columns),
    offsetof(Call, rows.x_pos.stride),
    offsetof(Call, rows.x_pos.dtype),
    offsetof(Call, rows.x_neg.at),
    offsetof(Call, rows.x_neg.rows),
    offsetof(Call, rows.x_neg.columns),
    offsetof(Call, rows.x_neg.stride),
    offsetof(Call, rows.x_neg.dtype),
    offsetof(Call, rows.is_positive),
    offsetof(Call, rows.input_sumsq),
    offsetof(Call, rows.sample_weight),
    offsetof(Call, rows.product.at),
    offsetof(Call, rows.product.rows),
    offsetof(Call, rows.product.columns),
    offsetof(Call, rows.product.stride),
    offsetof(Call, rows.product.dtype),
    offsetof(Call, rows.label_field),
    offsetof(Call, rows.labels),
    offsetof(Call, layer.weight.at),
    offsetof(Call, layer.weight.rows),
    offsetof(Call, layer.weight.columns),
    offsetof(Call, layer.weight.stride),
    offsetof(Call, layer.weight.dtype),
    offsetof(Call, layer.bias),
    offsetof(Call, layer.norm),
    offsetof(Call, layer.eps),
    offsetof(Call, layer.eps_mode),
    offsetof(Call, layer.activation),
    offsetof(Call, layer.compute_dtype),
    offsetof(Call, layer.precision),
    offsetof(Call, goal.goodness),
    offsetof(Call, goal.threshold_pos),
    offsetof(Call, goal.threshold_neg),
    offsetof(Call, goal.threshold),
    offsetof(Call, goal.loss),
    offsetof(Call, goal.maximize),
    offsetof(Call, goal.reduction),
    offsetof(Call, goal.temperature),
    offsetof(Call, goal.alpha),
    offsetof(Call, goal.skip_below),
    offsetof(Call, goal.classes),
    offsetof(Call, goal.label_smoothing),
    offsetof(Call, pull.mean),
    offsetof(Call, pull.strength),
    offsetof(Call, pull.momentum),
    offsetof(Call, pull.gated),
    offsetof(Call, update.rule),
    offsetof(Call, update.weight.state),
    offsetof(Call, update.weight.numbers.lr),
    offsetof(Call, update.weight.numbers.decay),
    offsetof(Call, update.weight.numbers.decoupled),
    offsetof(Call, update.weight.numbers.maximize),
    offsetof(Call, update.weight.numbers.momentum),
    offsetof(Call, update.weight.numbers.dampening),
    offsetof(Call, update.weight.numbers.nesterov),
    offsetof(Call, update.weight.numbers.first_step),
    offsetof(Call, update.weight.numbers.beta1),
    offsetof(Call, update.weight.numbers.beta2),
    offsetof(Call, update.weight.numbers.eps),
    offsetof(Call, update.bias.state),
    offsetof(Call, update.bias.numbers.lr),
    offsetof(Call, update.bias.numbers.decay),
    offsetof(Call, update.bias.numbers.decoupled),
    offsetof(Call, update.bias.numbers.maximize),
    offsetof(Call, update.bias.numbers.momentum),
    offsetof(Call, update.bias.numbers.dampening),
    offsetof(Call, update.bias.numbers.nesterov),
    offsetof(Call, update.bias.numbers.first_step),
    offsetof(Call, update.bias.numbers.beta1),
    offsetof(Call, update.bias.numbers.beta2),
    offsetof(Call, update.bias.numbers.eps),
    offsetof(Call, outputs.y.at),
    offsetof(Call, outputs.y.rows),
    offsetof(Call, outputs.y.columns),
    offsetof(Call, outputs.y.stride),
    offsetof(Call, outputs.y.dtype),
    offsetof(Call, outputs.sumsq),
    offsetof(Call, outputs.loss_out),
    offsetof(Call, outputs.rounded.at),
    offsetof(Call, outputs.rounded.rows),
    offsetof(Call, outputs.rounded.columns),
    offsetof(Call, outputs.rounded.stride),
    offsetof(Call, outputs.rounded.dtype),
    offsetof(Call, outputs.goodness_out),
    offsetof(Call, outputs.y_after.at),
    offsetof(Call, outputs.y_after.rows),
    offsetof(Call, outputs.y_after.columns),
    offsetof(Call, outputs.y_after.stride),
    offsetof(Call, outputs.y_after.dtype),
    offsetof(Call, outputs.sumsq_after),
    offsetof(Call, outputs.product_out.at),
    offsetof(Call, outputs.product_out.rows),
    offsetof(Call, outputs.product_out.columns),
    offsetof(Call, outputs.product_out.stride),
    offsetof(Call, outputs.product_out.dtype),
    offsetof(Call, slopes.activity.at),
    offsetof(Call, slopes.activity.rows),
    offsetof(Call, slopes.activity.columns),
    offsetof(Call, slopes.activity.stride),
    offsetof(Call, slopes.activity.dtype),
    offsetof(Call, slopes.first.at),
    offsetof(Call, slopes.first.rows),
    offsetof(Call, slopes.first.columns),
    offsetof(Call, slopes.first.stride),
    offsetof(Call, slopes.first.dtype),
    offsetof(Call, slopes.second.at),
    offsetof(Call, slopes.second.rows),
    offsetof(Call, slopes.second.columns),
    offsetof(Call, slopes.second.stride),
    offsetof(Call, slopes.second.dtype),
    offsetof(Call, slopes.basis.at),
    offsetof(Call, slopes.basis.rows),
    offsetof(Call, slopes.basis.columns),
    offsetof(Call, slopes.basis.stride),
    offsetof(Call, slopes.basis.dtype),
    offsetof(Call, threads),
    sizeof(MapsPass),
    offsetof(MapsPass, rows),
    offsetof(MapsPass, channels),
    offsetof(MapsPass, height),
    offsetof(MapsPass, width),
    offsetof(MapsPass, pooled_height),
    offsetof(MapsPass, pooled_width),
    offsetof(MapsPass, pool_height),
    offsetof(MapsPass, pool_width),
    offsetof(MapsPass, pool_stride_height),
    offsetof(MapsPass, pool_stride_width),
    offsetof(MapsPass, has_gaps),
    offsetof(MapsPass, pool),
    offsetof(MapsPass, activation),
    offsetof(MapsPass, dtype),
    offsetof(MapsPass, z),
    offsetof(MapsPass, p),
    offsetof(MapsPass, where),
    offsetof(MapsPass, scale),
    offsetof(MapsPass, bias),
    offsetof(MapsPass, pivot),
    offsetof(MapsPass, finds_pivot),
    offsetof(MapsPass, first),
    offsetof(MapsPass, spread),
    offsetof(MapsPass, slope_first),
    offsetof(MapsPass, slope_second),
    offsetof(MapsPass, gain),
    offsetof(MapsPass, shift),
    offsetof(MapsPass, place_slope),
    offsetof(MapsPass, place_scale),
    offsetof(MapsPass, dz),
    offsetof(MapsPass, dz_sums),
    offsetof(MapsPass, x),
    offsetof(MapsPass, weight),
    offsetof(MapsPass, dw),
    offsetof(MapsPass, in_channels),
    offsetof(MapsPass, in_height),
    offsetof(MapsPass, in_width),
    offsetof(MapsPass, kernel_height),
    offsetof(MapsPass, kernel_width),
    offsetof(MapsPass, padding_height),
    offsetof(MapsPass, padding_width),
    offsetof(MapsPass, groups),
    offsetof(MapsPass, threads),
};

}  // namespace ffk
