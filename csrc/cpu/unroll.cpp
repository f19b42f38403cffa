#include "unroll.h"

#include <cstring>
#include <vector>

namespace fpdm {
namespace {

// widths of Activations in units of D, and which of them are of the residual stream
constexpr i64 WIDTHS[ACTIVATIONS] = {2, 2, 1, 1, 3, 1, 1, 1, 1, 4, 4, 1};
constexpr bool RESIDUAL[ACTIVATIONS] = {false, false, true,  false, false, false,
                                        false, true,  false, false, false, false};

struct Part {
    const Unrolled& u;
    Operands operands = u.operands;
    const i64 sample = operands.rows.tokens * operands.rows.width * element(operands.rows.type),
              batch = operands.rows.batch * sample, start = u.first * sample;

    explicit Part(const Unrolled& unrolled) : u(unrolled) {
        const Rows& r = operands.rows;
        if (operands.u) operands.u = bytes(operands.u) + 2 * start;
        operands.modulation =
            bytes(operands.modulation) + u.first * operands.modulation_stride * element(r.type);
        operands.rows.batch = u.count;
    }
    // x_j, where it is kept
    char* iterate(i64 j) const { return bytes(u.xs) + (j - 1) * batch + start; }
    const void* first() const { return bytes(u.x) + start; }

    // what iteration j keeps
    Activations kept(i64 j) const {
        void* found[ACTIVATIONS];
        for (i64 i = 0; i < ACTIVATIONS; i++) {
            void* buffer = RESIDUAL[i] ? u.residual : u.compute;
            const i64 units = j * u.widths[!RESIDUAL[i]] + u.offsets[i];
            found[i] = u.offsets[i] < 0 ? nullptr : bytes(buffer) + units * batch + WIDTHS[i] * start;
        }
        return {found[0], found[1], found[2], found[3], found[4],  found[5],
                found[6], found[7], found[8], found[9], found[10], found[11]};
    }
};

// the part's rows of a (2,B) table
void scatter(const float* norms, i64 count, float* table, i64 batch, i64 first) {
    for (i64 i = 0; i < 2; i++)
        memcpy(table + i * batch + first, norms + i * count, size_t(count) * sizeof(float));
}

}  // namespace

bool unroll(const Variant& v, const Unrolled& u, const Forward& f, Interrupted interrupted) {
    Patience patience(interrupted);
    const Part part(u);
    const i64 batch = u.operands.rows.batch;
    std::vector<float> norms(f.norms ? size_t(2 * u.count) : 0);
    const void* src = part.first();
    for (i64 j = 0; j < u.m; j++) {
        void* dst = j == u.m - 1 ? bytes(f.out) + part.start : u.xs ? part.iterate(j + 1) : f.z[j % 2];
        float* mine = f.norms ? norms.data() : nullptr;
        forward(v, part.operands, part.kept(j), f.workspace, src, dst, mine);
        if (f.norms) scatter(mine, u.count, f.norms + 2 * j * batch, batch, u.first);
        src = dst;
        if (!patience.lasts()) return false;
    }
    return true;
}

bool unroll_backward(const Variant& v, const Unrolled& u, const Backward& b,
                     Interrupted interrupted) {
    Patience patience(interrupted);
    const Part part(u);
    const Reverse& s = b.reverse;
    const bool injected = b.sums.u, anew = b.once.m;
    for (i64 j = u.m - 1; j >= 0; j--) {
        Activations kept = part.kept(j);
        const void* x = j == 0 ? part.first() : u.xs ? part.iterate(j) : nullptr;
        if (anew) {
            kept = Part(b.once).kept(0);
            forward(v, part.operands, kept, {s.wide, s.d0, nullptr}, x, s.e, nullptr);
        }
        backward(v, part.operands, kept, b.sums, s, kept.z ? kept.z : x, b.g);
        if (injected) {
            if (!x) {
                // only now: until here its place held z'
                const Activations before = part.kept(j - 1);
                again(v, part.operands, before, before.z, s.e);
                x = s.e;
            }
            injection_backward(v, part.operands, kept, b.sums, s, x, b.g, j > 0 || b.wants_dx);
        }
        if (!patience.lasts()) return false;
    }
    return true;
}

}  // namespace fpdm
