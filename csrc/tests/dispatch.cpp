// Which instruction sets are chosen on a made-up machine: an x86 CPU shows what CPU holds, and
// "granted" where Linux grants AMX's tiles; an aarch64 one is an emulator's. Prints the choice for
// float32, for bfloat16, and for float32 at precision "high".
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
// Read anew each time: the library chooses before main.
static bool shows(const char* name) {
    return (" " + std::string(std::getenv("CPU")) + " ").find(" " + std::string(name) + " ")
           != std::string::npos;
}

static int made_up_cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned*, unsigned*,
                         unsigned* d) {
    if (leaf != 7) return 0;
    if (subleaf == 0) *d = (shows("amx_bf16") ? 1u << 22 : 0) | (shows("amx_tile") ? 1u << 24 : 0);
    if (subleaf == 1) *a = shows("avx512bf16") ? 1u << 5 : 0;
    return 1;
}

static long made_up_syscall(long number, long request, long component) {
    return number == SYS_arch_prctl && request == 0x1023 && component == 18 && shows("granted")
               ? 0
               : -1;
}

#define FFK_HAS_AMX
#define FFK_HAS_AVX512_BF16
#define FFK_HAS_AVX512
#define FFK_HAS_AVX2
#define __builtin_cpu_supports shows
#define __builtin_cpu_is shows
#define __get_cpuid_count made_up_cpuid
#define syscall made_up_syscall
#else
#define FFK_HAS_NEON_BF16
#endif
#include "../cpu/dispatch.cpp"

namespace ffk {
const Kernels amx{"amx", true}, avx512_bf16{"avx512_bf16", false}, avx512{"avx512", false},
    avx2{"avx2", false}, neon_bf16{"neon_bf16", false}, baseline{"baseline", false};
}  // namespace ffk

int main() {
    for (int products = 0; products < 3; products++)
        std::printf("%s ", ffk_instruction_set(products));
}
