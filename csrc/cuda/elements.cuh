// Element types: conversion to and from float32, and 8 neighbouring elements at a time.
#pragma once

#include <intrinsics.cuh>

namespace fpdm {

FPDM_CONSTEXPR i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }

FPDM_DEVICE float low_half(u32 v) { return to_float(half_t{u16(v)}); }
FPDM_DEVICE float high_half(u32 v) { return to_float(half_t{u16(v >> 16)}); }
FPDM_DEVICE u32 pack_halves(float low, float high) {
    return u32(to_half(low).bits) | u32(to_half(high).bits) << 16;
}

FPDM_DEVICE float widen(half_t v) { return to_float(v); }
FPDM_DEVICE float widen(float v) { return v; }

FPDM_DEVICE void narrow(float v, half_t& out) { out = to_half(v); }
FPDM_DEVICE void narrow(float v, float& out) { out = v; }

template <class T>
FPDM_DEVICE float round_to(float v) {
    T narrowed;
    narrow(v, narrowed);
    return widen(narrowed);
}

FPDM_DEVICE void load_pack(const half_t* p, float (&v)[8]) {
    const Pack16 r = ld_global16(p);
    const u32 words[4] = {r.x, r.y, r.z, r.w};
    FPDM_UNROLL
    for (i32 i = 0; i < 4; ++i) {
        v[2 * i] = low_half(words[i]);
        v[2 * i + 1] = high_half(words[i]);
    }
}

FPDM_DEVICE void load_pack(const float* p, float (&v)[8]) {
    FPDM_UNROLL
    for (i32 i = 0; i < 2; ++i) {
        const Pack16 r = ld_global16(p + 4 * i);
        v[4 * i] = float_of_bits(r.x);
        v[4 * i + 1] = float_of_bits(r.y);
        v[4 * i + 2] = float_of_bits(r.z);
        v[4 * i + 3] = float_of_bits(r.w);
    }
}

FPDM_DEVICE void store_pack(half_t* p, const float (&v)[8]) {
    st_global16(p, Pack16{pack_halves(v[0], v[1]), pack_halves(v[2], v[3]),
                          pack_halves(v[4], v[5]), pack_halves(v[6], v[7])});
}

FPDM_DEVICE void store_pack(float* p, const float (&v)[8]) {
    FPDM_UNROLL
    for (i32 i = 0; i < 2; ++i) {
        st_global16(p + 4 * i, Pack16{bits_of_float(v[4 * i]), bits_of_float(v[4 * i + 1]),
                                      bits_of_float(v[4 * i + 2]), bits_of_float(v[4 * i + 3])});
    }
}

// the first n of 8 elements, zeros for the rest; aligned: p is 16-byte aligned and n is 8 or <= 0
template <bool Aligned, class T>
FPDM_DEVICE void load8(const T* p, i64 n, float (&v)[8]) {
    FPDM_UNROLL
    for (i32 i = 0; i < 8; ++i) v[i] = 0.0f;
    if constexpr (Aligned) {
        if (n > 0) load_pack(p, v);
    } else {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) {
            if (i < n) v[i] = widen(ld_global(p + i));
        }
    }
}

template <bool Aligned, class T>
FPDM_DEVICE void store8(T* p, i64 n, const float (&v)[8]) {
    if constexpr (Aligned) {
        if (n > 0) store_pack(p, v);
    } else {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) {
            T narrowed;
            narrow(v[i], narrowed);
            if (i < n) st_global(p + i, narrowed);
        }
    }
}

// 1 / a to the last place, for a neither subnormal nor near overflow
FPDM_DEVICE float precise_reciprocal(float a) {
    const float r = reciprocal(a);
    return fma(r, fma(-a, r, 1.0f), r);
}

// 2^x for x < 128 to a unit of the last place; the hardware's own is four times coarser. Zero below
// 2^-126.
FPDM_DEVICE float precise_exp2(float x) {
    if (x < -126.0f) return 0.0f;
    constexpr float ROUND = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest integer
    const float shifted = add(x, ROUND);
    const float f = add(x, -add(shifted, -ROUND));
    float series = 1.546144777e-4f;
    series = fma(series, f, 1.339086681e-3f);
    series = fma(series, f, 9.618056938e-3f);
    series = fma(series, f, 5.550356954e-2f);
    series = fma(series, f, 2.402265072e-1f);
    series = fma(series, f, 6.931471825e-1f);
    const u32 exponent = bits_of_float(shifted) - bits_of_float(ROUND) + 127u;
    return fma(series, f, 1.0f) * float_of_bits(exponent << 23);
}

}  // namespace fpdm
