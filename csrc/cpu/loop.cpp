#include "loop.h"

#include <chrono>
#include <cstring>
#include <limits>

namespace fpdm {
namespace {

i64 element(int type) { return type == FLOAT32 ? 4 : 2; }

char* bytes(void* p) { return static_cast<char*>(p); }

// vector j of the six
Vector part(const Iteration& it, i64 j) {
    return {bytes(it.modulation) + j * it.rows.width * element(it.rows.type), it.modulation_stride};
}

Linear product(const Rows& r, const Weight& w, i64 cols, i64 depth, const void* x, void* out) {
    return {r.batch * r.tokens, cols, depth, r.type, r.type, true, false,
            x, w.p, w.stride, w.bias, nullptr, nullptr, out};
}

// dst = f(src)
void apply(const Variant& v, const Iteration& it, const void* src, void* dst, float* norms) {
    const Rows& r = it.rows;
    const i64 d = r.width;
    const void* z = src;
    if (it.u) {
        Linear in = product(r, it.inj_a, 2 * d, d, src, it.wide);
        in.gelu = true, in.addend = it.u;
        v.linear(in);
        v.linear(product(r, it.inj_w2, d, 2 * d, it.wide, dst));
        z = dst;
    }
    Block first{r, z, nullptr, {}, part(it, 0), part(it, 1), nullptr, it.y, nullptr};
    v.adaln_linear(product(r, it.qkv, 3 * d, d, it.y, it.wide), first);
    v.attention({r.batch, r.tokens, it.heads, d / it.heads, r.type}, it.wide, it.o);
    Block middle{r, z, nullptr, part(it, 2), part(it, 3), part(it, 4), dst, it.y, nullptr};
    v.linear_gate(product(r, it.proj, d, d, it.o, nullptr), middle);
    Linear hidden = product(r, it.fc1, 4 * d, d, it.y, it.wide);
    hidden.gelu = true;
    v.linear(hidden);
    Block last{r, dst, norms ? src : nullptr, part(it, 5), {}, {}, dst, nullptr, norms};
    v.linear_gate(product(r, it.fc2, d, 4 * d, it.wide, nullptr), last);
}

// whether to go on; asks at most ten times a second
class Patience {
  public:
    explicit Patience(Interrupted interrupted) : interrupted_(interrupted), asked_(now()) {}
    bool lasts() {
        if (now() - asked_ < std::chrono::milliseconds(100)) return true;
        asked_ = now();
        return !interrupted_();
    }

  private:
    using Clock = std::chrono::steady_clock;
    static Clock::time_point now() { return Clock::now(); }
    Interrupted interrupted_;
    Clock::time_point asked_;
};

struct Slots {
    Iteration& it;
    const Watch& w;
    const i64 iterate = it.rows.tokens * it.rows.width * element(it.rows.z_type),
              injected = 2 * it.rows.tokens * it.rows.width * element(it.rows.type),
              vectors = 6 * it.rows.width * element(it.rows.type),
              stride = it.modulation_stride * element(it.rows.type);

    // counts the iteration and keeps its residual; whether the slot is done
    bool done(i64 i) const {
        const float tiny = std::numeric_limits<float>::min(), size = it.norms[it.rows.batch + i];
        const float residual = it.norms[i] / (size < tiny ? tiny : size);
        if (w.residual) w.residual[w.place[i]] = residual;
        w.place[i] += w.next;
        return ++w.count[i] >= w.cap[i] || residual <= w.tol;
    }
    void collect(i64 i, const void* z) const {
        const i64 row = w.rows[i];
        memcpy(bytes(w.result) + row * iterate, static_cast<const char*>(z) + i * iterate,
               size_t(iterate));
        w.used[row] = w.count[i];
    }
    void move(i64 from, i64 to, void* z) const {
        memcpy(bytes(z) + to * iterate, bytes(z) + from * iterate, size_t(iterate));
        if (it.u)
            memcpy(bytes(it.u) + to * injected, bytes(it.u) + from * injected, size_t(injected));
        memcpy(bytes(it.modulation) + to * stride, bytes(it.modulation) + from * stride,
               size_t(vectors));
        i64* const slots[] = {w.rows, w.count, w.cap, w.place};
        for (i64* p : slots) p[to] = p[from];
    }
};

}  // namespace

bool iterate(const Variant& v, const Iteration& it, i64 k, Interrupted interrupted) {
    Patience patience(interrupted);
    const void* src = it.x;
    for (i64 j = 0; j < k; j++) {
        void* dst = it.z[j % 2];
        apply(v, it, src, dst, it.norms ? it.norms + j * 2 * it.rows.batch : nullptr);
        src = dst;
        if (!patience.lasts()) return false;
    }
    return true;
}

i64 solve(const Variant& v, Iteration it, const Watch& w, i64 most, Interrupted interrupted) {
    Patience patience(interrupted);
    const void* src = it.x;
    i64 ran = 0;
    for (i64 j = 0; j < most && it.rows.batch; j++) {
        void* dst = it.z[j % 2];
        apply(v, it, src, dst, it.norms);
        ran += it.rows.batch;
        const Slots slots{it, w};
        i64 left = 0;
        for (i64 i = 0; i < it.rows.batch; i++) {
            if (slots.done(i)) {
                slots.collect(i, dst);
            } else {
                if (left < i) slots.move(i, left, dst);
                left++;
            }
        }
        it.rows.batch = left;
        src = dst;
        if (!patience.lasts()) return -1;
    }
    // caps beyond `most`
    for (i64 i = 0; i < it.rows.batch; i++) Slots{it, w}.collect(i, src);
    return ran;
}

}  // namespace fpdm
