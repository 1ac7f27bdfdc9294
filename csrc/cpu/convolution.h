// A convolution of stride one and the passes around it, image by image: activation, pool and
// moments take a product while it is warm, and no gradient in front of the pool ever lies in memory
// as a whole. Maps are padded and divided by groups on the way into an operand; nothing is copied
// once for each place of a kernel.
#pragma once
#include "maps.h"

namespace {

#if defined(FFK_ON_MATRIX_UNIT)
constexpr bool ON_UNIT = true;
#else
constexpr bool ON_UNIT = false;
#endif

// Partial sums of a weight's gradient: of so many runs of images at most, and of so many numbers.
constexpr int64_t MOST_RUNS = 16, PARTIAL_NUMBERS = int64_t(1) << 22;

// The shape of a convolution's products. Groups of few channels are multiplied together, as one
// `unit` that is zero outside of its blocks, until they fill a vector.
struct Convolution {
    const ffk::MapsPass& call;
    const bool pairs;
    const int64_t taps, padded_width, padded_height;
    int64_t merged, units, in, out;  // groups in a unit, units, and channels of one
    int64_t in_places;               // what a unit's channels take along the depth of a product
    int64_t line;                    // how far lines of a product lie apart, in places

    explicit Convolution(const ffk::MapsPass& c)
        : call(c),
          pairs(MULTIPLIES_PAIRS && c.dtype == ffk::BFLOAT16),
          taps(c.kernel_height * c.kernel_width),
          padded_width(c.in_width + 2 * c.padding_width),
          padded_height(c.in_height + 2 * c.padding_height) {
        const int64_t outs = c.channels / c.groups;
        merged = 1;
        for (int64_t m = 2; m * outs <= LANES && m <= c.groups; m++)
            if (c.groups % m == 0) merged = m;
        units = c.groups / merged;
        in = c.in_channels / units, out = c.channels / units;
        in_places = pairs ? pieces(in, 2) : in;
        // The matrix unit takes places at one distance, those of the padding among them.
        line = ON_UNIT && pairs ? padded_width : c.width;
    }

    int64_t workers() const {
        return call.rows * call.height * call.width * out * units * in * taps < SMALL_WORK
                   ? 1
                   : call.threads;
    }
    Channels of_panel(int64_t unit, const Panels& panels, int64_t panel) const {
        const int64_t begin = unit * out + panel * PANEL;
        return {begin, smaller(begin + PANEL, (unit + 1) * out)};
    }
};

// Memory for each worker, whose zeros stay where nothing is written.
struct Scratch {
    const int64_t workers, floats;
    float* base;

    Scratch(int64_t count, int64_t floats_of_one, Memory& memory)
        : workers(count), floats(up_to(floats_of_one, 16)), base(memory.take(count * floats)) {}

    float* of(int worker) const { return base + worker * floats; }
    void clear() const {
        parallel(workers, int(workers),
                 [&](int64_t i, int) { std::memset(of(int(i)), 0, size_t(floats) * 4); });
    }
};

// One image, padded, as the product with the weight takes it: [units, height, width, channels].
struct Image {
    const Convolution& of;
    const int64_t unit_floats;

    explicit Image(const Convolution& c)
        : of(c), unit_floats(up_to(c.padded_height * c.padded_width * c.in_places, 16)) {}

    // What lies behind the last place is read with it.
    int64_t floats() const {
        return of.units * unit_floats + PAIRS_AT_ONCE
               + (TILE_ROWS + of.call.kernel_width) * of.in_places;
    }

    void pack(int64_t row, float* at) const {
        const ffk::MapsPass& call = of.call;
        const int64_t line = call.in_width * call.in_channels;
        for (int64_t y = 0; y < call.in_height; y++) {
            const int64_t from = (row * call.in_height + y) * line,
                          to = ((y + call.padding_height) * of.padded_width + call.padding_width)
                               * of.in_places;
            for (int64_t x = 0; x < call.in_width; x++)
                for (int64_t u = 0; u < of.units; u++) {
                    const int64_t place = from + x * call.in_channels + u * of.in;
                    float* into = at + u * unit_floats + to + x * of.in_places;
                    if (call.dtype == ffk::FLOAT32)
                        copy(static_cast<const float*>(call.x) + place, of.in, into);
                    else if (of.pairs)
                        copy(static_cast<const uint16_t*>(call.x) + place, of.in,
                             reinterpret_cast<uint16_t*>(into));
                    else
                        copy(static_cast<const uint16_t*>(call.x) + place, of.in, into);
                }
        }
    }

