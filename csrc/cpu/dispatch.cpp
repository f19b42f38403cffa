// Which instruction set's kernels run: the widest that the processor has, or FPDM_CPU_ISA.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fpdm {

static bool runs(const char* name) {
#if defined(__x86_64__)
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx512")) return wide;
    if (!strcmp(name, "avx512_bf16")) return wide && __builtin_cpu_supports("avx512bf16");
#endif
    return !strcmp(name, "portable");
}

const Variant* choose(const char* wanted) {
    static const Variant* const all[] = {
#if defined(__x86_64__)
        &avx512_bf16::variant,
        &avx512::variant,
        &avx2::variant,
#endif
        &portable::variant,
    };
    for (const Variant* v : all)
        if (runs(v->name) && (!wanted || !*wanted || !strcmp(wanted, v->name))) return v;
    return nullptr;
}

}  // namespace fpdm
