// The passes around a convolution over maps whose channels lie last. Behind its product:
// activation, pool and moments; in front of its weight gradient: from the moments' slopes to dz.
#pragma once
#include "block.h"

namespace {

// `n` numbers of a vector, and zeros behind them; WHOLE: all of them.
template <bool WHOLE>
inline vec get(const float* p, int64_t n) {
    return WHOLE ? load(p) : load_some(p, n);
}
template <bool WHOLE>
inline vec get(const uint16_t* p, int64_t n) {
    return WHOLE ? from_bfloat16(p) : load_some(p, n);
}
template <bool WHOLE>
inline void put(float* p, vec v, int64_t n) {
    WHOLE ? store(p, v) : store_some(p, v, n);
}
template <bool WHOLE>
inline void put(uint16_t* p, vec v, int64_t n) {
    WHOLE ? store(p, to_bfloat16(v)) : store_some(p, to_bfloat16(v), n);
}

// A vector as it is stored: rounded once, wherever it goes.
inline vec stored(float, vec v) { return v; }
inline vec_of_halves stored(uint16_t, vec v) { return to_bfloat16(v); }
inline vec as_stored(float, vec v) { return v; }
inline vec as_stored(uint16_t, vec v) { return rounded(v); }
// Numbers where `chosen`, and zeros elsewhere.
inline vec only(vec v, vec_of_choices chosen) { return chosen ? v : vec{}; }
inline vec_of_halves only(vec_of_halves v, vec_of_choices chosen) {
    return v & (vec_of_halves) __builtin_convertvector(chosen, vec_of_short_choices);
}
template <bool WHOLE, class T, class V>
inline void put_stored(T* p, V v, int64_t n) {
    WHOLE ? store(p, v) : store_some(p, v, n);
}

// An activation that is one of two lines: the identity above zero, below it a slope of its own.
struct Gate {
    static constexpr bool IS_CURVED = false;
    float other;
    uint32_t kept;  // not even an infinity times zero is left of what a ReLU shuts off

    explicit Gate(ffk::Activation a)
        : other(a == ffk::LEAKY_RELU ? 0.01f : 1), kept(a == ffk::RELU ? 0 : ~0u) {}
    // `v` times the slope at `z`.
    vec operator()(vec v, vec z) const {
        return z <= 0 ? (vec)((vec_of_bits)(v * other) & kept) : v;
    }
    vec y(vec z) const { return (*this)(z, z); }
};

// One whose slope is told by z alone.
template <ffk::Activation KIND>
struct Curve {
    static constexpr bool IS_CURVED = true;

    explicit Curve(ffk::Activation) {}
    static Active at(vec z) { return KIND == ffk::GELU ? gelu(z) : silu(z); }
    vec operator()(vec v, vec z) const { return v * at(z).slope; }
    vec y(vec z) const { return at(z).y; }
};

// One row's maps in front of the pool, or channels of them: the first of these, and how far apart
// places and lines lie.
template <class T>
struct Places {
    T* at;
    int64_t first, stride, line;

    T* operator()(int64_t y, int64_t x, int64_t channel) const {
        return at + y * line + x * stride + (channel - first);
    }
};

struct Channels {
    int64_t begin, end;
};

// T: of what is kept; D: of the product and of its gradient. BY_TWO: windows of two by two, which
// the compiler unrolls. ACT: Gate or Curve.
template <class T, class D, ffk::Pool POOL, bool BY_TWO, class ACT>
struct Passes {
    using Kept = T;
    using Made = D;
    // A maximum of lines is the line of the maximum: pooling first leaves less to activate.
    static constexpr bool POOLS_FIRST = !ACT::IS_CURVED;
    const ffk::MapsPass& call;
    const ACT gate;
    const int64_t channels, pool_height, pool_width;

    explicit Passes(const ffk::MapsPass& c)
        : call(c),
          gate(c.activation),
          channels(c.channels),
          pool_height(POOL == ffk::POOL_NONE ? 1
                      : BY_TWO               ? 2
                                             : c.pool_height),
          pool_width(POOL == ffk::POOL_NONE ? 1
                     : BY_TWO               ? 2
                                            : c.pool_width) {}

