// gelu(x) = x / (1 + 2^y), y = -2 sqrt(2/pi) log2(e) (x + 0.044715 x^3), and its derivative.
//
// exact: y is carried in two floats (or in doubles without fused multiply-add), because an error of
// y is a relative error of the small results at negative x; results under 2^-126 are kept.
// Otherwise: good to 2^-14, for results that are rounded to bfloat16.
#pragma once

#include "vec.h"

namespace fpdm {
namespace FPDM_ISA {

constexpr double Y1 = -2.302208198144325, Y3 = Y1 * 0.044715;

// y = n + r with whole n in [-127, 191] and |r| <= 1/2
struct Split {
    vf n, r;
};

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FPDM_FMA 1
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return bits<vf>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif defined(__AVX2__)
    return bits<vf>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
#else
#define FPDM_FMA 0
using vd = double __attribute__((vector_size(8 * LANES)));
#endif

inline Split exponent(vf x) {
    Split s;
    x = at_most(at_least(x, -12.f), 12.f);
#if FPDM_FMA
    // the leading coefficient has bits to spare, so that a - p is exact
    constexpr float a = -2.3017578125f, a_low = float(Y1 - double(a));
    constexpr float b = float(Y3), b_low = float(Y3 - double(b));
    vf xx = x * x, xx_low = fma(x, x, -xx);
    vf p = fma(splat(b), xx, splat(a));
    vf p_low =
        fma(splat(b), xx, a - p) + fma(splat(b), xx_low, fma(splat(b_low), xx, splat(a_low)));
    vf y = x * p, y_low = fma(x, p_low, fma(x, p, -y));
    y = at_most(at_least(y, -127.f), 191.f);
    s.n = nearest(y);
    s.r = (y - s.n) + y_low;
#else
    vd w = __builtin_convertvector(x, vd);
    vd y = w * (Y1 + Y3 * w * w);
    y = y < -127. ? -127. + vd{} : y;
    y = y > 191. ? 191. + vd{} : y;
    constexpr double shift = 6755399441055744.;
    vd whole = (y + shift) - shift;
    s.n = __builtin_convertvector(whole, vf);
    s.r = __builtin_convertvector(y - whole, vf);
#endif
    return s;
}

// 1, 2^y and their sum, scaled by 2^-64 where y > 64; the last factor of a result: 1 or 2^-64, and
// 0 where y was cut
struct Sigmoid {
    vf one, e, sum, factor;
};

inline Sigmoid sigmoid(vf x) {
    Split s = exponent(x);
    vf far = s.n > 64.f ? splat(-64.f) : vf{}, one = s.n > 64.f ? splat(0x1p-64f) : splat(1.f);
    vf power = scale(splat(1.f), s.n + far), rest = power * s.r, slope = exp2_slope<true>(s.r);
    // the smaller terms first: one rounding of the sum counts
    return {one, power + rest * slope, power + (one + rest * slope), s.n > 190.f ? vf{} : one};
}

// 1 / x to 2^-14
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
    return bits<vf>(_mm512_rcp14_ps(bits<__m512>(x)));
#else
    return 1.f / x;
#endif
}

// 2^y, between 0 and infinity
inline vf sigmoid_short(vf x) {
    vf y = x * (float(Y1) + float(Y3) * (x * x));
    y = at_most(at_least(y, -127.f), 128.f);
    vf n = nearest(y), r = y - n;
    return scale(1.f + r * exp2_slope<false>(r), n);
}

// -0 far below zero, and NaN of -infinity, as in PyTorch
template <class T>
inline vf gelu(vf x);

template <>
inline vf gelu<float>(vf x) {
    Sigmoid s = sigmoid(x);
    return x / s.sum * s.factor;
}

template <>
inline vf gelu<bf16>(vf x) {
    return x * reciprocal(1.f + sigmoid_short(x));
}

// h = 2 x u'(x) = H1 x + H3 x^3
constexpr double H1 = 1.5957691216057308, H3 = 0.21406444881780076;

// 1 + h t
inline vf one_plus(vf x, vf t) {
#if FPDM_FMA
    constexpr float a = 1.595703125f, a_low = float(H1 - double(a));
    constexpr float b = float(H3), b_low = float(H3 - double(b));
    vf xx = x * x, xx_low = fma(x, x, -xx);
    vf w = fma(splat(b), xx, splat(a));
    vf w_low =
        fma(splat(b), xx, a - w) + fma(splat(b), xx_low, fma(splat(b_low), xx, splat(a_low)));
    vf h = x * w, h_low = fma(x, w_low, fma(x, w, -h));
    return fma(h, t, fma(h_low, t, splat(1.f)));
#else
    vd w = __builtin_convertvector(x, vd);
    return __builtin_convertvector(1. + w * (H1 + H3 * w * w) * __builtin_convertvector(t, vd), vf);
#endif
}

// slope = s (1 + h (1 - s)), s = 1 / (1 + e); e is kept finite. NaN where x^2 overflows, as in
// PyTorch.
template <class T>
inline vf gelu_slope(vf x);

template <>
inline vf gelu_slope<float>(vf x) {
    vf near = at_most(at_least(x, -11.5f), 11.5f);
    Sigmoid s = sigmoid(near);
    vf inverse = 1.f / s.sum, t = x < 0.f ? 1.f - inverse * s.one : s.e * inverse;
    vf slope = inverse * one_plus(near, t) * s.one;
    // the sum cancels around its zero: there a polynomial in the distance to it
    vf d = (x + 0.7524614334106445f) - 1.1339628e-8f;
    constexpr float near_zero[] = {
        1.254825899e-4f,  2.353425428e-4f, -9.367042597e-4f, -2.413978075e-3f,
        5.264868253e-3f,  1.968118584e-2f, -1.661988281e-2f, -1.139444305e-1f,
        -1.578282643e-2f, 3.875184457e-1f, 4.304000908e-1f,
    };
    vf p = splat(near_zero[0]);
    for (int i = 1; i < 11; i++) p = p * d + near_zero[i];
    vi inside = (d > -0.8f) & (d < 0.6f);
    return (inside ? p * d : slope) + x * x * 0.f;
}

template <>
inline vf gelu_slope<bf16>(vf x) {
    vf near = at_most(at_least(x, -9.9f), 9.9f);
    vf e = sigmoid_short(near), s = reciprocal(1.f + e);
    vf h = near * (float(H1) + float(H3) * (near * near));
    return s * (1.f + h * (e * s)) + x * x * 0.f;
}

}  // namespace FPDM_ISA
}  // namespace fpdm
