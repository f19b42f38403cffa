// gelu:          out = gelu(x)
// gelu_backward: dx = dy gelu'(x), total += dx as it is stored
// add_gelu:      pre = x + addend, out = gelu(pre); x is the product of a library GEMM without bias
//
// gelu is the tanh form, x/2 (1 + tanh(w)) = x sigmoid(2 w), w = sqrt(2/pi) (x + 0.044715 x^3), for
// every input; to four units of float32's last place where the result is a normal float32.
//
// Launch: block = threads, grid.x = ceil(count / (8 threads)).
#pragma once

#include <elements.cuh>

namespace fpdm {

struct GeluParams {  // "PPPPq": 40 bytes
    const void* x;       // (count,); the pre-activation, or for add_gelu the product
    const void* other;   // gelu: unused; gelu_backward: dy; add_gelu: the addend
    void* pre;           // add_gelu: receives x + addend, may be x or out; gelu_backward: the
                         // float32 total; null: not wanted
    void* out;           // may be x or other
    i64 count;           // elements
};
static_assert(sizeof(GeluParams) == 40);

struct GeluTraits {
    static constexpr i32 threads = 128;
    static constexpr i32 blocks_per_sm = 8;
    static FPDM_CONSTEXPR i32 smem_bytes() { return 0; }
    static_assert(threads / WARP * blocks_per_sm >= 16, "resident warps");
};

// sigmoid(2 w) and its complement as e r and r, in the order that x's sign says; e = 2^-|t| with
// t = 2 w log2(e) in two floats, since a relative error in e is an absolute one in t
struct Sigmoid {
    float e, r;
};

template <class C>
FPDM_DEVICE Sigmoid sigmoid_parts(float x) {
    // 2 sqrt(2/pi) log2(e) and 0.044715 times that, each as a rounded float and the rest
    constexpr float A = 2.302208185f, A_REST = 1.2948402e-08f;
    constexpr float B = 0.1029432416f, B_REST = -2.0161985e-09f;
    const float v = min(max(x, -16.0f), 16.0f);  // beyond, e is 0
    const float sign = v < 0.0f ? 1.0f : -1.0f;
    Sigmoid s;
    if constexpr (sizeof(C) == sizeof(half_t)) {  // one float is plenty for what becomes a half
        s.e = exp2_flush(sign * v * fma(B, v * v, A));
        s.r = reciprocal(1.0f + s.e);
        return s;
    }
    const float square = mul(v, v);
    const float square_rest = fma(v, v, -square);
    const float cubic = mul(B, square);
    const float sum = add(A, cubic);
    const float larger = max(A, cubic), smaller = min(A, cubic);
    const float sum_rest = add(smaller, -add(sum, -larger));
    float rest = fma(B, square, -cubic) + sum_rest;
    rest += fma(B, square_rest, fma(B_REST, square, A_REST));
    const float t = mul(v, sum);
    const float t_rest = fma(v, sum, -t) + v * rest;
    const float power = precise_exp2(sign * t);
    s.e = fma(power, sign * t_rest * 0.693147181f, power);
    s.r = precise_reciprocal(1.0f + s.e);
    return s;
}

template <class C>
FPDM_DEVICE float gelu(float x) {
    const Sigmoid s = sigmoid_parts<C>(x);
    return x < 0.0f ? x * s.e * s.r : x * s.r;
}

// sigmoid + x sigmoid (1 - sigmoid) d(2w)/dx
template <class C>
FPDM_DEVICE float gelu_slope(float x) {
    constexpr float A = 1.595769122f, B = 0.2140644488f;  // 2 sqrt(2/pi), and 3 0.044715 times that
    const Sigmoid s = sigmoid_parts<C>(x);
    const float spread = x * s.e * s.r * s.r;
    return fma(spread, fma(B * x, x, A), x < 0.0f ? s.e * s.r : s.r);
}

template <class C, bool Aligned>
FPDM_KERNEL void FPDM_BOUNDS(GeluTraits::threads, GeluTraits::blocks_per_sm)
    gelu_kernel(const GeluParams p) {
    const i64 first = (i64(block_x()) * GeluTraits::threads + thread_x()) * 8;
    const i64 n = p.count - first;
    float v[8];
    load8<Aligned>(static_cast<const C*>(p.x) + first, n, v);
    FPDM_UNROLL
    for (i32 i = 0; i < 8; ++i) v[i] = gelu<C>(v[i]);
    store8<Aligned>(static_cast<C*>(p.out) + first, n, v);
}

template <class C, bool Aligned>
FPDM_KERNEL void FPDM_BOUNDS(GeluTraits::threads, GeluTraits::blocks_per_sm)
    gelu_backward_kernel(const GeluParams p) {
    const i64 first = (i64(block_x()) * GeluTraits::threads + thread_x()) * 8;
    const i64 n = p.count - first;
    float v[8], dy[8];
    load8<Aligned>(static_cast<const C*>(p.x) + first, n, v);
    load8<Aligned>(static_cast<const C*>(p.other) + first, n, dy);
    FPDM_UNROLL
    for (i32 i = 0; i < 8; ++i) v[i] = dy[i] * gelu_slope<C>(v[i]);
    store8<Aligned>(static_cast<C*>(p.out) + first, n, v);
    if (p.pre == nullptr) return;
    float* total = static_cast<float*>(p.pre) + first;
    float sum[8];
    load8<Aligned>(total, n, sum);
    FPDM_UNROLL
    for (i32 i = 0; i < 8; ++i) sum[i] += round_to<C>(v[i]);
    store8<Aligned>(total, n, sum);
}

template <class C, bool Aligned>
FPDM_KERNEL void FPDM_BOUNDS(GeluTraits::threads, GeluTraits::blocks_per_sm)
    add_gelu_kernel(const GeluParams p) {
    const i64 first = (i64(block_x()) * GeluTraits::threads + thread_x()) * 8;
    const i64 n = p.count - first;
    float v[8], u[8];
    load8<Aligned>(static_cast<const C*>(p.x) + first, n, v);
    load8<Aligned>(static_cast<const C*>(p.other) + first, n, u);
    FPDM_UNROLL
    for (i32 i = 0; i < 8; ++i) v[i] = round_to<C>(v[i] + u[i]);
    if (p.pre != nullptr) store8<Aligned>(static_cast<C*>(p.pre) + first, n, v);
    FPDM_UNROLL
    for (i32 i = 0; i < 8; ++i) v[i] = gelu<C>(v[i]);
    store8<Aligned>(static_cast<C*>(p.out) + first, n, v);
}

}  // namespace fpdm