    // All channels of a row where the whole batch's maps lie at `base`.
    template <class V>
    Places<V> whole(void* base, int64_t row) const {
        const int64_t line = call.width * channels;
        return {static_cast<V*>(base) + row * call.height * line, 0, channels, line};
    }
    // Where a window begins, and where its unit stands behind the pool.
    template <class V>
    V* window(const Places<V>& maps, int64_t line, int64_t x, int64_t channel) const {
        return maps(line * call.pool_stride_height, x * call.pool_stride_width, channel);
    }
    int64_t unit(int64_t row, int64_t line, int64_t x) const {
        return ((row * call.pooled_height + line) * call.pooled_width + x) * channels;
    }
    // f(index of a window's place, its line and column in the window)
    template <class F>
    void each_place(F f) const {
        for (int64_t i = 0; i < pool_height; i++)
            for (int64_t j = 0; j < pool_width; j++) f(uint32_t(i * pool_width + j), i, j);
    }
    template <class F>
    void each_row(F f) const {
        const int64_t all = call.rows * call.height * call.width * channels;
        parallel(call.rows, all < SMALL_WORK ? 1 : call.threads, [&](int64_t row, int) { f(row); });
    }
    // f(vector of channels as a constant that says whether it is whole, its first channel)
    template <class F>
    void each_vector(Channels range, F f) const {
        int64_t channel = range.begin;
        for (; channel + LANES <= range.end; channel += LANES) f(std::true_type{}, channel);
        if (channel < range.end) f(std::false_type{}, channel);
    }

    // Activities of some channels of a row's products `z`, and their moments; with `writes` false
    // the moments alone.
    void forward_row(int64_t row, Channels range, const Places<D>& z, const float* pivot,
                     bool writes) const {
        clear_sums(row, range);
        for (int64_t line = 0; line < call.pooled_height; line++)
            each_vector(range, [&](auto whole, int64_t channel) {
                forward_line<decltype(whole)::value>(row, line, channel, range.end - channel, z,
                                                     pivot, writes);
            });
    }

    template <bool WHOLE>
    void forward_line(int64_t row, int64_t line, int64_t channel, int64_t n, const Places<D>& z,
                      const float* pivot, bool writes) const {
        T* p = static_cast<T*>(call.p) + channel;
        uint8_t* where = POOL == ffk::POOL_MAX ? call.where + channel : nullptr;
        const bool scaled = call.scale != nullptr || call.bias != nullptr;
        const vec scale = broadcast(call.scale ? call.scale[row] : 1), none = {},
                  bias = call.bias ? get<WHOLE>(call.bias + channel, n) : none,
                  centre = pivot ? get<WHOLE>(pivot + channel, n) : none;
        const auto read = [&](const D* place) {
            const vec v = get<WHOLE>(place, n);
            return scaled ? v * scale + bias : v;
        };
        // The compiler cannot know that no store changes these.
        const int64_t width = call.pooled_width, apart = channels, z_line = z.line,
                      z_place = z.stride, z_apart = call.pool_stride_width * z.stride;
        const D* begin = window(z, line, 0, channel);
        int64_t to = unit(row, line, 0);
        vec sum = {}, squares = {};
        for (int64_t x = 0; x < width; x++, begin += z_apart, to += apart) {
            vec v = read(begin);
            if (POOL == ffk::POOL_MAX) {
                vec_of_bits winner = {};
                if (!POOLS_FIRST) v = gate.y(v);
                each_place([&](uint32_t place, int64_t i, int64_t j) {
                    if (place == 0) return;
                    vec u = read(begin + i * z_line + j * z_place);
                    if (!POOLS_FIRST) u = gate.y(u);
                    // The first of equal ones wins, and a NaN always does.
                    const auto wins = (u > v) | (u != u);
                    v = wins ? u : v, winner = wins ? vec_of_bits{} + place : winner;
                });
                if (writes) store_some(where + to, winner, n);
                if (POOLS_FIRST) v = gate.y(v);
            } else if (POOL == ffk::POOL_AVERAGE) {
                v = vec{};
                each_place([&](uint32_t, int64_t i, int64_t j) {
                    v += gate.y(read(begin + i * z_line + j * z_place));
                });
                v *= 1.f / float(pool_height * pool_width);
            } else
                v = gate.y(v);
            if (writes) put<WHOLE>(p + to, v, n);
            // Moments are of what the way back reads: sums that cancel there cancel here.
            v = as_stored(T{}, v) - centre;
            sum += v, squares += v * v;
        }
        add_sums<WHOLE>(row, channel, n, sum, squares);
    }

