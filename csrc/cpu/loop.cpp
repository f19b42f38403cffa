#include "loop.h"

#include <cstring>
#include <limits>

namespace fpdm {
namespace {

struct Slots {
    const Operands& o;
    const float* norms;
    const Watch& w;
    const i64 size = element(o.rows.type), vectors = 6 * o.rows.width * size,
              iterate = o.rows.tokens * o.rows.width * size, injected = 2 * iterate,
              stride = o.modulation_stride * size;

    // counts the iteration and keeps its residual; whether the slot is done
    bool done(i64 i) const {
        const float tiny = std::numeric_limits<float>::min(), norm = norms[o.rows.batch + i];
        const float residual = norms[i] / (norm < tiny ? tiny : norm);
        if (w.residual) w.residual[w.place[i]] = residual;
        w.place[i] += w.next;
        return ++w.count[i] >= w.cap[i] || residual <= w.tol;
    }
    void collect(i64 i, const void* z) const {
        const i64 row = w.rows[i];
        memcpy(bytes(w.result) + row * iterate, bytes(z) + i * iterate,
               size_t(iterate));
        w.used[row] = w.count[i];
    }
    void move(i64 from, i64 to, void* z) const {
        memcpy(bytes(z) + to * iterate, bytes(z) + from * iterate, size_t(iterate));
        if (o.u)
            memcpy(bytes(o.u) + to * injected, bytes(o.u) + from * injected, size_t(injected));
        memcpy(bytes(o.modulation) + to * stride, bytes(o.modulation) + from * stride,
               size_t(vectors));
        i64* const slots[] = {w.rows, w.count, w.cap, w.place};
        for (i64* p : slots) p[to] = p[from];
    }
};

}  // namespace

bool iterate(const Variant& v, const Iteration& it, i64 k, Interrupted interrupted) {
    Patience patience(interrupted);
    const Operands& o = it.operands;
    const void* src = it.x;
    for (i64 j = 0; j < k; j++) {
        void* dst = it.z[j % 2];
        float* norms = it.norms ? it.norms + j * 2 * o.rows.batch : nullptr;
        forward(v, o, {}, it.workspace, src, dst, norms);
        src = dst;
        if (!patience.lasts()) return false;
    }
    return true;
}

i64 solve(const Variant& v, Iteration it, const Watch& w, i64 most, Interrupted interrupted) {
    Patience patience(interrupted);
    Operands& o = it.operands;
    const void* src = it.x;
    i64 ran = 0;
    for (i64 j = 0; j < most && o.rows.batch; j++) {
        void* dst = it.z[j % 2];
        forward(v, o, {}, it.workspace, src, dst, it.norms);
        ran += o.rows.batch;
        const Slots slots{o, it.norms, w};
        i64 left = 0;
        for (i64 i = 0; i < o.rows.batch; i++) {
            if (slots.done(i)) {
                slots.collect(i, dst);
            } else {
                if (left < i) slots.move(i, left, dst);
                left++;
            }
        }
        o.rows.batch = left;
        src = dst;
        if (!patience.lasts()) return -1;
    }
    // caps beyond `most`
    for (i64 i = 0; i < o.rows.batch; i++) Slots{o, it.norms, w}.collect(i, src);
    return ran;
}

}  // namespace fpdm
