// Which instruction set's kernels run: the widest that the processor has, or FPDM_CPU_ISA. Among
// those that were built: FPDM_HAS_NAME is defined for each.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

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
#ifdef FPDM_HAS_avx512_bf16
        &avx512_bf16::variant,
#endif
#ifdef FPDM_HAS_avx512
        &avx512::variant,
#endif
#ifdef FPDM_HAS_avx2
        &avx2::variant,
#endif
        &portable::variant,
    };
    for (const Variant* v : all)
        if (runs(v->name) && (!wanted || !*wanted || !strcmp(wanted, v->name))) return v;
    return nullptr;
}

namespace {

struct OutOfMemory : std::bad_alloc {
    char text[80];
    const char* what() const noexcept override { return text; }
};

}  // namespace

void out_of_memory(size_t bytes) {
    OutOfMemory error;
    snprintf(error.text, sizeof error.text, "csrc/cpu: %zu bytes of workspace cannot be had", bytes);
    throw error;
}

}  // namespace fpdm
