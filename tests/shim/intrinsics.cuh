// The host's version of csrc/cuda/intrinsics.cuh: the same names, so that g++ compiles the kernels
// as they are. Approximate functions err as the hardware may, by up to 2^-22, wherever their result is
// not a power of two.
#pragma once

#include <cmath>
#include <cstring>

#include <types.cuh>

#include "engine.h"

#define FPDM_DEVICE inline
#define FPDM_KERNEL inline
#define FPDM_CONSTEXPR constexpr
#define FPDM_BOUNDS(...)
#define FPDM_UNROLL
#define FPDM_NO_UNROLL

namespace fpdm {

inline i32 thread_x() { return shim::current->x; }
inline i32 block_x() { return shim::block.index[0]; }
inline i32 block_y() { return shim::block.index[1]; }
inline i32 block_z() { return shim::block.index[2]; }
inline i32 block_dim_x() { return shim::block.threads; }
inline i32 grid_x() { return shim::block.grid[0]; }
inline i32 grid_y() { return shim::block.grid[1]; }

inline void sync_block() { shim::wait(shim::Stop::block); }
inline void sync_warp() { shim::wait(shim::Stop::warp); }

inline u32 bits_of_float(float v) {
    u32 bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

inline float float_of_bits(u32 bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline u32 shuffle(u32 v, i32 lane) {
    shim::current->value = v;
    shim::current->from = lane;
    shim::wait(shim::Stop::shuffle);
    return shim::current->got;
}
inline float shuffle(float v, i32 lane) { return float_of_bits(shuffle(bits_of_float(v), lane)); }
inline u32 shuffle_xor(u32 v, i32 mask) { return shuffle(v, (thread_x() % WARP) ^ mask); }
inline float shuffle_xor(float v, i32 mask) { return shuffle(v, (thread_x() % WARP) ^ mask); }

inline unsigned char* shared_base() { return shim::block.shared; }

template <class T>
inline T ld_shared(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    shim::shared_access(p, sizeof(T), false);
    T v;
    std::memcpy(&v, p, sizeof(T));
    return v;
}

template <class T>
inline void st_shared(T* p, T v) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    shim::shared_access(p, sizeof(T), true);
    std::memcpy(p, &v, sizeof(T));
}

template <class T>
inline T ld_global(const T* p) {
    shim::global_access(p, sizeof(T), false);
    T v;
    std::memcpy(&v, p, sizeof(T));
    return v;
}

template <class T>
inline void st_global(T* p, T v) {
    shim::global_access(p, sizeof(T), true);
    std::memcpy(p, &v, sizeof(T));
}

inline Pack16 ld_global16(const void* p) { return ld_global(static_cast<const Pack16*>(p)); }
inline void st_global16(void* p, Pack16 v) { st_global(static_cast<Pack16*>(p), v); }
inline Pack8 ld_global8(const void* p) { return ld_global(static_cast<const Pack8*>(p)); }
inline void st_global8(void* p, Pack8 v) { st_global(static_cast<Pack8*>(p), v); }

inline float to_float(half_t v) {
    _Float16 h;
    std::memcpy(&h, &v.bits, 2);
    return float(h);
}

inline half_t to_half(float v) {
    const _Float16 h = _Float16(v);
    half_t out;
    std::memcpy(&out.bits, &h, 2);
    return out;
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float abs(float a) { return std::fabs(a); }
inline float sqrt(float a) { return std::sqrt(a); }

// off by a fraction of 2^-22 that a hash of the value decides
inline float approximate(float v) {
    const u32 bits = bits_of_float(v);
    if ((bits & 0x7fffffu) == 0 || !std::isfinite(v)) return v;
    return float(v * (1.0 + double(i32(bits * 2654435761u)) * 0x1p-53));
}

inline float rsqrt(float a) { return approximate(1.0f / std::sqrt(a)); }
inline float reciprocal(float a) { return approximate(1.0f / a); }
inline float exp2(float a) { return approximate(std::exp2(a)); }
inline float exp2_flush(float a) {
    const float v = exp2(a);
    return v < 0x1p-126f ? 0.0f : v;
}
inline float log2(float a) { return approximate(std::log2(a)); }

inline void product(float (&c)[8], Pack8 a, Pack8 b, shim::Stop what) {
    shim::current->c = c;
    shim::current->a = a;
    shim::current->b = b;
    shim::wait(what);
}
inline void mma884(float (&c)[8], const Pack8 a, const Pack8 b) {
    product(c, a, b, shim::Stop::mma);
}
inline void mma884_row(float (&c)[8], const Pack8 a, const Pack8 b) {
    product(c, a, b, shim::Stop::mma_row);
}

}  // namespace fpdm