    // Few numbers, too few for a call of memcpy; narrow ones as they are or widened.
    static void copy(const float* from, int64_t n, float* to) {
        for (; n > 0; n -= LANES, from += LANES, to += LANES) store_some(to, load_some(from, n), n);
    }
    static void copy(const uint16_t* from, int64_t n, float* to) {
        for (; n > 0; n -= LANES, from += LANES, to += LANES) store_some(to, load_some(from, n), n);
    }
    static void copy(const uint16_t* from, int64_t n, uint16_t* to) {
        for (; n > 0; n -= LANES, from += LANES, to += LANES)
            store_some(to, halves_of((vec_of_bits)load_some(from, n)), n);
    }
};

// The weight, packed once: for each unit panels of channels, [lines of a kernel, places, channels].
struct PackedWeight {
    const Convolution& of;
    const int64_t depth;  // of a line of a kernel
    const Panels panels;
    float* at;

    PackedWeight(const Convolution& c, Memory& memory)
        : of(c),
          depth(c.pairs ? up_to(c.call.kernel_width * c.in_places, PAIRS_AT_ONCE)
                        : c.call.kernel_width * c.in_places),
          panels{c.out, depth * c.call.kernel_height},
          at(memory.take(c.units * panels.elements() + AHEAD * PANEL)) {}

    const float* panel(int64_t unit, int64_t p) const {
        return at + unit * panels.elements() + panels.offset(p);
    }

    void pack(int64_t unit, int64_t p) const {
        const int64_t width = panels.vectors(p) * LANES, kernel = of.call.kernel_width;
        float* into = const_cast<float*>(panel(unit, p));
        std::memset(into, 0, size_t(panels.depth * width) * 4);
        const int64_t outs = smaller(width, of.out - p * PANEL), first = p * PANEL;
        // Between groups of a unit there are zeros.
        const int64_t of_group = of.out / of.merged, ins = of.in / of.merged;
        for (int64_t o = 0; o < outs; o++) {
            const float* w = of.call.weight + (unit * of.out + first + o) * ins * of.taps;
            const int64_t begin = (first + o) / of_group * ins;
            for (int64_t c = begin; c < begin + ins; c++)
                for (int64_t tap = 0; tap < of.taps; tap++, w++) {
                    float* line =
                        into + (tap / kernel * depth + tap % kernel * of.in_places) * width + o;
                    if (of.pairs) {
                        const uint16_t half = to_bfloat16(*w);
                        std::memcpy(reinterpret_cast<uint16_t*>(line + c / 2 * width) + c % 2,
                                    &half, 2);
                    } else
                        line[c * width] = of.call.dtype == ffk::BFLOAT16 ? rounded(*w) : *w;
                }
        }
    }
};

// Products of one image's places with a panel of channels, and what becomes of them.
template <class P>
struct ConvolutionForward {
    const Convolution& of;
    const Image& image;
    const PackedWeight& weight;
    const P& passes;

    // `packed`: the image; `z`: room for the products.
    void run(const float* packed, float* z, int64_t row, int64_t unit, int64_t panel,
             const float* pivot, bool writes) const {
        const int64_t width = weight.panels.vectors(panel) * LANES;
        with_pairs(of.pairs, [&](auto pairs) {
            with_vectors(weight.panels.vectors(panel), [&](auto vectors) {
                multiply<decltype(pairs)::value, decltype(vectors)::value>(
                    packed + unit * image.unit_floats, weight.panel(unit, panel), z);
            });
        });
        const Channels range = of.of_panel(unit, weight.panels, panel);
        const Places<float> places{z, range.begin, width, of.line * width};
        passes.forward_row(row, range, places, pivot, writes);
        if (writes && of.call.z != nullptr) keep(row, range, places);
    }

    template <Operands KIND, int NV>
    void multiply(const float* packed, const float* panel, float* z) const {
        const int64_t places = of.call.height * of.line, step = of.padded_width * of.in_places;
        int64_t x = 0, skipped = 0;
        for (int64_t place = 0; place < places; place += TILE_ROWS) {
            TileRows a(packed + (place + skipped) * of.in_places, of.in_places, places - place);
            // Lines of places lie apart by their padding.
            if (!(ON_UNIT && KIND == BFLOAT16_PAIRS))
                for (int m = 0; m < TILE_ROWS; m++) {
                    a.row[m] = packed + (smaller(place + m, places - 1) + skipped) * of.in_places;
                    if (++x == of.line && place + m + 1 < places)
                        x = 0, skipped += of.padded_width - of.line;
                }
            Tile<NV> tile;
            tile.clear();
            for (int64_t i = 0; i < of.call.kernel_height; i++)
                tile.template multiply<KIND>(a, i * step, panel + i * weight.depth * NV * LANES,
                                             weight.depth);
            tile.write(z + place * NV * LANES, NV * LANES);
        }
    }

