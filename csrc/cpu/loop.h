// The fixed-point iteration as one call: k applications of the block, or as many as every sample
// needs.
#pragma once

#include "block.h"
#include "patience.h"

namespace fpdm {

struct Iteration {
    Operands operands;  // of a slot each
    const void* x;      // x_0; x_1 goes to z[0], x_2 to z[1], x_3 to z[0], ...
    void* z[2];         // (B,T,D)
    Workspace workspace;
    float* norms;  // |f(x) - x| and |f(x)| per slot: (k,2,B), in a solve (2,B); or null
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

// k iterations; false when interrupted
bool iterate(const Variant&, const Iteration&, i64 k, Interrupted);

// iterations until every slot is done, `most` at most. Slots that are done go to their rows of the
// result, those that go on to the front: with their rows of z, u and modulation. Returns slots times
// iterations that ran, -1 when interrupted.
i64 solve(const Variant&, Iteration, const Watch&, i64 most, Interrupted);

}  // namespace fpdm