    void clear_sums(int64_t row, Channels range) const {
        const int64_t begin = row * channels + range.begin, bytes = (range.end - range.begin) * 4;
        std::memset(call.first + begin, 0, size_t(bytes));
        std::memset(call.spread + begin, 0, size_t(bytes));
    }
    template <bool WHOLE>
    void add_sums(int64_t row, int64_t channel, int64_t n, vec sum, vec other) const {
        float *first = call.first + row * channels + channel,
              *spread = call.spread + row * channels + channel;
        put<WHOLE>(first, get<WHOLE>(first, n) + sum, n);
        put<WHOLE>(spread, get<WHOLE>(spread, n) + other, n);
    }

    void forward() const {
        if (call.finds_pivot && call.rows > 0) {
            // Squares about what is like the rest keep the digits of a variance.
            forward_row(0, all(), whole<D>(call.z, 0), nullptr, false);
            find_pivot(all());
        }
        each_row(
            [&](int64_t row) { forward_row(row, all(), whole<D>(call.z, row), call.pivot, true); });
    }

    Channels all() const { return {0, channels}; }
    // By the first row's moments.
    void find_pivot(Channels range) const {
        const float places = float(call.pooled_height * call.pooled_width);
        for (int64_t c = range.begin; c < range.end; c++) call.pivot[c] = call.first[c] / places;
    }

    // dz of some channels of a row, their sums over places, and what the layer hands on. Places in
    // no window are left as they are.
    void backward_row(int64_t row, Channels range, const Places<D>& dz) const {
        const Places<T> z = whole<T>(call.z, row);
        std::memset(call.dz_sums + row * channels + range.begin, 0,
                    size_t(range.end - range.begin) * 4);
        for (int64_t line = 0; line < call.pooled_height; line++)
            each_vector(range, [&](auto whole, int64_t channel) {
                backward_line<decltype(whole)::value>(row, line, channel, range.end - channel, z,
                                                      dz);
            });
    }

    template <bool WHOLE>
    void backward_line(int64_t row, int64_t line, int64_t channel, int64_t n, const Places<T>& z,
                       const Places<D>& dz) const {
        T* p = static_cast<T*>(call.p) + channel;
        const uint8_t* where = POOL == ffk::POOL_MAX ? call.where + channel : nullptr;
        const bool has_second = call.slope_second != nullptr;
        const auto number = [&](const float* values, int64_t i) {
            return values ? get<WHOLE>(values + i + channel, n) : vec{};
        };
        const vec first = number(call.slope_first, row * channels),
                  second = 2 * number(call.slope_second, row * channels),
                  centre = number(call.pivot, 0), gain = number(call.gain, 0),
                  shift = number(call.shift, 0), bias = number(call.bias, 0),
                  place_scale = number(call.place_scale, 0),
                  scale = broadcast(call.scale ? call.scale[row] : 1);
        const float* place_slope = call.place_slope ? call.place_slope + channel : nullptr;
        // The compiler cannot know that no store changes these.
        const int64_t width = call.pooled_width, apart = channels, dz_line = dz.line,
                      dz_place = dz.stride, dz_apart = call.pool_stride_width * dz.stride,
                      z_line = z.line, z_place = z.stride,
                      z_apart = call.pool_stride_width * z.stride;
        const bool hands_on = call.gain != nullptr;
        D* to = window(dz, line, 0, channel);
        const T* begin = window(z, line, 0, channel);
        int64_t from = unit(row, line, 0);
        vec sum = {};
        for (int64_t x = 0; x < width; x++, to += dz_apart, begin += z_apart, from += apart) {
            const auto place_of = [&](int64_t i, int64_t j) {
                return to + i * dz_line + j * dz_place;
            };
            const auto before = [&](int64_t i, int64_t j) {
                return get<WHOLE>(begin + i * z_line + j * z_place, n) * scale + bias;
            };
            const vec a = get<WHOLE>(p + from, n), apart = a - centre;
            vec g = has_second ? first + second * apart : first;
            if (place_slope) g += place_scale * get<WHOLE>(place_slope + from, n);
            if (POOL == ffk::POOL_AVERAGE) {
                g *= 1.f / float(pool_height * pool_width);
                each_place([&](uint32_t, int64_t i, int64_t j) {
                    const vec of_place = gate(g, before(i, j));
                    sum += of_place;
                    put<WHOLE>(place_of(i, j), of_place * scale, n);
                });
            } else if (ACT::IS_CURVED) {
                const vec_of_bits winner =
                    POOL == ffk::POOL_MAX ? load_some(where + from, n) : vec_of_bits{};
                each_place([&](uint32_t place, int64_t i, int64_t j) {
                    const vec of_place = only(gate(g, before(i, j)), winner == place);
                    sum += of_place;
                    put<WHOLE>(place_of(i, j), of_place * scale, n);
                });
            } else {
                g = gate(g, a);
                sum += g, g *= scale;
                if (POOL == ffk::POOL_MAX) {
                    const vec_of_bits winner = load_some(where + from, n);
                    const auto rounded_g = stored(D{}, g);
                    each_place([&](uint32_t place, int64_t i, int64_t j) {
                        put_stored<WHOLE>(place_of(i, j), only(rounded_g, winner == place), n);
                    });
                } else
                    put<WHOLE>(to, g, n);
            }
            if (hands_on) put<WHOLE>(p + from, gain * apart + shift, n);
        }
        float* sums = call.dz_sums + row * channels + channel;
        put<WHOLE>(sums, get<WHOLE>(sums, n) + sum, n);
    }

