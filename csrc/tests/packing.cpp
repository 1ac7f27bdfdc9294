// Rows of the batch on their way into the layouts that the products stream, and sums over a row.
#include "../cpu/rows.h"
#include "check.h"

namespace {

using std::vector;

// Up to LANES rows as columns of a panel, that lies among others.
void columns(int valid, int64_t depth) {
    constexpr int64_t WIDTH = LANES + 5;
    vector<vector<float>> rows;
    vector<const float*> at;
    for (int i = 0; i < valid; i++) rows.push_back(check::numbers(depth));
    for (const auto& row : rows) at.push_back(row.data());
    vector<float> panel(size_t((depth - 1) * WIDTH + LANES), 7.f);
    pack_columns(at.data(), valid, depth, panel.data(), WIDTH);
    for (size_t i = 0; i < panel.size(); i++) {
        const size_t k = i / WIDTH, lane = i % WIDTH;
        const float expected = lane >= LANES ? 7 : int(lane) < valid ? rows[lane][k] : 0;
        check::near(panel[i], expected, 0, "pack_columns of %d rows, %lld deep: [%zu, %zu]", valid,
                    (long long)depth, k, lane);
    }
}

// Three rows as rows of every panel.
void rows_of_panels(int64_t count) {
    const Panels panels{count, 3};
    const vector<float> rows[3] = {check::numbers(count), check::numbers(count),
                                   check::numbers(count)};
    vector<float> packed(size_t(panels.elements()), NAN);
    for (int64_t k = 0; k < 3; k++) pack_row(rows[k].data(), panels, k, packed.data());
    size_t place = 0;
    for (int64_t first = 0; first < count; first += PANEL)
        for (int64_t k = 0; k < 3; k++)
            for (int64_t j = first; j < first + PANEL; j++) {
                if (j >= (count + LANES - 1) / LANES * LANES) break;
                check::near(packed[place++], j < count ? rows[k][size_t(j)] : 0, 0,
                            "pack_row of %lld columns: [%lld, %lld]", (long long)count,
                            (long long)k, (long long)j);
            }
    check::same(int64_t(packed.size()), int64_t(place), "floats packed");
}

// One row, as float32 and as narrow numbers: its operands, its pairs and its sums.
void row(int64_t n) {
    const vector<float> exact = check::numbers(n), other = check::numbers(n);
    vector<float> nearest;
    vector<uint16_t> halves, float16;
    vector<float> wide, digits;
    for (const float value : exact) nearest.push_back(check::nearest_bfloat16(value));
    for (const float value : nearest) halves.push_back(uint16_t(check::bits_of(value) >> 16));
    for (const float value : exact) {
        wide.push_back(check::nearest_float16(value));
        digits.push_back(check::nearest_of(value, 11, -200, 128));
    }
    for (const float value : wide) float16.push_back(to_float16(broadcast(value))[0]);
    const int64_t numbers = up_to(n, 2 * PAIRS_AT_ONCE);
    struct {
        const char* name;
        Row row;
        const vector<float>&operands, &as_it_came;
    } kinds[] = {
        {"a float32 row", {exact.data(), ffk::FLOAT32, ffk::FLOAT32}, exact, exact},
        {"a rounded row", {exact.data(), ffk::FLOAT32, ffk::BFLOAT16}, nearest, exact},
        {"a bfloat16 row", {halves.data(), ffk::BFLOAT16, ffk::BFLOAT16}, nearest, nearest},
        {"a row for float16", {exact.data(), ffk::FLOAT32, ffk::FLOAT16}, digits, exact},
        {"a float16 row", {float16.data(), ffk::FLOAT16, ffk::FLOAT16}, wide, wide}};
    for (const auto& kind : kinds) {
        vector<float> scratch(static_cast<size_t>(n)), pairs(size_t(numbers / 2), NAN);
        const float* operands = kind.row.operands(n, scratch.data());
        const bool in_pairs = kind.row.products != ffk::FLOAT16;
        const char* places =
            in_pairs ? reinterpret_cast<const char*>(kind.row.pairs(n, pairs.data())) : nullptr;
        double sum = 0, product = 0, size = 0;
        for (int64_t k = 0; k < numbers; k++) {
            uint16_t number;
            if (in_pairs) {
                std::memcpy(&number, places + 2 * k, 2);
                check::same(number, k < n ? halves[size_t(k)] : 0, "pairs of %s of %lld: [%lld]",
                            kind.name, (long long)n, (long long)k);
            }
            if (k >= n) continue;
            const float expected = kind.operands[size_t(k)], came = kind.as_it_came[size_t(k)];
            check::near(operands[k], expected, 0, "operands of %s of %lld: [%lld]", kind.name,
                        (long long)n, (long long)k);
            check::near(kind.row[k], expected, 0, "%s of %lld: [%lld]", kind.name, (long long)n,
                        (long long)k);
            check::near(kind.row.exact(k), came, 0, "%s of %lld, exact: [%lld]", kind.name,
                        (long long)n, (long long)k);
            sum += double(came) * came, product += double(expected) * other[size_t(k)];
            size += std::fabs(double(expected) * other[size_t(k)]);
        }
        const double rounding = double(n + 1) * check::HALF_ULP;
        check::near(sum_of_squares(kind.row, n), sum, rounding * sum,
                    "sum_of_squares of %s of %lld", kind.name, (long long)n);
        check::near(dot(operands, other.data(), n), product, rounding * size, "dot of %s of %lld",
                    kind.name, (long long)n);
    }
}

void transposition() {
    vec rows[LANES];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) rows[i][j] = float(i * LANES + j);
    transpose(rows);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++)
            check::near(rows[i][j], j * LANES + i, 0, "transpose: [%d, %d]", i, j);
}

}  // namespace

int main() {
    transposition();
    for (int64_t n = 1; n <= 2 * PANEL + LANES + 1; n++) rows_of_panels(n);
    for (int64_t n = 1; n <= 9 * LANES + 1; n++) row(n);
    for (int valid = 1; valid <= LANES; valid++)
        for (int64_t depth = 1; depth <= 3 * LANES + 1; depth++) columns(valid, depth);
    return check::result();
}
