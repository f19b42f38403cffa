// attention: out = softmax(q k^T / sqrt(K)) v per head, half in and out, on tensor cores.
//
// qkv (B,T,3D) is packed as (3,H,K), out (B,T,D) as (H,K). A block owns 32 Warps query rows of one
// head and walks over that head's keys in tiles of Keys rows in shared memory; with K = 72 and Keys
// = 256 all keys and values of a head are resident (72 KB). Scores, softmax and sums are float32;
// probabilities enter the second product as halves, times 2^14 so that small ones stay normal.
// A row's result depends on neither Warps nor Keys, bit for bit: the softmax is online over 32
// keys at a time.
//
// Launch: block = 32 Warps, grid = B H ceil(T / (32 Warps)). qkv and out 16-byte aligned.
#pragma once

#include <tiles.cuh>

namespace fpdm {

struct AttentionParams {  // "PPiif4x": 32 bytes
    const void* qkv;  // (B,T,3D) halves
    void* out;        // (B,T,D) halves
    i32 T;
    i32 H;
    float scale;  // log2(e) / sqrt(K)
};
static_assert(sizeof(AttentionParams) == 32);

constexpr float PROBABILITY_SHIFT = 14.0f;
constexpr float PROBABILITY_SCALE = 16384.0f;
FPDM_DEVICE float minus_infinity() { return float_of_bits(0xff800000u); }

template <i32 K, i32 Warps, i32 Keys>
struct AttentionTraits {
    static constexpr i32 threads = WARP * Warps;
    static constexpr i32 rows = WARP * Warps;  // queries per block
    static constexpr i32 tiles = 4;            // accumulators of 8 keys at a time
    static constexpr i32 step = 8 * tiles;
    static constexpr i32 smem = 2 * TileTraits<K>::bytes(Keys);
    static constexpr i32 blocks_per_sm = ceil_div(8, Warps);
    static constexpr i32 mmas = tiles * TileTraits<K>::steps + 2 * tiles * TileTraits<K>::outputs;
    static FPDM_CONSTEXPR i32 smem_bytes() { return smem; }
    static_assert(Keys % step == 0);
    static_assert(blocks_per_sm * smem <= SMEM_LIMIT, "8 resident warps");
};

// which rows of which head a block works on
struct HeadRows {
    i64 sample;
    i32 head;
    i32 first;
};

FPDM_DEVICE HeadRows head_rows(i32 T, i32 H, i32 rows) {
    const i32 groups = ceil_div(T, rows);
    const i32 index = block_x() / groups;
    return HeadRows{index / H, index % H, block_x() % groups * rows};
}

// c = scores of 8 Tiles keys from `key` on; keys beyond T get -inf
template <i32 Tiles>
FPDM_DEVICE void mask_keys(float (&c)[Tiles][8], i32 key, i32 T) {
    if (key + 8 * Tiles <= T) return;
    FPDM_UNROLL
    for (i32 n = 0; n < Tiles; ++n) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) {
            if (key + 8 * n + column_of(i) >= T) c[n][i] = minus_infinity();
        }
    }
}

// running maximum and sum of a lane's two rows; the sum is over the lane's own columns
struct Softmax {
    float peak[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.0f, 0.0f};

    // c becomes 2^(scale c - peak + shift); what was summed before must be multiplied by `decay`
    template <i32 Tiles>
    FPDM_DEVICE void update(float (&c)[Tiles][8], float scale, float shift, float (&decay)[2]) {
        float offset[2];
        FPDM_UNROLL
        for (i32 r = 0; r < 2; ++r) {
            float top = minus_infinity();
            FPDM_UNROLL
            for (i32 n = 0; n < Tiles; ++n) {
                top = max(top, max(max(c[n][2 * r], c[n][2 * r + 1]),
                                   max(c[n][2 * r + 4], c[n][2 * r + 5])));
            }
            top = max(top, shuffle_xor(top, 2));
            const float now = max(peak[r], top * scale);
            // all scores so far are -inf: any finite offset leaves their weights zero
            const float finite = now == minus_infinity() ? 0.0f : now;
            decay[r] = exp2_flush(peak[r] - finite);
            offset[r] = shift - finite;
            peak[r] = now;
            sum[r] *= decay[r];
        }
        FPDM_UNROLL
        for (i32 n = 0; n < Tiles; ++n) {
            FPDM_UNROLL
            for (i32 i = 0; i < 8; ++i) {
                c[n][i] = exp2_flush(fma(c[n][i], scale, offset[row_of(i)]));
                sum[row_of(i)] += c[n][i];
            }
        }
    }

    FPDM_DEVICE float total(i32 r) const { return sum[r] + shuffle_xor(sum[r], 2); }
};

template <i32 N>
FPDM_DEVICE void scale_rows(float (&c)[N][8], const float (&factor)[2]) {
    FPDM_UNROLL
    for (i32 n = 0; n < N; ++n) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) c[n][i] *= factor[row_of(i)];
    }
}

template <i32 K, i32 Warps, i32 Keys>
FPDM_KERNEL void FPDM_BOUNDS(WARP* Warps, AttentionTraits<K, Warps, Keys>::blocks_per_sm)
    attention_kernel(const AttentionParams p) {
    using Traits = AttentionTraits<K, Warps, Keys>;
    using Tile = TileTraits<K>;
    half_t* keys = reinterpret_cast<half_t*>(shared_base());
    half_t* values = keys + Keys * Tile::stride;
    const HeadRows at = head_rows(p.T, p.H, Traits::rows);
    const i64 D = i64(p.H) * K, pitch = 3 * D;
    const half_t* head = static_cast<const half_t*>(p.qkv) + at.sample * p.T * pitch + at.head * K;
    const i32 row = at.first + thread_x() / WARP * WARP + warp_row();

    Pack8 q[K / 4];
    load_row<K>(head + row * pitch, row < p.T, q);
    float out[Tile::outputs][8] = {};
    Softmax softmax;

    FPDM_NO_UNROLL
    for (i32 start = 0; start < p.T; start += Keys) {
        const i32 valid = p.T - start < Keys ? p.T - start : Keys;
        const i32 filled = ceil_div(valid, Traits::step) * Traits::step;
        if (start > 0) sync_block();
        load_tile<K, Traits::threads>(keys, head + D + start * pitch, pitch, valid, filled);
        load_tile<K, Traits::threads>(values, head + 2 * D + start * pitch, pitch, valid, filled);
        sync_block();
        FPDM_NO_UNROLL
        for (i32 key = 0; key < filled; key += Traits::step) {
            float c[Traits::tiles][8] = {}, decay[2];
            dot_rows<K>(q, keys + key * Tile::stride, c);
            mask_keys(c, start + key, p.T);
            softmax.update(c, p.scale, PROBABILITY_SHIFT, decay);
            scale_rows(out, decay);
            Pack8 weights[2 * Traits::tiles];
            FPDM_UNROLL
            for (i32 n = 0; n < Traits::tiles; ++n) {
                to_operand(c[n], weights[2 * n], weights[2 * n + 1]);
            }
            add_rows<K>(weights, values + key * Tile::stride, out);
        }
    }
    const float factor[2] = {reciprocal(softmax.total(0)), reciprocal(softmax.total(1))};
    half_t* dst = static_cast<half_t*>(p.out) + (at.sample * p.T + row) * D + at.head * K;
    store_row<K>(out, factor, dst, row < p.T);
}

}  // namespace fpdm
