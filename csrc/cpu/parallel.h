// Teams of the OpenMP runtime that torch has already loaded: the module is linked without one, and
// the loader finds the functions in torch's. A team is whole or absent: libgomp ends the threads
// that a smaller team leaves out.
#pragma once

#include <omp.h>

#include <cstdlib>

#include "vec.h"

namespace fpdm {
namespace FPDM_ISA {

struct Team {
    i64 index, size;

    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
    // body(i) for this thread's part of n units
    template <class F>
    void each(i64 n, F body) const {
        for (i64 i = index * n / size; i < (index + 1) * n / size; i++) body(i);
    }
    // body(first, end) for its part, at most `most` units at a time
    template <class F>
    void runs(i64 n, i64 most, F body) const {
        const i64 end = (index + 1) * n / size;
        for (i64 i = index * n / size; i < end; i += most) body(i, min2(end, i + most));
    }
};

// body(team); `work` in elementary operations decides whether a team is worth waking
template <class F>
inline void parallel(i64 work, F body) {
    if (work < 32768 || omp_get_max_threads() == 1 || omp_in_parallel()) return body(Team{0, 1});
#pragma omp parallel
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

inline int most_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// memory that the calling thread keeps between calls: fresh pages would cost more than the kernels
struct Scratch {
    char* p = nullptr;
    size_t size = 0;
    ~Scratch() { free(p); }
};

// to be asked for before a team starts: inside one nothing can be thrown
template <int slot = 0>
inline char* scratch(size_t bytes) {
    static thread_local Scratch s;
    if (bytes > s.size) {
        free(s.p);
        s.size = 0;
        const size_t size = (bytes + 4095) / 4096 * 4096;
        s.p = static_cast<char*>(aligned_alloc(4096, size));
        if (!s.p) out_of_memory(size);
        s.size = size;
    }
    return s.p;
}

}  // namespace FPDM_ISA
}  // namespace fpdm
