// A row's scale against its formula in long double, from no row to the ends of float32.
#include "../cpu/rows.h"
#include "check.h"

namespace {

using Long = long double;

constexpr int64_t INPUTS = 5;

float scale_of(ffk::Norm norm, ffk::EpsMode eps_mode, double eps, float sumsq) {
    ffk::Call c{};
    c.layer.weight.columns = INPUTS;
    c.layer.norm = norm, c.layer.eps_mode = eps_mode, c.layer.eps = eps;
    return row_scale(c, sumsq);
}

void scales(float sumsq, Long eps) {
    for (const auto norm : {ffk::NORM_NONE, ffk::NORM_L2, ffk::NORM_RMS})
        for (const auto mode : {ffk::EPS_ADD, ffk::EPS_CLAMP, ffk::EPS_INSIDE}) {
            const Long square = norm == ffk::NORM_RMS ? Long(sumsq) / INPUTS : Long(sumsq);
            Long divisor = sqrtl(square) + eps;
            if (mode == ffk::EPS_CLAMP) divisor = std::max(sqrtl(square), eps);
            if (mode == ffk::EPS_INSIDE) divisor = sqrtl(square + eps);
            const Long expected = norm == ffk::NORM_NONE ? 1 : sumsq == 0 ? 0 : 1 / divisor;
            check::near(scale_of(norm, mode, double(eps), sumsq), double(expected),
                        4 * check::HALF_ULP * double(expected),
                        "row_scale of %g, norm %d, eps mode %d, eps %g", sumsq, norm, mode,
                        double(eps));
        }
}

}  // namespace

int main() {
    for (const float sumsq : {0.f, 1e-30f, 1e-6f, 0.3f, 1.f, 700.f, 1e10f, 1e30f})
        for (const double eps : {1e-12, 1e-4, 1.}) scales(sumsq, eps);
    return check::result();
}
