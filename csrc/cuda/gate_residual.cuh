// gate_residual:          out = z + gate y, optionally |out - prev|^2 and |out|^2 per run of tokens
// gate_residual_backward: dy = gate dout;  per run of tokens, sums of dout y
//
// z, prev, out, dout have element type R (the residual stream), y, dy, gate C; R = C or R = float.
//
// Launch: block = min(NARROW, D/8 rounded up to whole warps), grid.x = B ceil(T / chunk), grid.y =
// ceil(D / (8 block)): no sum runs along a row, so any D goes.
#pragma once

#include <columns.cuh>

namespace fpdm {

struct GateResidualParams {  // "PPPPPPqiii4x": 72 bytes
    const void* z;     // (B,T,D) of R
    const void* y;     // (B,T,D) of C
    const void* gate;  // (B,D) of C
    const void* prev;  // (B,T,D) of R; unused without norms
    void* out;         // (B,T,D) of R, may be z
    float* partial;    // (B, runs grid.y, 2): squares of out - prev, of out; unused without norms
    i64 gate_stride;   // elements from sample to sample
    i32 T;
    i32 D;
    i32 chunk;  // tokens per block
};
static_assert(sizeof(GateResidualParams) == 72);

struct GateResidualBackwardParams {  // "PPPPPqiii4x": 64 bytes
    const void* dout;  // (B,T,D) of R
    const void* y;     // (B,T,D) of C
    const void* gate;  // (B,D) of C
    void* dy;          // (B,T,D) of C, may be dout where R = C
    float* partial;    // (B, runs, D): sums of dout y, one per run of tokens
    i64 gate_stride;
    i32 T;
    i32 D;
    i32 chunk;
};
static_assert(sizeof(GateResidualBackwardParams) == 64);

struct GateResidualTraits : ColumnTraits<NARROW> {
    static constexpr i32 rows = 2;  // in flight
    static constexpr i32 smem = reduce_bytes<NARROW, 2>();
    static FPDM_CONSTEXPR i32 smem_bytes() { return smem; }
    static_assert(smem <= SMEM_LIMIT);
};

template <class R, class C, bool Aligned, bool Norms>
FPDM_KERNEL void FPDM_BOUNDS(GateResidualTraits::threads, GateResidualTraits::blocks_per_sm)
    gate_residual_kernel(const GateResidualParams p) {
    constexpr i32 rows = GateResidualTraits::rows;
    const Place at = place(p.T, p.D, p.chunk);
    const i32 n = at.columns;
    float gate[8], squares[2] = {};
    load8<Aligned>(static_cast<const C*>(p.gate) + at.sample * p.gate_stride + at.column, n, gate);

    for (i32 t = at.first; t < at.end; t += rows) {
        const i64 offset = (at.sample * p.T + t) * p.D + at.column;
        float x[rows][8], y[rows][8];
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            load8<Aligned>(static_cast<const R*>(p.z) + offset + i64(r) * p.D, m, x[r]);
            load8<Aligned>(static_cast<const C*>(p.y) + offset + i64(r) * p.D, m, y[r]);
        }
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            FPDM_UNROLL
            for (i32 i = 0; i < 8; ++i) {
                // a row beyond the run counts as zeros, whatever the gate
                x[r][i] = m > 0 ? round_to<R>(fma(gate[i], y[r][i], x[r][i])) : 0.0f;
            }
            store8<Aligned>(static_cast<R*>(p.out) + offset + i64(r) * p.D, m, x[r]);
            if constexpr (Norms) {
                float old[8];
                load8<Aligned>(static_cast<const R*>(p.prev) + offset + i64(r) * p.D, m, old);
                FPDM_UNROLL
                for (i32 i = 0; i < 8; ++i) {
                    const float step = x[r][i] - old[i];
                    squares[0] = fma(step, step, squares[0]);
                    squares[1] = fma(x[r][i], x[r][i], squares[1]);
                }
            }
        }
    }
    if constexpr (Norms) {
        block_sum(squares, 0, GateResidualTraits::warps);
        if (thread_x() == 0) {
            const i64 slot = (i64(block_x()) * grid_y() + block_y()) * 2;
            st_global(p.partial + slot, squares[0]);
            st_global(p.partial + slot + 1, squares[1]);
        }
    }
}

template <class R, class C, bool Aligned>
FPDM_KERNEL void FPDM_BOUNDS(GateResidualTraits::threads, GateResidualTraits::blocks_per_sm)
    gate_residual_backward_kernel(const GateResidualBackwardParams p) {
    constexpr i32 rows = GateResidualTraits::rows;
    const Place at = place(p.T, p.D, p.chunk);
    const i32 n = at.columns;
    float gate[8], dgate[8] = {};
    load8<Aligned>(static_cast<const C*>(p.gate) + at.sample * p.gate_stride + at.column, n, gate);

    for (i32 t = at.first; t < at.end; t += rows) {
        const i64 offset = (at.sample * p.T + t) * p.D + at.column;
        float g[rows][8], y[rows][8];
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            load8<Aligned>(static_cast<const R*>(p.dout) + offset + i64(r) * p.D, m, g[r]);
            load8<Aligned>(static_cast<const C*>(p.y) + offset + i64(r) * p.D, m, y[r]);
        }
        FPDM_UNROLL
        for (i32 r = 0; r < rows; ++r) {
            const i32 m = t + r < at.end ? n : 0;
            FPDM_UNROLL
            for (i32 i = 0; i < 8; ++i) {
                dgate[i] = fma(g[r][i], y[r][i], dgate[i]);
                g[r][i] *= gate[i];
            }
            store8<Aligned>(static_cast<C*>(p.dy) + offset + i64(r) * p.D, m, g[r]);
        }
    }
    store8<Aligned>(p.partial + i64(block_x()) * p.D + at.column, n, dgate);
}

}  // namespace fpdm
