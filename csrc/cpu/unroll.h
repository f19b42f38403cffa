// The m iterations with gradient as one call, and their backward (fpdm/walk.py), for a part of the
// batch. Pre and post blocks are m = 1 without injection.
#pragma once

#include "block.h"
#include "patience.h"

namespace fpdm {

// Operands and what is kept, of the whole batch; all in one type.
struct Unrolled {
    Operands operands;
    i64 m;
    const void* x;             // x_0 (B,T,D)
    void* xs;                  // x_1 .. x_{m-1} (m-1,B,T,D); null where they are rebuilt
    void *residual, *compute;  // (m, widths B T D)
    i64 widths[2];             // of one iteration in each
    i64 offsets[ACTIVATIONS];  // of what is kept, in B T D elements; -1: not kept
    i64 first, count;          // samples of the part
};

struct Forward {
    Workspace workspace;
    void* z[2];    // iterates of the part, where xs is null
    void* out;     // x_m (B,T,D)
    float* norms;  // (m,2,B), or null
};

struct Backward {
    Sums sums;  // of the part, but for those of weights
    Reverse reverse;
    Unrolled once;  // one iteration of the part, kept anew where nothing is; without, m = 0
    void* g;        // of the part: the gradient with respect to x_m becomes that with respect to x_0
    bool wants_dx;
};

// false when interrupted
bool unroll(const Variant&, const Unrolled&, const Forward&, Interrupted);
bool unroll_backward(const Variant&, const Unrolled&, const Backward&, Interrupted);

}  // namespace fpdm