    // The slope of an activation may be told by the product alone.
    void keep(int64_t row, Channels range, const Places<float>& places) const {
        const auto kept = passes.template whole<typename P::Kept>(of.call.z, row);
        for (int64_t y = 0; y < of.call.height; y++)
            for (int64_t x = 0; x < of.call.width; x++)
                passes.each_vector(range, [&](auto whole, int64_t channel) {
                    constexpr bool WHOLE = decltype(whole)::value;
                    const int64_t n = range.end - channel;
                    put<WHOLE>(kept(y, x, channel), get<WHOLE>(places(y, x, channel), n), n);
                });
    }
};

int convolution_forward(const ffk::MapsPass& call) {
    const Convolution of(call);
    const Image image(of);
    return with_memory([&](Memory& memory, bool real) {
        const PackedWeight weight(of, memory);
        const int64_t workers = of.workers(), panels = weight.panels.count(),
                      all = of.units * panels;
        const Scratch images(workers, image.floats(), memory);
        const Scratch products(workers, (call.height * of.line + TILE_ROWS) * PANEL, memory);
        if (!real || call.rows == 0) return;
        images.clear();
        parallel(all, int(workers), [&](int64_t i, int) { weight.pack(i / panels, i % panels); });
        const auto run = [&](const auto& passes) {
            const ConvolutionForward<std::decay_t<decltype(passes)>> forward{of, image, weight,
                                                                             passes};
            const auto some = [&](int64_t row, int64_t first, int64_t end, int worker,
                                  const float* pivot, bool writes) {
                image.pack(row, images.of(worker));
                for (int64_t i = first; i < end; i++)
                    forward.run(images.of(worker), products.of(worker), row, i / panels, i % panels,
                                pivot, writes);
            };
            if (call.finds_pivot)
                parallel(all, int(workers), [&](int64_t i, int worker) {
                    some(0, i, i + 1, worker, nullptr, false);
                    passes.find_pivot(of.of_panel(i / panels, weight.panels, i % panels));
                });
            // Few images are divided by their panels too.
            const int64_t parts = call.rows < TASKS ? all : 1, each = all / parts;
            parallel(call.rows * parts, int(workers), [&](int64_t task, int worker) {
                const int64_t first = task % parts * each;
                some(task / parts, first, first + each, worker, call.pivot, true);
            });
        };
        call.dtype == ffk::BFLOAT16 ? with_passes<uint16_t, float>(call, run)
                                    : with_passes<float, float>(call, run);
    });
}

// One image as the weight's gradient takes it: for each column of a kernel, what that meets,
// [columns, units, channels, lines, places]. Above and below it is padded.
struct TurnedImage {
    const Convolution& of;
    const int64_t line;  // an even number, for pairs
    const int64_t channel_floats, unit_floats, column_floats;
    const int64_t turned_width;

    TurnedImage(const Convolution& c, int64_t depth)
        : of(c),
          line(line_of(c)),
          channel_floats(stride_for(depth + line * c.call.kernel_height)),
          unit_floats((c.in + TILE_ROWS) * channel_floats),
          column_floats(c.units * unit_floats),
          turned_width(c.padded_width + 2 * LANES) {}

    static int64_t line_of(const Convolution& c) {
        return c.pairs ? up_to(c.call.width, 2) : c.call.width;
    }
    // With room for a line, as it comes and turned.
    int64_t floats() const {
        return of.call.kernel_width * column_floats + of.in * (of.call.in_width + turned_width);
    }

    // What a kernel's place meets of a channel.
    const float* row(const float* at, int64_t unit, int64_t c, int64_t tap) const {
        const int64_t kernel = of.call.kernel_width, begin = tap / kernel * line;
        return at + tap % kernel * column_floats + unit * unit_floats + c * channel_floats
               + (of.pairs ? begin / 2 : begin);
    }

