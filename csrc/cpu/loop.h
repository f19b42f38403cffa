// The fixed-point iteration as one call: k applications of the block, or as many as every sample
// needs. Kernel after kernel as fpdm/block.py orders them; nothing but kernels in between.
#pragma once

#include "kernels.h"

namespace fpdm {

struct Weight {
    const void* p;
    i64 stride;
    const void* bias;
};

// What x -> f(x) reads and writes, for `rows.batch` slots; residual stream and products are of one
// type. Without injection u is null.
struct Iteration {
    Rows rows;
    i64 heads;
    const void* x;         // x_0; x_1 goes to z[0], x_2 to z[1], x_3 to z[0], ...
    void* z[2];            // (B,T,D)
    void *u, *modulation;  // (B,T,2D), (B,6D)
    i64 modulation_stride;
    Weight inj_a, inj_w2, qkv, proj, fc1, fc2;
    void *wide, *y, *o;  // (B,T,4D), (B,T,D) twice
    float* norms;        // |f(x) - x| and |f(x)| per slot: (k,2,B), in a solve (2,B); or null
};

// Who is done (fpdm/stopping.py): per slot the row of the batch that it holds, iterations run, cap,
// place of its next residual. Per row of the batch: result, iterations of this solve.
struct Watch {
    i64 *rows, *count, *cap, *place, *used;
    void* result;     // (R,T,D)
    float* residual;  // null where not recorded
    i64 next;         // from one residual of a slot to the next
    float tol;
};

// asked now and then: whether to give up
using Interrupted = bool (*)();

// k iterations; false when interrupted
bool iterate(const Variant&, const Iteration&, i64 k, Interrupted);

// iterations until every slot is done, `most` at most. Slots that are done go to their rows of the
// result, those that go on to the front: with their rows of z, u and modulation. Returns slots times
// iterations that ran, -1 when interrupted.
i64 solve(const Variant&, Iteration, const Watch&, i64 most, Interrupted);

}  // namespace fpdm
