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
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

// What a call's products are.
enum Products { FLOAT32, BFLOAT16, FLOAT32_AT_HIGH };

struct Choice {
    const ffk::Kernels* kernels;
    bool runs_here, is_for[2] = {true, true};
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
    return has_avx2();
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
// Linux says what an aarch64 CPU has.
#if defined(__aarch64__)
[[maybe_unused]] bool has_neon_bf16() {
#if defined(__linux__)
    constexpr unsigned long BF16 = 1ul << 14;
    return (getauxval(AT_HWCAP2) & BF16) != 0;
#else
    return false;
#endif
}
#endif

const Choice choices[] = {
#if defined(FFK_HAS_AMX)
    {&ffk::amx, has_amx(), {false, true}},
#endif
#if defined(FFK_HAS_AVX512_BF16)
    {&ffk::avx512_bf16, has_avx512_bf16(), {pairs_pay(), pairs_pay()}},
#endif
#if defined(FFK_HAS_AVX512)
    {&ffk::avx512, has_avx512()},
#endif
#if defined(FFK_HAS_AVX2)
    {&ffk::avx2, has_avx2()},
#endif
#if defined(FFK_HAS_NEON_BF16)
    {&ffk::neon_bf16, has_neon_bf16(), {false, true}},
#endif
    {&ffk::baseline, true},
};

const ffk::Kernels* first_choice(Products products) {
    if (products == FLOAT32_AT_HIGH) {
        // Three products pay on AMX's unit alone.
        const ffk::Kernels* narrow = first_choice(BFLOAT16);
        return narrow->splits_float32 ? narrow : first_choice(FLOAT32);
    }
    for (const Choice& choice : choices)
        if (choice.runs_here && choice.is_for[products]) return choice.kernels;
    return nullptr;
}

std::atomic<const ffk::Kernels*> chosen[3]{first_choice(FLOAT32), first_choice(BFLOAT16),
                                           first_choice(FLOAT32_AT_HIGH)};

const ffk::Kernels& kernels_for(ffk::Dtype dtype) {
    return *chosen[dtype == ffk::BFLOAT16 ? BFLOAT16 : FLOAT32].load();
}
const ffk::Kernels& kernels_for(const ffk::Call& call) {
    const bool at_high =
        call.layer.compute_dtype == ffk::FLOAT32 && call.layer.precision == ffk::PRECISION_HIGH;
    return at_high ? *chosen[FLOAT32_AT_HIGH].load() : kernels_for(call.layer.compute_dtype);
}

}  // namespace

extern "C" {

int ffk_interface() { return ffk::INTERFACE; }

const char* ffk_instruction_set(int products) { return chosen[products].load()->name; }

int ffk_limit(const char* name) {
    if (*name == 0) {
        for (int i = 0; i < 3; i++) chosen[i] = first_choice(Products(i));
        return 0;
    }
    for (const Choice& choice : choices)
        if (std::strcmp(choice.kernels->name, name) == 0 && choice.runs_here) {
            for (auto& of_products : chosen) of_products = choice.kernels;
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

int ffk_linear_steps(const ffk::Call* calls, int count) {
    for (int i = 0; i < count; i++)
        if (ffk_linear_step(calls + i) != 0) return i + 1;
    return 0;
}

void ffk_maps_forward(const ffk::MapsPass* call) { kernels_for(call->dtype).maps_forward(*call); }

void ffk_maps_backward(const ffk::MapsPass* call) { kernels_for(call->dtype).maps_backward(*call); }

void ffk_maps_products(const ffk::MapsPass* call) { kernels_for(call->dtype).maps_products(*call); }

int ffk_convolution_forward(const ffk::MapsPass* call) {
    return kernels_for(call->dtype).convolution_forward(*call);
}

int ffk_convolution_gradient(const ffk::MapsPass* call) {
    return kernels_for(call->dtype).convolution_gradient(*call);
}

}  // extern "C"