    void pack(int64_t image, float* at) const {
        const ffk::MapsPass& call = of.call;
        const int64_t width = call.in_width;
        // Turned lines have their padding beside them.
        float *wide = at + call.kernel_width * column_floats, *turned = wide + width * of.in;
        for (int64_t y = 0; y < call.in_height; y++)
            for (int64_t u = 0; u < of.units; u++) {
                const int64_t first =
                    (image * call.in_height + y) * width * call.in_channels + u * of.in;
                const float* from = static_cast<const float*>(call.x) + first;
                int64_t stride = call.in_channels;
                if (call.dtype == ffk::BFLOAT16) {
                    const uint16_t* halves = static_cast<const uint16_t*>(call.x) + first;
                    for (int64_t x = 0; x < width; x++)
                        Image::copy(halves + x * stride, of.in, wide + x * of.in);
                    from = wide, stride = of.in;
                }
                for (int64_t x = 0; x < width; x += LANES) {
                    const int valid = int(smaller(LANES, width - x));
                    const float* rows[LANES];
                    for (int i = 0; i < LANES; i++)
                        rows[i] = from + (x + smaller(i, valid - 1)) * stride;
                    pack_columns(rows, valid, of.in, turned + call.padding_width + x, turned_width);
                }
                for (int64_t column = 0; column < call.kernel_width; column++)
                    for (int64_t c = 0; c < of.in; c++)
                        put_line(turned + c * turned_width + column,
                                 at + column * column_floats + u * unit_floats + c * channel_floats,
                                 (y + call.padding_height) * line);
            }
    }

    void put_line(const float* values, float* channel, int64_t place) const {
        const int64_t n = of.call.width;
        for (int64_t x = 0; x < n; x += LANES) {
            const vec v = load(values + x);
            if (!of.pairs)
                store_some(channel + place + x, v, n - x);
            else  // They were bfloat16 numbers before.
                store_some(reinterpret_cast<uint16_t*>(channel) + place + x,
                           halves_of((vec_of_bits)v), n - x);
        }
    }
};

// The weight's gradient: for each run of images its partial sum, [units, panels, rows, channels],
// whose rows are channels of the input at a place of the kernel.
struct WeightGradient {
    const Convolution& of;
    const int64_t line, places, depth;  // of an image; its places as operands
    const int64_t taps_at_once, rows_at_once, rows;
    const Panels panels;
    const int64_t run_floats;

    explicit WeightGradient(const Convolution& c)
        : of(c),
          line(TurnedImage::line_of(c)),
          places(c.call.height * line),
          depth(c.pairs ? up_to(pieces(places, 2), PAIRS_AT_ONCE) : places),
          // On the unit a tile's rows lie at one distance.
          taps_at_once(ON_UNIT && c.pairs ? 1 : c.taps),
          rows_at_once(up_to(taps_at_once * c.in, TILE_ROWS)),
          rows(c.taps / taps_at_once * rows_at_once),
          panels{c.out, rows},
          run_floats(c.units * panels.elements()) {}

    int64_t runs() const {
        const int64_t most = larger(1, smaller(MOST_RUNS, PARTIAL_NUMBERS / run_floats));
        return smaller(most, of.call.rows);
    }
    // Of `dz`, and where it is to be in pairs, of these behind it.
    int64_t gradient_floats() const { return ((of.pairs ? 2 : 1) * depth + AHEAD) * PANEL; }
    int64_t row_of(int64_t c, int64_t tap) const {
        return tap / taps_at_once * rows_at_once + tap % taps_at_once * of.in + c;
    }

    // `dz` of an image: as many places and channels as the operands have, zero where there is none.
    template <class P>
    void take(const P& passes, const TurnedImage& image, const float* packed, float* dz,
              int64_t row, bool is_first, float* partial) const {
        using D = typename P::Made;
        for (int64_t unit = 0; unit < of.units; unit++)
            for (int64_t p = 0; p < panels.count(); p++) {
                const int64_t vectors = panels.vectors(p), width = vectors * LANES;
                const Channels range = of.of_panel(unit, panels, p);
                // What no window writes, and what lies behind the last place.
                const bool has_gaps = of.call.has_gaps || line != of.call.width;
                const int64_t all = (of.pairs ? 2 : 1) * depth * width,
                              kept = has_gaps ? 0 : places * width;
                D* numbers = reinterpret_cast<D*>(dz);
                std::memset(numbers + kept, 0, size_t(all - kept) * sizeof(D));
                passes.backward_row(row, range,
                                    Places<D>{numbers, range.begin, width, line * width});
                float* operand = dz;
                if constexpr (sizeof(D) == 2) {
                    operand = dz + depth * width;
                    for (int64_t i = 0; i < depth; i++)
                        for (int64_t v = 0; v < width; v += LANES) {
                            const D* first = numbers + 2 * i * width + v;
                            const vec_of_bits low = (vec_of_bits)from_bfloat16(first),
                                              high = (vec_of_bits)from_bfloat16(first + width);
                            store(operand + i * width + v, (vec)(low >> 16 | high));
                        }
                } else if (of.call.dtype == ffk::BFLOAT16)
                    round_all(dz, depth * width, dz);
                float* sums = partial + unit * panels.elements() + panels.offset(p);
                with_pairs(of.pairs, [&](auto pairs) {
                    with_vectors(int(vectors), [&](auto nv) {
                        multiply<decltype(pairs)::value, decltype(nv)::value>(
                            image, packed, unit, operand, is_first, sums);
                    });
                });
            }
    }

