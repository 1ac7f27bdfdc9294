// A tile's product, in floats and in pairs, at every size of a tile, and the algebra of panels.
#include "../cpu/tile.h"
#include "check.h"

namespace {

// Numbers [rows, places, EACH] as [rows, places] places.
template <Operands KIND>
std::vector<float> packed(const std::vector<float>& numbers) {
    if (KIND == FLOATS) return numbers;
    std::vector<float> places(numbers.size() / 2);
    for (size_t i = 0; i < places.size(); i++)
        places[i] = pair_of_rounded(numbers[2 * i], numbers[2 * i + 1]);
    return places;
}

// start + A[:, first:] B + column row^T, the product in two runs as where the depth is cut.
template <int NV, int ROWS, Operands KIND>
void product(int valid, int64_t first, int64_t depth) {
    constexpr int64_t WIDTH = NV * LANES, EACH = KIND == FLOATS ? 1 : 2, GAP = 3;
    // AMX's unit reads whatever lies behind the last row; everywhere else that is out of bounds.
    const int64_t a_stride = first + depth, a_rows = KIND != FLOATS ? ROWS : valid,
                  c_stride = WIDTH + GAP, cut = depth / 2 / PAIRS_AT_ONCE * PAIRS_AT_ONCE;
    const auto draw = [](int64_t n) {
        return KIND != FLOATS ? check::coarse(n) : check::numbers(n);
    };
    const std::vector<float> a = draw(a_rows * a_stride * EACH), b = draw(depth * WIDTH * EACH);
    const std::vector<float> start = check::numbers(ROWS * c_stride), column = check::numbers(ROWS),
                             row = check::numbers(WIDTH);
    const std::vector<float> a_places = packed<KIND>(a), b_places = packed<KIND>(b);
    std::vector<float> c(size_t(ROWS * c_stride), NAN);

    Tile<NV, ROWS> tile;
    for (auto& vectors : tile.at)
        for (vec& v : vectors) v = broadcast(NAN);
    const TileRows<ROWS> rows(a_places.data(), a_stride, valid);
    Coming coming;
    for (int i = 0; i < 5; i++) coming.add(c.data());
    tile.expect(c.data(), c_stride);
    tile.clear();
    if (cut) tile.template multiply<KIND>(rows, first, b_places.data(), cut, coming);
    tile.template multiply<KIND>(rows, first + cut, b_places.data() + cut * WIDTH, depth - cut);
    tile.add(start.data(), c_stride);
    tile.add_outer(column.data(), row.data());
    tile.write(c.data(), c_stride);

    for (int64_t m = 0; m < valid; m++)
        for (int64_t j = 0; j < c_stride; j++) {
            double sum = j < WIDTH ? start[m * c_stride + j] : NAN, size = std::fabs(sum);
            const auto add = [&](double x, double y) { sum += x * y, size += std::fabs(x * y); };
            if (j < WIDTH) add(column[m], row[j]);
            for (int64_t k = 0; j < WIDTH && k < depth; k++)
                for (int64_t e = 0; e < EACH; e++)
                    add(a[(m * a_stride + first + k) * EACH + e], b[(k * WIDTH + j) * EACH + e]);
            check::near(c[m * c_stride + j], sum, (depth * EACH + 3) * check::HALF_ULP * size,
                        "%s %lld deep from %lld, %d rows and %d vectors: [%lld, %lld]",
                        KIND != FLOATS ? "pairs" : "floats", (long long)depth, (long long)first,
                        valid, NV, (long long)m, (long long)j);
        }
}

template <int NV, int ROWS, Operands KIND>
void products() {
    for (int valid = 1; valid <= ROWS; valid++)
        for (const int64_t depth : {1, 2, 5, 37, 400}) {
            const int64_t whole = KIND != FLOATS ? up_to(depth, PAIRS_AT_ONCE) : depth;
            product<NV, ROWS, KIND>(valid, 0, whole);
            if (depth < 37) product<NV, ROWS, KIND>(valid, 3, whole);
        }
}

// Each row is in one tile; beyond the last row lies what fills up a tile of the usual height.
template <int NV>
void covered() {
    for (int64_t rows = 1; rows <= 3 * TILE_ROWS * TILE_VECTORS; rows++) {
        int64_t next = 0;
        each_tile<NV>(rows, [&](int64_t first, auto of_tile) {
            check::same(first, next, "first row of a tile, %lld rows, %d vectors", (long long)rows,
                        NV);
            next = first + decltype(of_tile)::value;
        });
        check::same(next, up_to(rows, TILE_ROWS), "end of tiles, %lld rows, %d vectors",
                    (long long)rows, NV);
    }
}

// Panels lie one behind the other, and their vectors hold each column once.
void panels() {
    for (int64_t columns = 1; columns <= 3 * PANEL + 1; columns++) {
        const Panels panels{columns, 7};
        int64_t floats = 0, held = 0;
        for (int64_t p = 0; p < panels.count(); p++) {
            check::same(panels.offset(p), floats, "offset of panel %lld of %lld columns",
                        (long long)p, (long long)columns);
            floats += panels.vectors(p) * LANES * 7, held += panels.vectors(p) * LANES;
        }
        check::same(panels.elements(), floats, "floats for %lld columns", (long long)columns);
        check::same(panels.padded(), held, "padded %lld columns", (long long)columns);
        check::same(held - columns >= 0 && held - columns < LANES, 1,
                    "whether the vectors for %lld columns are as few as hold them",
                    (long long)columns);
    }
}

}  // namespace

int main() {
    check::ask_for_tiles();
    for (int pairs = 0; pairs <= int(MULTIPLIES_PAIRS); pairs++)
        for (int vectors = 1; vectors <= TILE_VECTORS; vectors++)
            with_pairs(pairs, [&](auto operands) {
                with_vectors(vectors, [&](auto constant) {
                    constexpr int NV = decltype(constant)::value;
                    constexpr Operands KIND = decltype(operands)::value;
                    check::same(NV, vectors, "vectors as a constant");
                    products<NV, TILE_ROWS, KIND>();
                    if (most_rows(NV) > TILE_ROWS) products<NV, most_rows(NV), KIND>();
                    covered<NV>();
                });
            });
    panels();
    return check::result();
}
