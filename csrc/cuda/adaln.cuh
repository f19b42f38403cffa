// adaln:               out = LN(z) (1 + scale) + shift
// gate_residual_adaln: z'  = z + gate y;  out = LN(z') (1 + scale) + shift
// adaln_backward:      dz += LN'(dy (1 + scale));  per run of tokens, sums of dy and of dy LN(z)
//
// LN has no affine part and eps 1e-6; mean first, then the centred squares, in float32. z, dz have
// element type R (the residual stream), all else C; R = C or R = float.
//
// Launch: block = min(Threads, D/8 rounded up to whole warps), grid = B ceil(T / chunk).
#pragma once

#include <columns.cuh>

namespace fpdm {

constexpr float LN_EPS = 1e-6f;

struct AdalnParams {  // "PPPPPPPqqqiiif": 96 bytes
    const void* z;      // (B,T,D) of R
    const void* y;      // (B,T,D) of C; unused by adaln
    const void* gate;   // (B,D) of C; unused by adaln
    const void* shift;  // (B,D) of C
    const void* scale;  // (B,D) of C
    void* z_out;        // (B,T,D) of R, may be z; unused by adaln
    void* out;          // (B,T,D) of C
    i64 gate_stride;    // elements from sample to sample
    i64 shift_stride;
    i64 scale_stride;
    i32 T;
    i32 D;
    i32 chunk;        // tokens per block
    float inv_width;  // 1 / D
};
static_assert(sizeof(AdalnParams) == 96);

struct AdalnBackwardParams {  // "PPPPPqiiif": 64 bytes
    const void* dy;     // (B,T,D) of C
    const void* z;      // (B,T,D) of R
    const void* scale;  // (B,D) of C
    void* dz;           // (B,T,D) of R, added to
    float* partial;     // (B, runs, 2, D): sums of dy, then of dy LN(z), one per run of tokens
    i64 scale_stride;
    i32 T;
    i32 D;
    i32 chunk;
    float inv_width;
};
static_assert(sizeof(AdalnBackwardParams) == 64);

template <i32 Threads>
struct AdalnTraits : ColumnTraits<Threads> {
    static constexpr i32 rows = Threads == NARROW ? 2 : 1;  // in flight
    static constexpr i32 smem = reduce_bytes<Threads, rows>();
    static FPDM_CONSTEXPR i32 smem_bytes() { return smem; }
    static_assert(smem <= SMEM_LIMIT);
};

template <i32 Threads>
struct AdalnBackwardTraits : ColumnTraits<Threads> {
    static constexpr i32 rows = Threads == NARROW ? 2 : 1;
    static constexpr i32 smem = reduce_bytes<Threads, 3 * rows>();
    static FPDM_CONSTEXPR i32 smem_bytes() { return smem; }
    static_assert(smem <= SMEM_LIMIT);
};

// x -= mean(x) over the columns; a thread's columns beyond D stay zero
template <i32 Rows>
FPDM_DEVICE void centre(float (&x)[Rows][8], i32 columns, float inv_width, i32 max_warps) {
    float mean[Rows];
    FPDM_UNROLL
    for (i32 r = 0; r < Rows; ++r) {
        mean[r] = 0.0f;
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) mean[r] += x[r][i];
    }
    block_sum(mean, 0, max_warps);
    FPDM_UNROLL
    for (i32 r = 0; r < Rows; ++r) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) {
            x[r][i] = i < columns ? fma(-inv_width, mean[r], x[r][i]) : 0.0f;
        }
    }
}

// x centred already: LN(x) (1 + scale) + shift
template <i32 Rows>
FPDM_DEVICE void modulate(float (&x)[Rows][8], const float (&shift)[8], const float (&scale)[8],
                          float inv_width, i32 max_warps) {
    float square[Rows];
    FPDM_UNROLL
    for (i32 r = 0; r < Rows; ++r) {
        square[r] = 0.0f;
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) square[r] = fma(x[r][i], x[r][i], square[r]);
    }
    block_sum(square, 1, max_warps);
    FPDM_UNROLL
    for (i32 r = 0; r < Rows; ++r) {
        const float rstd = rsqrt(fma(square[r], inv_width, LN_EPS));
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) x[r][i] = fma(x[r][i] * rstd, 1.0f + scale[i], shift[i]);
    }
}