    template <Operands KIND, int NV>
    void multiply(const TurnedImage& image, const float* packed, int64_t unit, const float* dz,
                  bool is_first, float* sums) const {
        for (int64_t tap = 0; tap < of.taps; tap += taps_at_once)
            for (int64_t r = 0; r < rows_at_once; r += TILE_ROWS) {
                const int64_t last = taps_at_once * of.in - 1;
                const auto row = [&](int64_t i) {
                    return image.row(packed, unit, smaller(i, last) % of.in,
                                     tap + smaller(i, last) / of.in);
                };
                TileRows a(row(r), image.channel_floats, TILE_ROWS);
                if (!(ON_UNIT && KIND == BFLOAT16_PAIRS))
                    for (int m = 0; m < TILE_ROWS; m++) a.row[m] = row(r + m);
                float* c = sums + (tap / taps_at_once * rows_at_once + r) * NV * LANES;
                Tile<NV> tile;
                tile.clear();
                if (!is_first) Tile<NV>::expect(c, NV * LANES);
                tile.template multiply<KIND>(a, 0, dz, depth);
                if (!is_first) tile.add(c, NV * LANES);
                tile.write(c, NV * LANES);
            }
    }

    // The sum over the runs, always in their order, to the parameter's layout.
    void finish(float* partial, int64_t unit, int64_t p) const {
        const int64_t width = panels.vectors(p) * LANES,
                      first = unit * panels.elements() + panels.offset(p),
                      outs = of.out / of.merged, ins = of.in / of.merged,
                      valid = smaller(width, of.out - p * PANEL);
        for (int64_t run = 1; run < runs(); run++)
            for (int64_t i = 0; i < rows * width; i += LANES) {
                float* into = partial + first + i;
                store(into, load(into) + load(into + run * run_floats));
            }
        for (int64_t lane = 0; lane < valid; lane++) {
            const int64_t o = p * PANEL + lane, group = o / outs;
            float* to = of.call.dw + (unit * of.out + o) * ins * of.taps;
            for (int64_t c = 0; c < ins; c++)
                for (int64_t tap = 0; tap < of.taps; tap++)
                    to[c * of.taps + tap] =
                        partial[first + row_of(group * ins + c, tap) * width + lane];
        }
    }
};

int convolution_gradient(const ffk::MapsPass& call) {
    const Convolution of(call);
    const WeightGradient gradient(of);
    const TurnedImage image(of, gradient.depth);
    return with_memory([&](Memory& memory, bool real) {
        const int64_t workers = of.workers(), runs = gradient.runs();
        float* partial = memory.take(runs * gradient.run_floats);
        const Scratch images(workers, image.floats(), memory);
        const Scratch gradients(workers, gradient.gradient_floats(), memory);
        if (!real) return;
        images.clear(), gradients.clear();
        const auto run = [&](const auto& passes) {
            parallel(runs, int(workers), [&](int64_t i, int worker) {
                float* packed = images.of(worker);
                const int64_t first = call.rows * i / runs, end = call.rows * (i + 1) / runs;
                for (int64_t row = first; row < end; row++) {
                    image.pack(row, packed);
                    gradient.take(passes, image, packed, gradients.of(worker), row, row == first,
                                  partial + i * gradient.run_floats);
                }
            });
        };
        using Narrow = std::conditional_t<MULTIPLIES_PAIRS, uint16_t, float>;
        call.dtype == ffk::BFLOAT16 ? with_passes<uint16_t, Narrow>(call, run)
                                    : with_passes<float, float>(call, run);
        const int64_t panels = gradient.panels.count();
        parallel(of.units * panels, int(workers),
                 [&](int64_t i, int) { gradient.finish(partial, i / panels, i % panels); });
    });
}

}  // namespace
