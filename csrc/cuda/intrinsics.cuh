// Everything that is not portable C++: qualifiers, built-in indices, barriers, shuffles, memory
// accesses, special functions, mma. A host shim replaces this one header, name by name; no other
// file has a CUDA keyword or a conditional.
#pragma once

#include <types.cuh>

#define FPDM_DEVICE __device__ __forceinline__
#define FPDM_CONSTEXPR __host__ __device__ constexpr
#define FPDM_KERNEL __global__
#define FPDM_BOUNDS(...) __launch_bounds__(__VA_ARGS__)  // threads per block, blocks per SM
#define FPDM_UNROLL _Pragma("unroll")
#define FPDM_NO_UNROLL _Pragma("unroll 1")

namespace fpdm {

FPDM_DEVICE i32 thread_x() { return threadIdx.x; }
FPDM_DEVICE i32 block_x() { return blockIdx.x; }
FPDM_DEVICE i32 block_y() { return blockIdx.y; }
FPDM_DEVICE i32 block_z() { return blockIdx.z; }
FPDM_DEVICE i32 block_dim_x() { return blockDim.x; }
FPDM_DEVICE i32 grid_x() { return gridDim.x; }
FPDM_DEVICE i32 grid_y() { return gridDim.y; }

FPDM_DEVICE void sync_block() { __syncthreads(); }
FPDM_DEVICE void sync_warp() { __syncwarp(); }

// whole warps only
FPDM_DEVICE float shuffle_xor(float v, i32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FPDM_DEVICE u32 shuffle_xor(u32 v, i32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FPDM_DEVICE float shuffle(float v, i32 lane) { return __shfl_sync(0xffffffffu, v, lane); }

// dynamic shared memory of the block, 16-byte aligned
FPDM_DEVICE unsigned char* shared_base() {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    return dynamic_shared;
}

// T of 4, 8 or 16 bytes, naturally aligned; every access to shared memory is one of these two
template <class T>
FPDM_DEVICE T ld_shared(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    return *p;
}

template <class T>
FPDM_DEVICE void st_shared(T* p, T v) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    *p = v;
}

// T of 2, 4, 8 or 16 bytes, naturally aligned; the buffers may alias, so no read-only path
template <class T>
FPDM_DEVICE T ld_global(const T* p) {
    return *p;
}

template <class T>
FPDM_DEVICE void st_global(T* p, T v) {
    *p = v;
}

FPDM_DEVICE Pack16 ld_global16(const void* p) { return *static_cast<const Pack16*>(p); }
FPDM_DEVICE void st_global16(void* p, Pack16 v) { *static_cast<Pack16*>(p) = v; }
FPDM_DEVICE Pack8 ld_global8(const void* p) { return *static_cast<const Pack8*>(p); }
FPDM_DEVICE void st_global8(void* p, Pack8 v) { *static_cast<Pack8*>(p) = v; }

FPDM_DEVICE float to_float(half_t v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}

// round to nearest even, overflow to infinity
FPDM_DEVICE half_t to_half(float v) {
    half_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
    return h;
}

FPDM_DEVICE float float_of_bits(u32 v) { return __uint_as_float(v); }
FPDM_DEVICE u32 bits_of_float(float v) { return __float_as_uint(v); }

FPDM_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// never contracted into an fma
FPDM_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
FPDM_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
// a NaN operand loses against a number
FPDM_DEVICE float max(float a, float b) { return fmaxf(a, b); }
FPDM_DEVICE float min(float a, float b) { return fminf(a, b); }
FPDM_DEVICE float abs(float a) { return fabsf(a); }
FPDM_DEVICE float sqrt(float a) { return __fsqrt_rn(a); }

// hardware approximations, relative error below 2^-22
FPDM_DEVICE float rsqrt(float a) {
    float r;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

FPDM_DEVICE float reciprocal(float a) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

FPDM_DEVICE float exp2(float a) {
    float r;
    asm("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

// subnormal results become zero
FPDM_DEVICE float exp2_flush(float a) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

FPDM_DEVICE float log2(float a) {
    float r;
    asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

// four products of 8x8x4, one per quad-pair (lanes 4q..4q+3 and 4q+16..4q+19): c += a b.
// c, element i: row (l & 1) + (i & 2) + (4 if l >= 16), column (i & 4) + (l & 2) + (i & 1).
// a, 8x4: row l % 4 + (4 if l >= 16), columns 0..3 packed low half first.
// b, 4x8: column l % 4 + (4 if l >= 16), rows 0..3.
FPDM_DEVICE void mma884(float (&c)[8], const Pack8 a, const Pack8 b) {
    asm volatile(
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7])
        : "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y));
}

// the same with b, 4x8, by rows: row l % 4, columns 0..3 (4..7 if l >= 16).
FPDM_DEVICE void mma884_row(float (&c)[8], const Pack8 a, const Pack8 b) {
    asm volatile(
        "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7])
        : "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y));
}

}  // namespace fpdm