template <class R, class C, i32 Threads, bool Aligned, bool Gated>
FPDM_KERNEL void FPDM_BOUNDS(Threads, ColumnTraits<Threads>::blocks_per_sm)
    adaln_kernel(const AdalnParams p) {
    using Traits = AdalnTraits<Threads>;
    constexpr i32 rows = Traits::rows;
    const Place at = place(p.T, p.D, p.chunk);
    const i32 n = at.columns;
    float shift[8], scale[8], gate[8];
    const C* shifts = static_cast<const C*>(p.shift) + at.sample * p.shift_stride;
    const C* scales = static_cast<const C*>(p.scale) + at.sample * p.scale_stride;
    load8<Aligned>(shifts + at.column, n, shift);
    load8<Aligned>(scales + at.column, n, scale);
    if constexpr (Gated) {
        const C* gates = static_cast<const C*>(p.gate) + at.sample * p.gate_stride;
        load8<Aligned>(gates + at.column, n, gate);
    }

    for (i32 t = at.first; t < at.end; t += rows) {
        const i64 offset = (at.sample * p.T + t) * p.D + at.column;
        float x[rows][8];
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            const i64 o = offset + i64(r) * p.D;
            load8<Aligned>(static_cast<const R*>(p.z) + o, m, x[r]);
            if constexpr (Gated) {
                float y[8];
                load8<Aligned>(static_cast<const C*>(p.y) + o, m, y);
                FPDM_UNROLL
                for (i32 i = 0; i < 8; ++i) x[r][i] = round_to<R>(fma(gate[i], y[i], x[r][i]));
                store8<Aligned>(static_cast<R*>(p.z_out) + o, m, x[r]);
            }
        }
        centre(x, n, p.inv_width, Traits::warps);
        modulate(x, shift, scale, p.inv_width, Traits::warps);
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            store8<Aligned>(static_cast<C*>(p.out) + offset + i64(r) * p.D, m, x[r]);
        }
    }
}

// dxhat = dy (1 + scale); dz = rstd (dxhat - mean dxhat - xhat mean(dxhat xhat)). The three sums
// are taken together: xhat = rstd x, and rstd can wait.
template <class R, class C, i32 Threads, bool Aligned>
FPDM_KERNEL void FPDM_BOUNDS(Threads, ColumnTraits<Threads>::blocks_per_sm)
    adaln_backward_kernel(const AdalnBackwardParams p) {
    using Traits = AdalnBackwardTraits<Threads>;
    constexpr i32 rows = Traits::rows;
    const Place at = place(p.T, p.D, p.chunk);
    const i32 n = at.columns;
    float scale[8], dshift[8] = {}, dscale[8] = {};
    const C* scales = static_cast<const C*>(p.scale) + at.sample * p.scale_stride;
    load8<Aligned>(scales + at.column, n, scale);

    for (i32 t = at.first; t < at.end; t += rows) {
        const i64 offset = (at.sample * p.T + t) * p.D + at.column;
        float x[rows][8], dy[rows][8], sums[3 * rows] = {};
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            load8<Aligned>(static_cast<const R*>(p.z) + offset + i64(r) * p.D, m, x[r]);
            load8<Aligned>(static_cast<const C*>(p.dy) + offset + i64(r) * p.D, m, dy[r]);
        }
        centre(x, n, p.inv_width, Traits::warps);
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            FPDM_UNROLL
            for (i32 i = 0; i < 8; ++i) {
                const float dxhat = dy[r][i] * (1.0f + scale[i]);
                sums[3 * r] = fma(x[r][i], x[r][i], sums[3 * r]);
                sums[3 * r + 1] += dxhat;
                sums[3 * r + 2] = fma(dxhat, x[r][i], sums[3 * r + 2]);
            }
        }
        block_sum(sums, 1, Traits::warps);
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            const float rstd = rsqrt(fma(sums[3 * r], p.inv_width, LN_EPS));
            const float mean = sums[3 * r + 1] * p.inv_width;
            const float slope = sums[3 * r + 2] * rstd * p.inv_width;
            R* dz = static_cast<R*>(p.dz) + offset + i64(r) * p.D;
            float d[8];
            load8<Aligned>(dz, m, d);
            FPDM_UNROLL
            for (i32 i = 0; i < 8; ++i) {
                const float xhat = x[r][i] * rstd;
                const float dxhat = dy[r][i] * (1.0f + scale[i]);
                d[i] = fma(rstd, fma(-slope, xhat, dxhat - mean), d[i]);
                dshift[i] += dy[r][i];
                dscale[i] = fma(dy[r][i], xhat, dscale[i]);
            }
            store8<Aligned>(dz, m, d);
        }
    }
    float* partial = p.partial + i64(block_x()) * 2 * p.D + at.column;
    store8<Aligned>(partial, n, dshift);
    store8<Aligned>(partial + p.D, n, dscale);
}

}  // namespace fpdm
