// Vectors of floats on GCC's vector extensions: the same source is compiled once per instruction
// set, each time in a namespace of its own. Nothing here may be an inline function of the standard
// library: the linker would keep one copy for all instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
// gcc 12 reports its own headers' "undefined" vectors
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef FPDM_ISA
#error "FPDM_ISA: not given, expected the name of the namespace"
#endif

namespace fpdm {
namespace FPDM_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int COLS = 2 * LANES;

#if defined(__AVX512BF16__)
#define FPDM_BF16_DOT 1
#else
#define FPDM_BF16_DOT 0
#endif

using vf = float __attribute__((vector_size(4 * LANES)));
using vi = int32_t __attribute__((vector_size(4 * LANES)));
using vu = uint32_t __attribute__((vector_size(4 * LANES)));
using vh = uint16_t __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

template <class T>
inline T min2(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max2(T a, T b) {
    return a < b ? b : a;
}
inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

template <class To, class From>
inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}

inline vf splat(float x) { return x - vf{}; }
inline vu splat(uint32_t x) { return x + vu{}; }
// a NaN in a stays; the instruction returns its second operand when there is one
#if defined(__AVX512F__)
inline vf at_least(vf a, float b) {
    return bits<vf>(_mm512_max_ps(_mm512_set1_ps(b), bits<__m512>(a)));
}
inline vf at_most(vf a, float b) {
    return bits<vf>(_mm512_min_ps(_mm512_set1_ps(b), bits<__m512>(a)));
}
inline vf larger(vf a, vf b) { return bits<vf>(_mm512_max_ps(bits<__m512>(b), bits<__m512>(a))); }
#else
inline vf at_least(vf a, float b) { return a < b ? splat(b) : a; }
inline vf at_most(vf a, float b) { return a > b ? splat(b) : a; }
inline vf larger(vf a, vf b) { return b > a ? b : a; }
#endif

inline vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline vu load(const uint32_t* p) {
    vu v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline vf load(const bf16* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return bits<vf>(__builtin_convertvector(h, vu) << 16);
}

// round to nearest even; a NaN stays one
inline vh to_bf16(vf v) {
#if FPDM_BF16_DOT
    return bits<vh>(_mm512_cvtneps_pbh(bits<__m512>(v)));
#else
    vu u = bits<vu>(v);
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return __builtin_convertvector(v == v ? rounded : (u >> 16 | 0x40u), vh);
#endif
}
inline uint16_t to_bf16(float x) {
    uint32_t u = bits<uint32_t>(x);
    return uint16_t(x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16 | 0x40u));
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }

// what a value becomes when it is kept in T
template <class T>
inline vf rounded(vf v);
template <>
inline vf rounded<float>(vf v) {
    return v;
}
template <>
inline vf rounded<bf16>(vf v) {
    return bits<vf>(__builtin_convertvector(to_bf16(v), vu) << 16);
}

inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(uint32_t* p, vu v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
    vh h = to_bf16(v);
    __builtin_memcpy(p, &h, sizeof h);
}

// the first n < LANES elements; zero behind them
#if defined(__AVX512F__)
inline vf load(const float* p, i64 n) {
    return bits<vf>(_mm512_maskz_loadu_ps(__mmask16((1 << n) - 1), p));
}
inline vf load(const bf16* p, i64 n) {
    return bits<vf>(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1 << n) - 1), p)), 16));
}
inline void store(float* p, vf v, i64 n) {
    _mm512_mask_storeu_ps(p, __mmask16((1 << n) - 1), bits<__m512>(v));
}
inline void store(bf16* p, vf v, i64 n) {
    _mm256_mask_storeu_epi16(p, __mmask16((1 << n) - 1), bits<__m256i>(to_bf16(v)));
}
#else
template <class T>
inline vf load(const T* p, i64 n) {
    T t[LANES] = {};
    __builtin_memcpy(t, p, size_t(n) * sizeof(T));
    return load(t);
}
template <class T>
inline void store(T* p, vf v, i64 n) {
    T t[LANES];
    store(t, v);
    __builtin_memcpy(p, t, size_t(n) * sizeof(T));
}
#endif
// zero in place of lane n and those behind it
inline vf keep(vf v, i64 n) {
    if (n == LANES) return v;
    vi index;
    for (int i = 0; i < LANES; i++) index[i] = i;
    return index < int32_t(n) ? v : vf{};
}

// body(vector accessor for column c) over all columns, the last one short
template <class F>
inline void columns(i64 d, F body) {
    i64 c = 0;
    for (; c + LANES <= d; c += LANES) body(c, i64(LANES));
    if (c < d) body(c, d - c);
}
template <class T>
inline vf get(const T* p, i64 n) {
    return n == LANES ? load(p) : load(p, n);
}
template <class T>
inline void put(T* p, vf v, i64 n) {
    n == LANES ? store(p, v) : store(p, v, n);
}

inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(bits<__m512>(v));
#else
    float t[LANES];
    store(t, v);
    for (int h = LANES / 2; h; h /= 2)
        for (int i = 0; i < h; i++) t[i] += t[i + h];
    return t[0];
#endif
}

// x = n + r with whole n and |r| <= 1/2, for |x| < 2^22
inline vf nearest(vf x) {
#if defined(__AVX512F__)
    return bits<vf>(
        _mm512_roundscale_ps(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    return (x + 12582912.f) - 12582912.f;
#endif
}
// x 2^n for whole n in [-127, 128]: 0 and infinity at the ends
inline vf scale(vf x, vf n) {
#if defined(__AVX512F__)
    return bits<vf>(_mm512_scalef_ps(bits<__m512>(x), bits<__m512>(n)));
#else
    return x * bits<vf>((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

// (2^r - 1) / r for |r| <= 1/2; 1 + r times it is 2^r to 2e-9, short: to 3e-6
template <bool exact>
inline vf exp2_slope(vf r) {
    if constexpr (exact) {
        vf p = 1.535336062e-4f * r + 1.339887486e-3f;
        p = p * r + 9.618437366e-3f;
        p = p * r + 5.550332470e-2f;
        p = p * r + 2.402264791e-1f;
        return p * r + 6.931472029e-1f;
    } else {
        vf p = 9.582850688e-3f * r + 5.590642820e-2f;
        p = p * r + 2.402409868e-1f;
        return p * r + 6.931241928e-1f;
    }
}

// 2^x for x <= 0; under 2^-127 it is 0: any other floor would count where it weighs a value of 3e38
template <bool exact>
inline vf exp2_negative(vf x) {
#if defined(__AVX512F__)
    // not less: a NaN stays
    const __mmask16 seen = _mm512_cmp_ps_mask(bits<__m512>(x), _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    vf n = nearest(x), r = x - n, m = 1.f + r * exp2_slope<exact>(r);
    return bits<vf>(_mm512_maskz_scalef_ps(seen, bits<__m512>(m), bits<__m512>(n)));
#else
    x = at_least(x, -127.f);
    vf n = nearest(x), r = x - n;
    return scale(1.f + r * exp2_slope<exact>(r), n);
#endif
}

}  // namespace FPDM_ISA
}  // namespace fpdm
