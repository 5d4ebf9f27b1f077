// Chooses the instruction set at run time, so that one build runs on every processor of its architecture.
#include <cstring>

#include "../tokens.h"

namespace idlevit::cpu {

extern const Kernels kernels_baseline;
#if defined(IDLEVIT_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

const Kernels* available(int i) {
    const Kernels* found[3] = {&kernels_baseline, nullptr, nullptr};
    [[maybe_unused]] int count = 1;
#if defined(IDLEVIT_X86)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) found[count++] = &kernels_avx2;
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found[count++] = &kernels_avx512;
#endif
    return i >= 0 && i < 3 ? found[i] : nullptr;
}

static const Kernels*& active() {
    static const Kernels* table = [] {
        const Kernels* best = nullptr;
        for (int i = 0; const Kernels* next = available(i); ++i) best = next;
        return best;
    }();
    return table;
}

const Kernels& kernels() { return *active(); }

bool set_instruction_set(const char* name) {
    for (int i = 0; const Kernels* table = available(i); ++i) {
        if (std::strcmp(table->name, name) == 0) {
            active() = table;
            return true;
        }
    }
    return false;
}

}  // namespace idlevit::cpu