    void backward() const {
        each_row([&](int64_t row) {
            const Places<D> dz = whole<D>(call.dz, row);
            if (call.has_gaps)
                std::memset(dz.at, 0, size_t(call.height * call.width * channels) * sizeof(D));
            backward_row(row, all(), dz);
        });
    }
};

// f(the passes that a call asks for)
template <class T, class D, class ACT, class F>
void with_passes_of(const ffk::MapsPass& call, F f) {
    const bool two = !ACT::IS_CURVED && call.pool_height == 2 && call.pool_width == 2;
    constexpr bool BY_TWO = !ACT::IS_CURVED;
    if (call.pool == ffk::POOL_NONE)
        f(Passes<T, D, ffk::POOL_NONE, false, ACT>(call));
    else if (call.pool == ffk::POOL_MAX)
        two ? f(Passes<T, D, ffk::POOL_MAX, BY_TWO, ACT>(call))
            : f(Passes<T, D, ffk::POOL_MAX, false, ACT>(call));
    else
        two ? f(Passes<T, D, ffk::POOL_AVERAGE, BY_TWO, ACT>(call))
            : f(Passes<T, D, ffk::POOL_AVERAGE, false, ACT>(call));
}

template <class T, class D, class F>
void with_passes(const ffk::MapsPass& call, F f) {
    if (call.activation == ffk::GELU)
        with_passes_of<T, D, Curve<ffk::GELU>>(call, f);
    else if (call.activation == ffk::SILU)
        with_passes_of<T, D, Curve<ffk::SILU>>(call, f);
    else
        with_passes_of<T, D, Gate>(call, f);
}

// Sums over a row's places of what `place_slope` has, and of its products with activities about the
// pivot.
template <class T>
void products_with(const ffk::MapsPass& call) {
    const Passes<T, T, ffk::POOL_NONE, false, Gate> passes(call);
    const T* p = static_cast<const T*>(call.p);
    const int64_t channels = call.channels;
    passes.each_row([&](int64_t row) {
        passes.clear_sums(row, passes.all());
        for (int64_t line = 0; line < call.pooled_height; line++)
            passes.each_vector(passes.all(), [&](auto whole, int64_t channel) {
                constexpr bool WHOLE = decltype(whole)::value;
                const int64_t n = channels - channel;
                const vec centre = get<WHOLE>(call.pivot + channel, n);
                vec sum = {}, products = {};
                for (int64_t x = 0; x < call.pooled_width; x++) {
                    const int64_t from = passes.unit(row, line, x) + channel;
                    const vec g = get<WHOLE>(call.place_slope + from, n);
                    sum += g, products += g * (get<WHOLE>(p + from, n) - centre);
                }
                passes.template add_sums<WHOLE>(row, channel, n, sum, products);
            });
    });
}

void maps_products(const ffk::MapsPass& call) {
    call.dtype == ffk::BFLOAT16 ? products_with<uint16_t>(call) : products_with<float>(call);
}

void maps_forward(const ffk::MapsPass& call) {
    const auto run = [](const auto& passes) { passes.forward(); };
    call.dtype == ffk::BFLOAT16 ? with_passes<uint16_t, uint16_t>(call, run)
                                : with_passes<float, float>(call, run);
}

void maps_backward(const ffk::MapsPass& call) {
    const auto run = [](const auto& passes) { passes.backward(); };
    call.dtype == ffk::BFLOAT16 ? with_passes<uint16_t, uint16_t>(call, run)
                                : with_passes<float, float>(call, run);
}

}  // namespace
