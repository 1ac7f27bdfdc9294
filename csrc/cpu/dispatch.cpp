// Chooses the instruction set when the library is loaded. FFK_HAS_... says which copies of the
// kernels there are: a compiler may not know all.
#include <atomic>
#include <cstring>

#include "interface.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Choice {
    const ffk::Kernels* kernels;
    bool runs_here, for_float32 = true, for_bfloat16 = true;
};

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
           && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
// Asked of the CPU itself: a compiler without this set may not know its name either.
[[maybe_unused]] bool has_avx512_bf16() {
    unsigned features = 0, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &features, &b, &c, &d)
           && (features & 1u << 5) != 0;
}
[[maybe_unused]] bool has_amx() {
#if defined(FFK_EMULATES_MATRIX_UNIT)
    return has_avx512_bf16();
#elif defined(__linux__)
    unsigned a, b, c, features = 0;
    const unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &features) || (features & bfloat16) == 0
        || (features & tiles) == 0)
        return false;
    // Linux saves the tiles of those processes alone that ask for it.
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return has_avx512_bf16() && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
// Intel's unit for pairs takes two cycles for an instruction where float32 takes half of one:
// there, rounded numbers are multiplied as float32.
[[maybe_unused]] bool pairs_pay() { return !__builtin_cpu_is("intel"); }
#endif
const Choice choices[] = {
#if defined(FFK_HAS_AMX)
    {&ffk::amx, has_amx(), false},
#endif
#if defined(FFK_HAS_AVX512_BF16)
    {&ffk::avx512_bf16, has_avx512_bf16(), pairs_pay(), pairs_pay()},
#endif
#if defined(FFK_HAS_AVX512)
    {&ffk::avx512, has_avx512()},
#endif
#if defined(FFK_HAS_AVX2)
    {&ffk::avx2, has_avx2()},
#endif
    {&ffk::baseline, true},
};

const ffk::Kernels* first_choice(bool bfloat16) {
    for (const Choice& choice : choices)
        if (choice.runs_here && (bfloat16 ? choice.for_bfloat16 : choice.for_float32))
            return choice.kernels;
    return nullptr;
}

// By whether the products are bfloat16 ones.
std::atomic<const ffk::Kernels*> chosen[2]{first_choice(false), first_choice(true)};

const ffk::Kernels& kernels_for(ffk::Dtype dtype) { return *chosen[dtype == ffk::BFLOAT16].load(); }
const ffk::Kernels& kernels_for(const ffk::Call& call) {
    return kernels_for(call.layer.compute_dtype);
}

}  // namespace

extern "C" {

int ffk_interface() { return ffk::INTERFACE; }

const char* ffk_instruction_set(int bfloat16) { return chosen[bfloat16 != 0].load()->name; }

int ffk_limit(const char* name) {
    if (*name == 0) {
        for (int i = 0; i < 2; i++) chosen[i] = first_choice(i != 0);
        return 0;
    }
    for (const Choice& choice : choices)
        if (std::strcmp(choice.kernels->name, name) == 0 && choice.runs_here) {
            chosen[0] = chosen[1] = choice.kernels;
            return 0;
        }
    return 1;
}

int64_t ffk_layout(const size_t** offsets) {
    *offsets = ffk::LAYOUT;
    return int64_t(sizeof(ffk::LAYOUT) / sizeof(*ffk::LAYOUT));
}

int ffk_linear_forward(const ffk::Call* call) { return kernels_for(*call).linear_forward(*call); }

int ffk_linear_step(const ffk::Call* call) { return kernels_for(*call).linear_step(*call); }

int ffk_linear_update(const ffk::Call* call) { return kernels_for(*call).linear_update(*call); }

void ffk_maps_forward(const ffk::MapsPass* call) { kernels_for(call->dtype).maps_forward(*call); }

void ffk_maps_backward(const ffk::MapsPass* call) { kernels_for(call->dtype).maps_backward(*call); }

int ffk_convolution_forward(const ffk::MapsPass* call) {
    return kernels_for(call->dtype).convolution_forward(*call);
}

int ffk_convolution_gradient(const ffk::MapsPass* call) {
    return kernels_for(call->dtype).convolution_gradient(*call);
}

}  // extern "C"
