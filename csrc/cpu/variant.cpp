// One instruction set's kernels: compiled once per variant, with its flags and its FPDM_ISA.
#include "kernels.h"

#include "attention.h"
#include "gemm.h"

namespace fpdm {
namespace FPDM_ISA {

// out[i] = f(a[i], x[i]); total[i] += out[i], as it is stored, where there is a total
template <class T, class F>
inline void each_element(i64 n, const void* a, const void* x, void* out, float* total, F f) {
    parallel(n * 8, [&](Team team) {
        team.each(ceil_div(n, i64(LANES)), [&](i64 i) {
            i64 c = i * LANES, m = min2<i64>(LANES, n - c);
            vf v = get(static_cast<const T*>(x) + c, m);
            const vf y = f(get(static_cast<const T*>(a) + c, m), v);
            put(static_cast<T*>(out) + c, y, m);
            if (total) put(total + c, get(total + c, m) + rounded<T>(y), m);
        });
    });
}

template <class T>
void gelu_all(i64 n, const void* x, void* out) {
    each_element<T>(n, x, x, out, nullptr, [](vf, vf v) { return gelu<T>(v); });
}

template <class T>
void gelu_backward_all(i64 n, const void* dy, const void* x, void* out, float* total) {
    each_element<T>(n, dy, x, out, total, [](vf g, vf v) { return g * gelu_slope<T>(v); });
}

template <class T>
void wgrad_of(i64 rows, i64 outs, i64 ins, const void* dy, const void* x, float* dweight,
              i64 stride, float* dbias) {
    wgrad(rows, outs, ins, static_cast<const T*>(dy), static_cast<const T*>(x), dweight, stride,
          dbias);
}

// fn<T>, fn<Z, T> for dtype codes
#define BY_TYPE(type, fn, ...) ((type) == FLOAT32 ? fn<float>(__VA_ARGS__) : fn<bf16>(__VA_ARGS__))
#define BY_TYPES(rows, fn, ...)                                 \
    ((rows).type == FLOAT32     ? fn<float, float>(__VA_ARGS__) \
     : (rows).z_type == FLOAT32 ? fn<float, bf16>(__VA_ARGS__)  \
                                : fn<bf16, bf16>(__VA_ARGS__))
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

using P = const void*;

extern const Variant variant;
const Variant variant = {
    TEXT(FPDM_ISA),
    COLS,
    FPDM_BF16_DOT ? 2 : 1,
    [](const Rows& r, P z, Vector shift, Vector scale, void* out) {
        BY_TYPES(r, adaln, r, z, shift, scale, out);
    },
    [](const Rows& r, P dy, P z, Vector scale, void* dz, Sum dshift, Sum dscale) {
        BY_TYPES(r, adaln_backward, r, dy, z, scale, dz, dshift, dscale);
    },
    [](const Rows& r, P z, P y, Vector gate, void* out, P prev, float* norms) {
        BY_TYPES(r, gate_residual, r, z, y, gate, out, prev, norms);
    },
    [](const Rows& r, P z, P y, Vector gate, Vector shift, Vector scale, void* z_out, void* out) {
        BY_TYPES(r, gate_residual_adaln, r, z, y, gate, shift, scale, z_out, out);
    },
    [](const Rows& r, P dout, P y, Vector gate, Sum dgate, void* out) {
        BY_TYPES(r, gate_residual_backward, r, dout, y, gate, dgate, out);
    },
    [](int type, i64 n, P x, void* out) { BY_TYPE(type, gelu_all, n, x, out); },
    [](int type, i64 n, P dy, P x, void* out, float* total) {
        BY_TYPE(type, gelu_backward_all, n, dy, x, out, total);
    },
    [](int type, i64 cols, i64 depth, P weight, i64 stride, void* out) {
        BY_TYPE(type, pack_all, cols, depth, weight, stride, out);
    },
    [](const Linear& l) { BY_TYPE(l.type, linear, l); },
    [](const Linear& l, const Block& b) { BY_TYPES(b.rows, adaln_linear, l, b); },
    [](const Linear& l, const Block& b) { BY_TYPES(b.rows, linear_gate, l, b); },
    [](int type, i64 rows, i64 outs, i64 ins, P dy, P x, float* dw, i64 stride, float* db) {
        BY_TYPE(type, wgrad_of, rows, outs, ins, dy, x, dw, stride, db);
    },
    [](const Shape& h, P qkv, void* out) { BY_TYPE(h.type, attention, h, qkv, out); },
    [](const Shape& h, P dy, P qkv, void* out) {
        BY_TYPE(h.type, attention_backward, h, dy, qkv, out);
    },
};

}  // namespace FPDM_ISA
}  // namespace fpdm
