// What the element-wise kernels share: a block owns a run of tokens of one sample, each of its
// threads 8 neighbouring columns. Vectors (shift, scale, gate) stay in registers, a row's sum is a
// sum over the block, a column's sum needs no exchange at all.
#pragma once

#include <elements.cuh>

namespace fpdm {

constexpr i32 COLUMNS = 8;  // per thread

// blocks of up to 160 threads serve D <= 1280, of up to 512 threads D <= 4096
constexpr i32 NARROW = 160;
constexpr i32 WIDE = 512;

template <i32 Threads>
struct ColumnTraits {
    static constexpr i32 threads = Threads;
    static constexpr i32 warps = Threads / WARP;
    static constexpr i32 max_width = Threads * COLUMNS;
    static constexpr i32 blocks_per_sm = Threads == NARROW ? 4 : 1;
    static_assert(Threads == NARROW || Threads == WIDE);
    static_assert(warps * blocks_per_sm >= 16, "resident warps");
};

// two halves of scratch, so that one barrier per sum is enough
template <i32 Threads, i32 Sums>
FPDM_CONSTEXPR i32 reduce_bytes() {
    return 2 * ceil_div(Sums, 4) * 4 * (Threads / WARP) * i32(sizeof(float));
}

// sums over the block, the same bits in every thread. `parity` alternates between calls; scratch
// holds reduce_bytes() with the largest N.
template <i32 N>
FPDM_DEVICE void block_sum(float (&v)[N], i32 parity, i32 max_warps) {
    constexpr i32 packs = ceil_div(N, 4);
    FPDM_UNROLL
    for (i32 mask = WARP / 2; mask > 0; mask /= 2) {
        FPDM_UNROLL
        for (i32 i = 0; i < N; ++i) v[i] = add(v[i], shuffle_xor(v[i], mask));
    }
    const i32 warps = block_dim_x() / WARP;
    if (warps == 1) return;
    Pack16* scratch = reinterpret_cast<Pack16*>(shared_base()) + parity * packs * max_warps;
    if (thread_x() % WARP == 0) {
        FPDM_UNROLL
        for (i32 p = 0; p < packs; ++p) {
            float w[4];
            FPDM_UNROLL
            for (i32 i = 0; i < 4; ++i) w[i] = 4 * p + i < N ? v[(4 * p + i) % N] : 0.0f;
            st_shared(scratch + (thread_x() / WARP) * packs + p,
                      Pack16{bits_of_float(w[0]), bits_of_float(w[1]), bits_of_float(w[2]),
                             bits_of_float(w[3])});
        }
    }
    sync_block();
    FPDM_UNROLL
    for (i32 i = 0; i < N; ++i) v[i] = 0.0f;
    FPDM_NO_UNROLL
    for (i32 warp = 0; warp < warps; ++warp) {
        FPDM_UNROLL
        for (i32 p = 0; p < packs; ++p) {
            const Pack16 r = ld_shared(scratch + warp * packs + p);
            const u32 w[4] = {r.x, r.y, r.z, r.w};
            FPDM_UNROLL
            for (i32 i = 0; i < 4; ++i) {
                if (4 * p + i < N) v[(4 * p + i) % N] += float_of_bits(w[i]);
            }
        }
    }
}

// which rows and columns a thread works on
struct Place {
    i64 sample;
    i32 run;         // which run of tokens
    i32 first, end;  // its tokens
    i32 column;
    i32 columns;  // valid ones among the thread's 8; zero or less: none
};

FPDM_DEVICE Place place(i32 T, i32 D, i32 chunk) {
    const i32 runs = ceil_div(T, chunk);
    Place at;
    at.sample = block_x() / runs;
    at.run = block_x() % runs;
    at.first = at.run * chunk;
    at.end = at.first + chunk < T ? at.first + chunk : T;
    at.column = (block_y() * block_dim_x() + thread_x()) * COLUMNS;
    at.columns = D - at.column;
    return at;
}

}  // namespace fpdm
