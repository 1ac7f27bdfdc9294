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

// Partial sums of a weight's gradient: of so many runs of images, a power of two; fewer where they
// would be more numbers than these, and less than `FEW_RUNS` where they would be four times more.
constexpr int64_t MOST_RUNS = 16, FEW_RUNS = 4, PARTIAL_NUMBERS = int64_t(1) << 22;
// What stays in the second cache of the left operand's rows.
constexpr int64_t ROWS_NUMBERS = int64_t(1) << 15;

// The shape of a convolution's products. Groups of few channels are multiplied together, as one
// `unit` that is zero outside of its blocks, until they fill a vector.
struct Convolution {
    const ffk::MapsPass& call;
    const bool pairs;
    const int64_t taps, padded_width, padded_height;
    int64_t merged, units, in, out;  // groups in a unit, units, and channels of one
    int64_t in_places;               // what a unit's channels take along the depth of a product
    int64_t line;                    // how far lines of a product lie apart, in places
    int64_t turned_line;             // and of the weight's gradient: an even number, for pairs

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
        turned_line = pairs ? up_to(c.width, 2) : c.width;
    }

    int64_t workers() const {
        return call.rows * call.height * call.width * out * units * in * taps < SMALL_WORK
                   ? 1
                   : call.threads;
    }
    Channels of_panel(int64_t unit, int64_t panel) const {
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

// A unit of one image, padded, as the product with the weight takes it: [height, width, channels].
struct Image {
    const Convolution& of;

    // What lies behind the last place is read with it.
    int64_t floats() const {
        return of.padded_height * of.padded_width * of.in_places + PAIRS_AT_ONCE
               + (TILE_ROWS + of.call.kernel_width) * of.in_places;
    }

    void pack(int64_t row, int64_t unit, float* at) const {
        if (of.call.dtype == ffk::FLOAT32)
            pack_numbers(static_cast<const float*>(of.call.x), row, unit, at);
        else if (of.pairs)
            pack_numbers(static_cast<const uint16_t*>(of.call.x), row, unit,
                         reinterpret_cast<uint16_t*>(at));
        else
            pack_numbers(static_cast<const uint16_t*>(of.call.x), row, unit, at);
    }

    template <class S, class D>
    void pack_numbers(const S* x, int64_t row, int64_t unit, D* at) const {
        // The compiler cannot know that no store changes these.
        const int64_t in = of.in, channels = of.call.in_channels, width = of.call.in_width,
                      apart = of.in_places * int64_t(sizeof(float) / sizeof(D));
        for (int64_t y = 0; y < of.call.in_height; y++) {
            const S* from = x + (row * of.call.in_height + y) * width * channels + unit * in;
            D* into =
                at
                + ((y + of.call.padding_height) * of.padded_width + of.call.padding_width) * apart;
            for (int64_t i = 0; i < width; i++) copy(from + i * channels, in, into + i * apart);
        }
    }

    // Few numbers, too few for a call of memcpy; narrow ones as they are or widened.
    template <class T>
    static void copy(const T* from, int64_t n, T* to) {
        for (; n >= LANES; n -= LANES, from += LANES, to += LANES)
            std::memcpy(to, from, LANES * sizeof(T));
        copy_few<LANES / 2>(from, to, n);
    }
    static void copy(const uint16_t* from, int64_t n, float* to) {
        for (; n > 0; n -= LANES, from += LANES, to += LANES) store_some(to, load_some(from, n), n);
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

// Products of one image's places with a panel of a unit's channels, and what becomes of them.
template <class P>
struct ConvolutionForward {
    const Convolution& of;
    const PackedWeight& weight;
    const P& passes;

    // `packed`: the unit's image; `z`: room for the products.
    void run(const float* packed, float* z, int64_t row, int64_t unit, int64_t panel,
             const float* pivot, bool writes) const {
        const int64_t width = weight.panels.vectors(panel) * LANES;
        with_pairs(of.pairs, [&](auto pairs) {
            with_vectors(weight.panels.vectors(panel), [&](auto vectors) {
                multiply<decltype(pairs)::value, decltype(vectors)::value>(
                    packed, weight.panel(unit, panel), z);
            });
        });
        const Channels range = of.of_panel(unit, panel);
        const Places<float> places{z, range.begin, width, of.line * width};
        passes.forward_row(row, range, places, pivot, writes);
        if (writes && of.call.z != nullptr) keep(row, range, places);
    }

    template <Operands KIND, int NV>
    void multiply(const float* packed, const float* panel, float* z) const {
        const int64_t places = of.call.height * of.line, step = of.padded_width * of.in_places;
        int64_t x = 0, skipped = 0;
        each_tile<NV>(places, [&](int64_t place, auto rows) {
            constexpr int ROWS = decltype(rows)::value;
            TileRows<ROWS> a(packed + (place + skipped) * of.in_places, of.in_places,
                             places - place);
            // Lines of places lie apart by their padding.
            if (!(ON_UNIT && KIND == BFLOAT16_PAIRS))
                for (int m = 0; m < ROWS; m++) {
                    a.row[m] = packed + (smaller(place + m, places - 1) + skipped) * of.in_places;
                    if (++x == of.line && place + m + 1 < places)
                        x = 0, skipped += of.padded_width - of.line;
                }
            Tile<NV, ROWS> tile;
            tile.clear();
            for (int64_t i = 0; i < of.call.kernel_height; i++)
                tile.template multiply<KIND>(a, i * step, panel + i * weight.depth * NV * LANES,
                                             weight.depth);
            tile.write(z + place * NV * LANES, NV * LANES);
        });
    }

    // The slope of an activation may be told by the product alone: as PyTorch's has it, with the
    // bias where no scale stands between them. Rounded without, it would lose what both leave.
    void keep(int64_t row, Channels range, const Places<float>& places) const {
        const auto kept = passes.template whole<typename P::Kept>(of.call.z, row);
        const float* bias = of.call.scale == nullptr ? of.call.bias : nullptr;
        for (int64_t y = 0; y < of.call.height; y++)
            for (int64_t x = 0; x < of.call.width; x++)
                passes.each_vector(range, [&](auto whole, int64_t channel) {
                    constexpr bool WHOLE = decltype(whole)::value;
                    const int64_t n = range.end - channel;
                    vec v = get<WHOLE>(places(y, x, channel), n);
                    if (bias != nullptr) v += get<WHOLE>(bias + channel, n);
                    put<WHOLE>(kept(y, x, channel), v, n);
                });
    }
};

int convolution_forward(const ffk::MapsPass& call) {
    const Convolution of(call);
    const Image image{of};
    return with_memory([&](Memory& memory, bool real) {
        const PackedWeight weight(of, memory);
        const int64_t panels = weight.panels.count(), all = of.units * panels;
        // Few images are divided by their panels too, each of which packs its image.
        const bool are_few = of.workers() > 1 && call.rows < TASKS;
        const int64_t parts = are_few ? all : 1, each = all / parts,
                      workers = smaller(of.workers(), larger(1, call.rows * parts));
        const Scratch images(workers, image.floats(), memory);
        const Scratch products(workers, (call.height * of.line + TILE_ROWS) * PANEL, memory);
        if (!real || call.rows == 0) return;
        images.clear();
        parallel(all, int(workers), [&](int64_t i, int) { weight.pack(i / panels, i % panels); });
        const auto run = [&](const auto& passes) {
            const ConvolutionForward<std::decay_t<decltype(passes)>> forward{of, weight, passes};
            const auto some = [&](int64_t row, int64_t first, int64_t end, int worker,
                                  const float* pivot, bool writes) {
                for (int64_t i = first; i < end; i++) {
                    const int64_t unit = i / panels, panel = i % panels;
                    if (i == first || panel == 0) image.pack(row, unit, images.of(worker));
                    forward.run(images.of(worker), products.of(worker), row, unit, panel, pivot,
                                writes);
                }
            };
            if (call.finds_pivot)
                parallel(all, int(workers), [&](int64_t i, int worker) {
                    some(0, i, i + 1, worker, nullptr, false);
                    passes.find_pivot(of.of_panel(i / panels, i % panels));
                });
            parallel(call.rows * parts, int(workers), [&](int64_t task, int worker) {
                const int64_t first = task % parts * each;
                some(task / parts, first, first + each, worker, call.pivot, true);
            });
        };
        call.dtype == ffk::BFLOAT16 ? with_passes<uint16_t, float>(call, run)
                                    : with_passes<float, float>(call, run);
    });
}

// A unit of one image as the weight's gradient takes it: for each column of a kernel, what that
// meets, [columns, channels, lines, places]. Above and below it is padded.
struct TurnedImage {
    const Convolution& of;
    const int64_t line, channel_floats, column_floats;
    const int64_t turned_width;

    TurnedImage(const Convolution& c, int64_t depth)
        : of(c),
          line(c.turned_line),
          channel_floats(stride_for(depth + line * c.call.kernel_height + LANES)),
          column_floats((c.in + TILE_ROWS) * channel_floats),
          turned_width(c.padded_width + 2 * LANES) {}

    // With room for a line, as it comes and turned.
    int64_t floats() const {
        return of.call.kernel_width * column_floats + of.in * (of.call.in_width + turned_width);
    }

    // What a kernel's place meets of a channel.
    const float* row(const float* at, int64_t c, int64_t tap) const {
        const int64_t kernel = of.call.kernel_width, begin = tap / kernel * line;
        return at + tap % kernel * column_floats + c * channel_floats
               + (of.pairs ? begin / 2 : begin);
    }

    void pack(int64_t image, int64_t unit, float* at) const {
        of.pairs ? pack_numbers<uint16_t>(image, unit, at) : pack_numbers<float>(image, unit, at);
    }

    template <class D>
    void pack_numbers(int64_t image, int64_t unit, float* at) const {
        const ffk::MapsPass& call = of.call;
        const int64_t width = call.in_width, ins = of.in, columns = call.kernel_width;
        // Turned lines have their padding beside them.
        float *wide = at + columns * column_floats, *turned = wide + width * ins;
        for (int64_t y = 0; y < call.in_height; y++) {
            const int64_t first =
                (image * call.in_height + y) * width * call.in_channels + unit * ins;
            const float* from = static_cast<const float*>(call.x) + first;
            int64_t stride = call.in_channels;
            if (call.dtype == ffk::BFLOAT16) {
                const uint16_t* halves = static_cast<const uint16_t*>(call.x) + first;
                for (int64_t x = 0; x < width; x++)
                    Image::copy(halves + x * stride, ins, wide + x * ins);
                from = wide, stride = ins;
            }
            for (int64_t x = 0; x < width; x += LANES) {
                const int valid = int(smaller(LANES, width - x));
                const float* rows[LANES];
                for (int i = 0; i < LANES; i++)
                    rows[i] = from + (x + smaller(i, valid - 1)) * stride;
                pack_columns(rows, valid, ins, turned + call.padding_width + x, turned_width);
            }
            const int64_t place = (y + call.padding_height) * line;
            for (int64_t column = 0; column < columns; column++)
                for (int64_t c = 0; c < ins; c++)
                    put_line(turned + c * turned_width + column,
                             reinterpret_cast<D*>(at + column * column_floats + c * channel_floats)
                                 + place,
                             y + 1 == call.in_height);
        }
    }

    // In whole vectors: the next line overwrites what comes behind this one, and zeros do behind
    // the last one.
    template <class D>
    void put_line(const float* values, D* to, bool is_last) const {
        const int64_t width = of.call.width;
        for (int64_t x = 0; x < width; x += LANES) store(to + x, number(D{}, load(values + x)));
        if (is_last) store(to + width, number(D{}, vec{}));
    }
    static vec number(float, vec v) { return v; }
    // It was a bfloat16 number before.
    static vec_of_halves number(uint16_t, vec v) { return halves_of((vec_of_bits)v); }
};

// The weight's gradient: for each run of images its partial sum, [units, panels, rows, channels],
// whose rows are channels of the input at a place of the kernel. So many images are multiplied at
// once that a sum is about half as deep as a tile goes: `dz` then stays in the first cache.
struct WeightGradient {
    const Convolution& of;
    const int64_t line, places, depth;  // of an image; its places as operands
    const int64_t taps_at_once, rows_at_once, rows;
    const Panels panels;
    const int64_t run_floats, images_at_once;

    explicit WeightGradient(const Convolution& c)
        : of(c),
          line(c.turned_line),
          places(c.call.height * line),
          depth(c.pairs ? up_to(pieces(places, 2), PAIRS_AT_ONCE) : places),
          // On the unit a tile's rows lie at one distance.
          taps_at_once(ON_UNIT && c.pairs ? 1 : c.taps),
          rows_at_once(up_to(taps_at_once * c.in, TILE_ROWS)),
          rows(c.taps / taps_at_once * rows_at_once),
          panels{c.out, rows},
          run_floats(c.units * panels.elements()),
          images_at_once(smaller(larger(1, DEPTH / 2 / depth), pieces(c.call.rows, runs()))) {}

    int64_t runs() const {
        int64_t most = MOST_RUNS;
        while (most > FEW_RUNS && most * run_floats > PARTIAL_NUMBERS) most /= 2;
        while (most > 1 && most * run_floats > 4 * PARTIAL_NUMBERS) most /= 2;
        return smaller(most, of.call.rows);
    }
    // Of a unit's `dz`: operands of all images at once, [panels, images, places, channels], and
    // what they are made from where they are to be in pairs.
    int64_t gradient_floats() const { return of_pairs() + depth * PANEL + AHEAD * PANEL; }
    int64_t of_pairs() const { return panels.padded() * depth * images_at_once; }
    int64_t operand(int64_t p) const { return p * PANEL * depth * images_at_once; }
    int64_t row_of(int64_t c, int64_t tap) const {
        return tap / taps_at_once * rows_at_once + tap % taps_at_once * of.in + c;
    }

    // `dz` of an image, the `index`-th at once, for panels `first` to `end` of a unit: as many
    // places and channels as operands have, zero where there is none.
    template <class P>
    void differentiate(const P& passes, float* dz, int64_t row, int64_t index, int64_t unit,
                       int64_t first, int64_t end) const {
        using D = typename P::Made;
        for (int64_t p = first; p < end; p++) {
            const int64_t width = panels.vectors(p) * LANES;
            const Channels range = of.of_panel(unit, p);
            float* into = dz + operand(p) + index * depth * width;
            // What no window writes, and what lies behind the last place.
            const bool has_gaps = of.call.has_gaps || line != of.call.width;
            const int64_t all = (sizeof(D) == 2 ? 2 : 1) * depth * width,
                          kept = has_gaps ? 0 : places * width;
            D* numbers = reinterpret_cast<D*>(sizeof(D) == 2 ? dz + of_pairs() : into);
            std::memset(numbers + kept, 0, size_t(all - kept) * sizeof(D));
            passes.backward_row(row, range, Places<D>{numbers, range.begin, width, line * width});
            if constexpr (sizeof(D) == 2) {
                for (int64_t k = 0; k < depth; k++)
                    for (int64_t v = 0; v < width; v += LANES) {
                        const D* at = numbers + 2 * k * width + v;
                        const vec_of_bits low = (vec_of_bits)from_bfloat16(at),
                                          high = (vec_of_bits)from_bfloat16(at + width);
                        store(into + k * width + v, (vec)(low >> 16 | high));
                    }
            } else if (of.call.dtype == ffk::BFLOAT16)
                round_all(into, depth * width, into);
        }
    }

    // `sums` of a unit += the products of `count` images, `packed`, with their `dz` for these
    // panels.
    void take(const TurnedImage& image, const float* packed, const float* dz, int64_t count,
              int64_t first, int64_t end, bool is_first, float* sums) const {
        // Some rows of all images stay in the second cache for all panels.
        const int64_t some = up_to(larger(1, ROWS_NUMBERS / (depth * images_at_once)), TILE_ROWS);
        for (int64_t begin = 0; begin < rows; begin += some)
            for (int64_t p = first; p < end; p++)
                with_pairs(of.pairs, [&](auto pairs) {
                    with_vectors(panels.vectors(p), [&](auto nv) {
                        multiply<decltype(pairs)::value, decltype(nv)::value>(
                            image, packed, dz + operand(p), count, begin,
                            smaller(begin + some, rows), is_first, sums + panels.offset(p));
                    });
                });
    }

    template <Operands KIND, int NV>
    void multiply(const TurnedImage& image, const float* packed, const float* dz, int64_t count,
                  int64_t begin, int64_t end, bool is_first, float* sums) const {
        const int64_t last = taps_at_once * of.in - 1, image_floats = image.floats();
        each_tile<NV>(end - begin, [&](int64_t some, auto rows) {
            constexpr int ROWS = decltype(rows)::value;
            const int64_t r = begin + some;
            const int64_t tap = r / rows_at_once * taps_at_once;
            const auto row = [&](int64_t m) {
                const int64_t i = smaller(r % rows_at_once + m, last);
                return image.row(packed, i % of.in, tap + i / of.in);
            };
            TileRows<ROWS> a(row(0), image.channel_floats, ROWS);
            if (!(ON_UNIT && KIND == BFLOAT16_PAIRS))
                for (int m = 0; m < ROWS; m++) a.row[m] = row(m);
            float* c = sums + r * NV * LANES;
            Tile<NV, ROWS> tile;
            tile.clear();
            if (!is_first) tile.expect(c, NV * LANES);
            for (int64_t i = 0; i < count; i++)
                tile.template multiply<KIND>(a, i * image_floats, dz + i * depth * NV * LANES,
                                             depth);
            if (!is_first) tile.add(c, NV * LANES);
            tile.write(c, NV * LANES);
        });
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
    if (call.rows == 0) {
        std::memset(call.dw, 0, size_t(call.channels * of.in / of.merged * of.taps) * 4);
        return 0;
    }
    const WeightGradient gradient(of);
    const TurnedImage image(of, gradient.depth);
    return with_memory([&](Memory& memory, bool real) {
        // Few runs are divided by their panels too, each of which is summed as before.
        const int64_t runs = gradient.runs(), all = of.units * gradient.panels.count(),
                      parts = smaller(all, pieces(of.workers(), runs)),
                      workers = smaller(of.workers(), runs * parts);
        float* partial = memory.take(runs * gradient.run_floats);
        const int64_t at_once = gradient.images_at_once;
        const Scratch images(workers, at_once * image.floats(), memory);
        const Scratch gradients(workers, gradient.gradient_floats(), memory);
        if (!real) return;
        images.clear(), gradients.clear();
        const auto run = [&](const auto& passes) {
            parallel(runs * parts, int(workers), [&](int64_t task, int worker) {
                const int64_t run = task / parts, part = task % parts, panels = all / of.units,
                              begin = all * part / parts, behind = all * (part + 1) / parts;
                float *packed = images.of(worker), *dz = gradients.of(worker);
                const int64_t first = call.rows * run / runs, end = call.rows * (run + 1) / runs;
                for (int64_t row = first; row < end; row += at_once) {
                    const int64_t count = smaller(at_once, end - row);
                    // A unit's operands stay in the caches.
                    for (int64_t unit = begin / panels; unit * panels < behind; unit++) {
                        const int64_t panel = larger(begin - unit * panels, 0),
                                      last = smaller(behind - unit * panels, panels);
                        for (int64_t index = 0; index < count; index++) {
                            image.pack(row + index, unit, packed + index * image.floats());
                            gradient.differentiate(passes, dz, row + index, index, unit, panel,
                                                   last);
                        }
                        gradient.take(image, packed, dz, count, panel, last, row == first,
                                      partial + run * gradient.run_floats
                                          + unit * gradient.panels.elements());
                    }
                }
            });
        };
        using Narrow = std::conditional_t<MULTIPLIES_PAIRS, uint16_t, float>;
        call.dtype == ffk::BFLOAT16 ? with_passes<uint16_t, Narrow>(call, run)
                                    : with_passes<float, float>(call, run);
        parallel(all, int(of.workers()), [&](int64_t i, int) {
            const int64_t panels = gradient.panels.count();
            gradient.finish(partial, i / panels, i % panels);
        });
    });
}

}  // namespace
