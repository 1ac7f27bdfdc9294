// Chooses the instruction set when the library is loaded.
#include <atomic>
#include <cstring>

#include "interface.h"
#include "kernels.h"

namespace {

struct Choice {
    const ffk::Kernels* kernels;
    bool runs_here, pays = true;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
// Intel's unit for pairs takes two cycles for an instruction where float32 takes half of one: there, rounded numbers are multiplied as float32.
bool pairs_pay() { return !__builtin_cpu_is("intel"); }
const Choice choices[] = {
    {&ffk::avx512_bf16, has_avx512() && __builtin_cpu_supports("avx512bf16"), pairs_pay()},
    {&ffk::avx512, has_avx512()},
    {&ffk::avx2, has_avx2()},
    {&ffk::baseline, true},
};
#else
const Choice choices[] = {{&ffk::baseline, true}};
#endif

const ffk::Kernels* first_choice() {
    for (const Choice& choice : choices)
        if (choice.runs_here && choice.pays) return choice.kernels;
    return nullptr;
}

std::atomic<const ffk::Kernels*> chosen{first_choice()};

}  // namespace

extern "C" {

int ffk_interface() { return ffk::INTERFACE; }

const char* ffk_instruction_set() { return chosen.load()->name; }

int ffk_limit(const char* name) {
    for (const Choice& choice : choices)
        if (std::strcmp(choice.kernels->name, name) == 0 && choice.runs_here) {
            chosen = choice.kernels;
            return 0;
        }
    return 1;
}

int ffk_linear_forward(const ffk::Call* call) { return chosen.load()->linear_forward(*call); }

int ffk_linear_step(const ffk::Call* call) { return chosen.load()->linear_step(*call); }

}  // extern "C"
