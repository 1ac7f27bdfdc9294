// Which instruction sets are chosen on a made-up machine: CPU holds what the CPU shows, and
// "granted" where Linux grants AMX's tiles. Prints the choice for float32 and for bfloat16.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

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
#include "../cpu/dispatch.cpp"

namespace ffk {
const Kernels amx{"amx", nullptr, nullptr}, avx512_bf16{"avx512_bf16", nullptr, nullptr},
    avx512{"avx512", nullptr, nullptr};
const Kernels avx2{"avx2", nullptr, nullptr}, baseline{"baseline", nullptr, nullptr};
}  // namespace ffk

int main() { std::printf("%s %s\n", ffk_instruction_set(0), ffk_instruction_set(1)); }
