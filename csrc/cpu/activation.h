// Activations and their slopes, a vector at a time, as the update needs them.
#pragma once
#include "rows.h"

namespace {

// e^(x + rest) for x <= 0, where `rest` is what x has lost in rounding; zero below the smallest
// normal number.
inline vec exponential(vec x, vec rest = vec{}) {
    // What is added to 1.5 2^23 keeps no fraction: x = n ln 2 + r, n in the lowest bits.
    constexpr float NO_FRACTION = 12582912;
    const vec shifted = x * 1.44269504f + NO_FRACTION, n = shifted - NO_FRACTION;
    // ln 2 in two parts, the first of so few digits that its product with n is exact.
    const vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f + rest;
    // e^r = 1 + r + r^2 p(r), p to 3.3e-9 of e^r for |r| up to half of ln 2.
    const vec p =
        (((r * 1.38131448e-3f + 8.36941879e-3f) * r + 4.1668456e-2f) * r + 0.166665152f) * r
        + 0.49999994f;
    const vec power = (vec)(((vec_of_bits)shifted << 23) + 0x3f800000u);
    const vec result = (r * r * p + r + 1) * power;
    return x < -87.33f ? vec{} : result;
}

// y = act(z), and act'(z).
struct Active {
    vec y, slope;
};

// y = z P(z), P the normal distribution. For t = |z|, P(-t) = e^(-t^2 / 2) w p(w) with
// w = 1 / (1 + t / 2), p to 1.8e-8 of P; y' = P(z) + z e^(-t^2 / 2) / sqrt(2 pi).
inline Active gelu(vec z) {
    const vec size = (vec)((vec_of_bits)z & 0x7fffffffu), t = size > 14 ? broadcast(14) : size;
    // Half of the digits have an exact square: t^2 is theirs, and a rest.
    const vec high = (vec)((vec_of_bits)t & 0xfffff000u);
    const vec e = exponential(high * high * -0.5f, (t - high) * (t + high) * -0.5f);
    const vec w = 1 / (t * 0.5f + 1), v = w - 0.5625f;
    vec p = v * 0.0662988126f - 0.0294878725f;
    p = p * v - 0.0669592991f;
    p = p * v + 0.0768704712f;
    p = p * v - 0.00592781929f;
    p = p * v - 0.0746591538f;
    p = p * v + 0.0813968554f;
    p = p * v + 0.0259109903f;
    p = p * v - 0.14393574f;
    p = p * v + 0.0302150827f;
    p = p * v + 0.336886764f;
    p = p * v + 0.357105941f;
    const vec below = e * (w * p), share = z < 0 ? below : 1 - below;
    return {z * share, share + z * e * 0.398942280f};
}

// y = z s(z), s = 1 / (1 + e^-z); y' = s + z s (1 - s).
inline Active silu(vec z) {
    const vec e = exponential((vec)((vec_of_bits)z | 0x80000000u)), inverse = 1 / (1 + e),
              share = z < 0 ? e * inverse : inverse;
    return {z * share, share + z * (e * inverse) * inverse};
}

// Whether a slope is told by z alone; of the other activations y tells it.
inline bool is_curved(const ffk::Call& call) {
    return call.layer.activation == ffk::GELU || call.layer.activation == ffk::SILU;
}

// act'(z) where z is not positive, of an activation of two lines; elsewhere it is one.
inline float slope_below_zero(const ffk::Call& call) {
    if (call.layer.activation == ffk::LEAKY_RELU) return 0.01f;
    return call.layer.activation == ffk::RELU ? 0 : 1;
}

// Calls `f` with a function that makes `Active` of what the forward pass has kept.
template <class F>
inline void with_activation(const ffk::Call& call, F f) {
    if (call.layer.activation == ffk::GELU) return f(gelu);
    if (call.layer.activation == ffk::SILU) return f(silu);
    const vec above = broadcast(1), below = broadcast(slope_below_zero(call));
    f([above, below](vec y) { return Active{y, y > 0 ? above : below}; });
}

}  // namespace
