#include "block.h"

namespace fpdm {
namespace {

// vector j of the six
Vector part(const Operands& o, i64 j) {
    return {bytes(o.modulation) + j * o.rows.width * element(o.rows.type), o.modulation_stride};
}

Sum part(const Operands& o, const Sums& s, i64 j) {
    return {s.modulation + j * o.rows.width, s.modulation_stride};
}

// x W^T + b, W (outs,ins)
Linear product(const Rows& r, const Weight& w, i64 outs, i64 ins, const void* x, void* out) {
    return {r.batch * r.tokens, outs, ins, r.type, r.type, true, false,
            x, w.p, w.stride, w.bias, nullptr, nullptr, out};
}

// gelu(x W^T + b + addend)
Linear product_gelu(const Rows& r, const Weight& w, i64 outs, i64 ins, const void* x,
                    const void* addend, void* pre, void* out) {
    Linear l = product(r, w, outs, ins, x, out);
    l.gelu = true, l.addend = addend, l.pre = pre;
    return l;
}

// dx = dy W; dW += dy^T x, db += sum dy
struct Transposed {
    const Variant& v;
    const Rows& r;
    i64 outs, ins;
    const void* dy;

    void input(const Weight& w, void* dx) const {
        v.linear({r.batch * r.tokens, ins, outs, r.type, r.type, false, false, dy, w.p, w.stride,
                  nullptr, nullptr, nullptr, dx});
    }
    void weight(const Gradient& g, const void* x) const {
        v.wgrad(r.type, r.batch * r.tokens, outs, ins, dy, x, g.p, g.stride, g.bias);
    }
};

void* either(void* kept, void* other) { return kept ? kept : other; }

i64 count(const Rows& r, i64 widths) { return r.batch * r.tokens * widths * r.width; }

}  // namespace

void forward(const Variant& v, const Operands& o, const Activations& keep, const Workspace& ws,
             const void* x, void* out, float* norms) {
    const Rows& r = o.rows;
    const i64 d = r.width;
    const void* z = x;
    if (o.u) {
        void *a = either(keep.a, ws.wide), *injected = either(keep.z, out);
        v.linear(product_gelu(r, o.w.inj_a, 2 * d, d, x, o.u, keep.pre, a));
        v.linear(product(r, o.w.inj_w2, d, 2 * d, a, injected));
        z = injected;
    }
    void *y1 = either(keep.y1, ws.y), *qkv = either(keep.qkv, ws.wide);
    const Block first{r, z, nullptr, {}, part(o, 0), part(o, 1), nullptr, y1, nullptr};
    v.adaln_linear(product(r, o.w.qkv, 3 * d, d, y1, qkv), first);
    void* mixed = either(keep.o, ws.o);
    v.attention({r.batch, r.tokens, o.heads, d / o.heads, r.type}, qkv, mixed);
    void *z2 = either(keep.z2, out), *y2 = either(keep.y2, ws.y);
    const Block middle{r, z, nullptr, part(o, 2), part(o, 3), part(o, 4), z2, y2, nullptr};
    v.linear_gate(product(r, o.w.proj, d, d, mixed, keep.p), middle);
    void* gh = either(keep.gh, ws.wide);
    v.linear(product_gelu(r, o.w.fc1, 4 * d, d, y2, nullptr, keep.h, gh));
    const Block last{r, z2, norms ? x : nullptr, part(o, 5), {}, {}, out, nullptr, norms};
    v.linear_gate(product(r, o.w.fc2, d, 4 * d, gh, keep.r), last);
}

void backward(const Variant& v, const Operands& o, const Activations& kept, const Sums& sums,
              const Reverse& s, const void* z, void* g) {
    const Rows& r = o.rows;
    const i64 d = r.width;
    const bool frozen = sums.frozen();

    v.gate_residual_backward(r, g, kept.r, part(o, 5), part(o, sums, 5), s.d0);
    const Transposed fc2{v, r, d, 4 * d, s.d0};
    if (!frozen) {
        if (!kept.gh) v.gelu(r.type, count(r, 4), kept.h, s.wide);
        fc2.weight(sums.w.fc2, either(kept.gh, s.wide));
    }
    fc2.input(o.w.fc2, s.wide);
    v.gelu_backward(r.type, count(r, 4), s.wide, kept.h, s.wide, nullptr);
    if (!kept.z2) v.gate_residual(r, z, kept.p, part(o, 2), s.e, nullptr, nullptr);
    const void* z2 = either(kept.z2, s.e);
    const Transposed fc1{v, r, 4 * d, d, s.wide};
    if (!frozen) {
        if (!kept.y2) v.adaln(r, z2, part(o, 3), part(o, 4), s.d1);
        fc1.weight(sums.w.fc1, either(kept.y2, s.d1));
    }
    fc1.input(o.w.fc1, s.d0);
    v.adaln_backward(r, s.d0, z2, part(o, 4), g, part(o, sums, 3), part(o, sums, 4));

    v.gate_residual_backward(r, g, kept.p, part(o, 2), part(o, sums, 2), s.d0);
    const Transposed proj{v, r, d, d, s.d0};
    if (!frozen) proj.weight(sums.w.proj, kept.o);
    proj.input(o.w.proj, s.d1);
    v.attention_backward({r.batch, r.tokens, o.heads, d / o.heads, r.type}, s.d1, kept.qkv, s.wide);
    const Transposed qkv{v, r, 3 * d, d, s.wide};
    if (!frozen) {
        if (!kept.y1) v.adaln(r, z, part(o, 0), part(o, 1), s.d1);
        qkv.weight(sums.w.qkv, either(kept.y1, s.d1));
    }
    qkv.input(o.w.qkv, s.d0);
    v.adaln_backward(r, s.d0, z, part(o, 1), g, part(o, sums, 0), part(o, sums, 1));
}

void injection_backward(const Variant& v, const Operands& o, const Activations& kept,
                        const Sums& sums, const Reverse& s, const void* x, void* g,
                        bool wants_dx) {
    const Rows& r = o.rows;
    const i64 d = r.width;
    const Transposed w2{v, r, d, 2 * d, g}, a{v, r, 2 * d, d, s.wide};
    if (!sums.frozen()) {
        if (!kept.a) v.gelu(r.type, count(r, 2), kept.pre, s.wide);
        w2.weight(sums.w.inj_w2, either(kept.a, s.wide));
    }
    w2.input(o.w.inj_w2, s.wide);
    v.gelu_backward(r.type, count(r, 2), s.wide, kept.pre, s.wide, sums.u);
    if (!sums.frozen()) a.weight(sums.w.inj_a, x);
    if (wants_dx) a.input(o.w.inj_a, g);
}

void again(const Variant& v, const Operands& o, const Activations& kept, const void* z, void* out) {
    v.gate_residual(o.rows, z, kept.p, part(o, 2), out, nullptr, nullptr);
    v.gate_residual(o.rows, out, kept.r, part(o, 5), out, nullptr, nullptr);
}

}  // namespace fpdm
