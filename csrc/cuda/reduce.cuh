// The second half of every reduction over tokens: partial sums of a sample, one per run, are added
// in the order of the runs. No atomics.
//
// reduce_columns: dst_v[b, d] += sum over runs of partial[b, run, v, d], v < vectors (1 or 2).
// reduce_norms:   norms[v, b]  = sqrt(sum over runs of partial[b, run, v]), v < 2.
#pragma once

#include <elements.cuh>

namespace fpdm {

struct ReduceColumnsParams {  // "PPPqqiiii": 56 bytes
    const float* partial;  // (B, runs, vectors, D)
    float* first;          // (B,D), unit stride in D
    float* second;         // the same for the second vector; unused when there is one
    i64 first_stride;      // elements from sample to sample
    i64 second_stride;
    i32 B;
    i32 runs;
    i32 vectors;
    i32 D;
};
static_assert(sizeof(ReduceColumnsParams) == 56);

struct ReduceNormsParams {  // "PPqii": 32 bytes
    const float* partial;  // (B, runs, 2)
    float* norms;          // (2,B), unit stride in B
    i64 stride;            // elements from the first row of norms to the second
    i32 B;
    i32 runs;
};
static_assert(sizeof(ReduceNormsParams) == 32);

struct ReduceTraits {
    static constexpr i32 threads = 128;
    static constexpr i32 blocks_per_sm = 8;
    static FPDM_CONSTEXPR i32 smem_bytes() { return 0; }
};

// one thread per (sample, vector, column): grid.x = ceil(B vectors D / threads)
FPDM_KERNEL void FPDM_BOUNDS(ReduceTraits::threads, ReduceTraits::blocks_per_sm)
    reduce_columns_kernel(const ReduceColumnsParams p) {
    const i64 row = i64(p.vectors) * p.D;
    const i64 index = i64(block_x()) * ReduceTraits::threads + thread_x();
    if (index >= p.B * row) return;
    const i64 b = index / row;
    const i64 rest = index % row;
    const float* partial = p.partial + b * p.runs * row + rest;
    float sum = 0.0f;
    for (i32 run = 0; run < p.runs; ++run) sum += ld_global(partial + run * row);
    float* dst = rest < p.D ? p.first + b * p.first_stride + rest
                            : p.second + b * p.second_stride + (rest - p.D);
    st_global(dst, ld_global(dst) + sum);
}

// one warp per sample: grid.x = ceil(B / (threads / 32))
FPDM_KERNEL void FPDM_BOUNDS(ReduceTraits::threads, ReduceTraits::blocks_per_sm)
    reduce_norms_kernel(const ReduceNormsParams p) {
    const i64 b = i64(block_x()) * (ReduceTraits::threads / WARP) + thread_x() / WARP;
    if (b >= p.B) return;
    const i32 lane = thread_x() % WARP;
    const float* partial = p.partial + b * p.runs * 2;
    float sums[2] = {};
    for (i32 run = lane; run < p.runs; run += WARP) {
        sums[0] += ld_global(partial + 2 * run);
        sums[1] += ld_global(partial + 2 * run + 1);
    }
    FPDM_UNROLL
    for (i32 mask = WARP / 2; mask > 0; mask /= 2) {
        sums[0] = add(sums[0], shuffle_xor(sums[0], mask));
        sums[1] = add(sums[1], shuffle_xor(sums[1], mask));
    }
    if (lane == 0) {
        st_global(p.norms + b, sqrt(sums[0]));
        st_global(p.norms + p.stride + b, sqrt(sums[1]));
    }
}

}  // namespace fpdm
