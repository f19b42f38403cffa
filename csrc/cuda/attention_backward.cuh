// attention backward: dq, dk, dv from dy, qkv and y, half in and out, on tensor cores. With P the
// probabilities, dP = dy v^T, delta = rowsum(dy y) and dS = P (dP - delta) / sqrt(K):
//
//     dv = P^T dy,   dq = dS k,   dk = dS^T q
//
// attention_dq: blocks of query rows over tiles of keys and values, online like the forward; writes
//     dq and, per query, what the second kernel needs (its statistics).
// attention_dkv: blocks of key rows over tiles of queries and dy; first dv, then dk with the scores
//     computed again, since accumulators of both would not fit the registers.
//
// dP - delta is float32. P and dS enter their products as halves: P times 2^14 as in the forward, dS
// times a power of two per row of the result that keeps it below 2^14, so that a small dy, v or P
// costs no bits and no finite dS overflows. For dq that power follows the largest |dS| of the query
// so far, as the softmax follows its peak. For dk it is known beforehand: P <= 1 and, with the v of
// two keys,
//
//     |dP - delta| <= max|v| max_t sum|dy_t| + max_t |delta_t|
//
// of which dS keeps all its bits down to 2^-27.
//
// Launch, both: block = 32 Warps, grid = B H ceil(T / (32 Warps)); dq first. 16-byte aligned.
#pragma once

#include <attention.cuh>

namespace fpdm {

struct AttentionBackwardParams {  // "PPPPPiiff": 56 bytes
    const void* dy;     // (B,T,D) halves
    const void* qkv;    // (B,T,3D) halves
    const void* y;      // (B,T,D) halves, the forward's result
    void* dqkv;         // (B,T,3D) halves
    float* statistics;  // (B,H,3,T): log2 of the softmax sum, delta, sum of |dy|; dq writes them
    i32 T;
    i32 H;
    float scale2;  // log2(e) / sqrt(K)
    float scale;   // 1 / sqrt(K)
};
static_assert(sizeof(AttentionBackwardParams) == 56);

template <i32 K, i32 Warps, i32 Keys>
struct AttentionDqTraits {
    static constexpr i32 threads = WARP * Warps;
    static constexpr i32 rows = WARP * Warps;
    static constexpr i32 tiles = 2;
    static constexpr i32 step = 8 * tiles;
    static constexpr i32 smem = 2 * TileTraits<K>::bytes(Keys);
    static constexpr i32 blocks_per_sm = ceil_div(8, Warps);
    static constexpr i32 mmas =
        2 * tiles * TileTraits<K>::steps + 2 * tiles * TileTraits<K>::outputs;
    static FPDM_CONSTEXPR i32 smem_bytes() { return smem; }
    static_assert(Keys % step == 0);
    static_assert(blocks_per_sm * smem <= SMEM_LIMIT, "8 resident warps");
};

// Queries: rows of a tile of queries and dy; their log2 sums and deltas lie beside them
template <i32 K, i32 Warps, i32 Queries>
struct AttentionDkvTraits {
    static constexpr i32 threads = WARP * Warps;
    static constexpr i32 rows = WARP * Warps;
    static constexpr i32 tiles_dv = 4;
    static constexpr i32 tiles_dk = 2;
    static constexpr i32 step = 8 * tiles_dv;
    static constexpr i32 smem =
        2 * TileTraits<K>::bytes(Queries) + 2 * Queries * i32(sizeof(float));
    static constexpr i32 blocks_per_sm = ceil_div(8, Warps);
    static constexpr i32 mmas =
        tiles_dv * (TileTraits<K>::steps + 2 * TileTraits<K>::outputs) +
        tiles_dk * (2 * TileTraits<K>::steps + 2 * TileTraits<K>::outputs);
    static FPDM_CONSTEXPR i32 smem_bytes() { return smem; }
    static_assert(Queries % step == 0);
    static_assert(blocks_per_sm * smem <= SMEM_LIMIT, "8 resident warps");
};

// a power of two f, within 2^100, with f v in [1/2, 1)
FPDM_DEVICE float inverse_power(float v) {
    const float least = float_of_bits((127 - 99) << 23), most = float_of_bits((127 + 99) << 23);
    const float bounded = min(max(v, least), most);
    const u32 exponent = bits_of_float(bounded) >> 23;  // 2^(exponent - 127) <= v
    return float_of_bits((253 - exponent) << 23);
}

// 1 / f for a power of two
FPDM_DEVICE float inverse(float f) { return float_of_bits((254 << 23) - bits_of_float(f)); }

// 2^14 times that power
FPDM_DEVICE float half_scale(float v) { return PROBABILITY_SCALE * inverse_power(v); }

// sum of a b and of |a| over a row in operand layout
template <i32 Steps>
FPDM_DEVICE void row_sums(const Pack8 (&a)[Steps], const Pack8 (&b)[Steps], float& dot,
                          float& size) {
    dot = 0.0f;
    size = 0.0f;
    FPDM_UNROLL
    for (i32 s = 0; s < Steps; ++s) {
        const u32 words[2][2] = {{a[s].x, b[s].x}, {a[s].y, b[s].y}};
        FPDM_UNROLL
        for (i32 w = 0; w < 2; ++w) {
            const float first = low_half(words[w][0]), second = high_half(words[w][0]);
            dot = fma(first, low_half(words[w][1]), dot);
            dot = fma(second, high_half(words[w][1]), dot);
            size += abs(first) + abs(second);
        }
    }
}

// largest |a| of a row in operand layout
template <i32 Steps>
FPDM_DEVICE float largest(const Pack8 (&a)[Steps]) {
    float top = 0.0f;
    FPDM_UNROLL
    for (i32 s = 0; s < Steps; ++s) {
        top = max(top, max(max(abs(low_half(a[s].x)), abs(high_half(a[s].x))),
                           max(abs(low_half(a[s].y)), abs(high_half(a[s].y)))));
    }
    return top;
}

// `factor` of a row shrinks to half_scale of the largest |c| so far; `decay` with it
template <i32 Tiles>
FPDM_DEVICE void fit_rows(const float (&c)[Tiles][8], float (&factor)[2], float (&decay)[2]) {
    FPDM_UNROLL
    for (i32 r = 0; r < 2; ++r) {
        float top = 0.0f;
        FPDM_UNROLL
        for (i32 n = 0; n < Tiles; ++n) {
            top = max(top, max(max(abs(c[n][2 * r]), abs(c[n][2 * r + 1])),
                               max(abs(c[n][2 * r + 4]), abs(c[n][2 * r + 5]))));
        }
        const float now = min(factor[r], half_scale(max(top, shuffle_xor(top, 2))));
        decay[r] *= now * inverse(factor[r]);
        factor[r] = now;
    }
}

template <i32 K, i32 Warps, i32 Keys>
FPDM_KERNEL void FPDM_BOUNDS(WARP* Warps, AttentionDqTraits<K, Warps, Keys>::blocks_per_sm)
    attention_dq_kernel(const AttentionBackwardParams p) {
    using Traits = AttentionDqTraits<K, Warps, Keys>;
    using Tile = TileTraits<K>;
    half_t* keys = reinterpret_cast<half_t*>(shared_base());
    half_t* values = keys + Keys * Tile::stride;
    const HeadRows at = head_rows(p.T, p.H, Traits::rows);
    const i64 D = i64(p.H) * K, pitch = 3 * D;
    const i64 packed = at.sample * p.T * pitch + at.head * K;
    const half_t* head = static_cast<const half_t*>(p.qkv) + packed;
    const i32 row = at.first + thread_x() / WARP * WARP + warp_row();
    const bool valid_row = row < p.T;
    const i64 narrow_row = (at.sample * p.T + row) * D + at.head * K;

    Pack8 q[K / 4], g[K / 4];
    float dot, size, delta[2], factor[2] = {half_scale(0.0f), half_scale(0.0f)};
    load_row<K>(static_cast<const half_t*>(p.dy) + narrow_row, valid_row, g);
    load_row<K>(static_cast<const half_t*>(p.y) + narrow_row, valid_row, q);
    row_sums(g, q, dot, size);
    load_row<K>(head + row * pitch, valid_row, q);
    to_accumulator_rows(dot, delta);
    float dq[Tile::outputs][8] = {};
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
            float c[Traits::tiles][8] = {}, dp[Traits::tiles][8] = {}, decay[2];
            dot_rows<K>(q, keys + key * Tile::stride, c);
            dot_rows<K>(g, values + key * Tile::stride, dp);
            mask_keys(c, start + key, p.T);
            softmax.update(c, p.scale2, 0.0f, decay);
            FPDM_UNROLL
            for (i32 n = 0; n < Traits::tiles; ++n) {
                FPDM_UNROLL
                for (i32 i = 0; i < 8; ++i) c[n][i] *= dp[n][i] - delta[row_of(i)];
            }
            fit_rows(c, factor, decay);
            scale_rows(dq, decay);
            scale_rows(c, factor);
            Pack8 ds[2 * Traits::tiles];
            FPDM_UNROLL
            for (i32 n = 0; n < Traits::tiles; ++n) to_operand(c[n], ds[2 * n], ds[2 * n + 1]);
            add_rows<K>(ds, keys + key * Tile::stride, dq);
        }
    }

    float* statistics = p.statistics + (at.sample * p.H + at.head) * 3 * p.T;
    float undo[2];
    FPDM_UNROLL
    for (i32 r = 0; r < 2; ++r) {
        const float total = softmax.total(r);
        undo[r] = p.scale * reciprocal(total) * inverse(factor[r]);
        const i32 mine = row - operand_row() + (lane() & 1) + 2 * r + (upper() ? 4 : 0);
        if ((lane() & 2) == 0 && mine < p.T) {
            st_global(statistics + mine, softmax.peak[r] + log2(total));
        }
    }
    if (valid_row) {
        st_global(statistics + p.T + row, dot);
        st_global(statistics + 2 * p.T + row, size);
    }
    store_row<K>(dq, undo, static_cast<half_t*>(p.dqkv) + packed + row * pitch, valid_row);
}

// c becomes 2^(scale c - log_sum + 14), log_sum per column
template <i32 Tiles>
FPDM_DEVICE void weigh_columns(float (&c)[Tiles][8], const float* log_sums, float scale) {
    FPDM_UNROLL
    for (i32 n = 0; n < Tiles; ++n) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) {
            const float log_sum = ld_shared(log_sums + 8 * n + column_of(i));
            c[n][i] = exp2_flush(fma(c[n][i], scale, PROBABILITY_SHIFT - log_sum));
        }
    }
}

// c becomes 0 for the queries from `left` on: of an infinite key or value their zeros make NaN
template <i32 Tiles>
FPDM_DEVICE void drop_columns(float (&c)[Tiles][8], i32 left) {
    if (8 * Tiles <= left) return;
    FPDM_UNROLL
    for (i32 n = 0; n < Tiles; ++n) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) {
            if (8 * n + column_of(i) >= left) c[n][i] = 0.0f;
        }
    }
}

template <i32 K, i32 Warps, i32 Queries>
FPDM_KERNEL void FPDM_BOUNDS(WARP* Warps, AttentionDkvTraits<K, Warps, Queries>::blocks_per_sm)
    attention_dkv_kernel(const AttentionBackwardParams p) {
    using Traits = AttentionDkvTraits<K, Warps, Queries>;
    using Tile = TileTraits<K>;
    half_t* queries = reinterpret_cast<half_t*>(shared_base());
    half_t* grads = queries + Queries * Tile::stride;
    float* log_sums = reinterpret_cast<float*>(grads + Queries * Tile::stride);
    float* deltas = log_sums + Queries;
    const HeadRows at = head_rows(p.T, p.H, Traits::rows);
    const i64 D = i64(p.H) * K, pitch = 3 * D;
    const i64 packed = at.sample * p.T * pitch + at.head * K;
    const half_t* head = static_cast<const half_t*>(p.qkv) + packed;
    const half_t* dy = static_cast<const half_t*>(p.dy) + at.sample * p.T * D + at.head * K;
    half_t* dhead = static_cast<half_t*>(p.dqkv) + packed;
    const float* statistics = p.statistics + (at.sample * p.H + at.head) * 3 * p.T;
    const i32 row = at.first + thread_x() / WARP * WARP + warp_row();
    const bool valid_row = row < p.T;

    // a tile of queries, dy and their statistics; zeros beyond T
    const auto load = [&](i32 start, i32 valid, i32 filled) {
        load_tile<K, Traits::threads>(queries, head + start * pitch, pitch, valid, filled);
        load_tile<K, Traits::threads>(grads, dy + start * D, D, valid, filled);
        FPDM_NO_UNROLL
        for (i32 t = thread_x(); t < filled; t += Traits::threads) {
            const bool inside = t < valid;
            st_shared(log_sums + t, inside ? ld_global(statistics + start + t) : 0.0f);
            st_shared(deltas + t, inside ? ld_global(statistics + p.T + start + t) : 0.0f);
        }
    };

    Pack8 k[K / 4];
    load_row<K>(head + D + row * pitch, valid_row, k);
    float out[Tile::outputs][8] = {};

    FPDM_NO_UNROLL
    for (i32 start = 0; start < p.T; start += Queries) {
        const i32 valid = p.T - start < Queries ? p.T - start : Queries;
        const i32 filled = ceil_div(valid, Traits::step) * Traits::step;
        if (start > 0) sync_block();
        load(start, valid, filled);
        sync_block();
        FPDM_NO_UNROLL
        for (i32 query = 0; query < filled; query += Traits::step) {
            float c[Traits::tiles_dv][8] = {};
            dot_rows<K>(k, queries + query * Tile::stride, c);
            weigh_columns(c, log_sums + query, p.scale2);
            drop_columns(c, valid - query);
            Pack8 weights[2 * Traits::tiles_dv];
            FPDM_UNROLL
            for (i32 n = 0; n < Traits::tiles_dv; ++n) {
                to_operand(c[n], weights[2 * n], weights[2 * n + 1]);
            }
            add_rows<K>(weights, grads + query * Tile::stride, out);
        }
    }
    const float unshift = 1.0f / PROBABILITY_SCALE;
    const float undo_dv[2] = {unshift, unshift};
    store_row<K>(out, undo_dv, dhead + 2 * D + row * pitch, valid_row);

    Pack8 v[K / 4];
    load_row<K>(head + 2 * D + row * pitch, valid_row, v);
    float size = 0.0f, most = 0.0f, widest[2];
    FPDM_NO_UNROLL
    for (i32 t = lane(); t < p.T; t += WARP) {
        most = max(most, abs(ld_global(statistics + p.T + t)));
        size = max(size, ld_global(statistics + 2 * p.T + t));
    }
    FPDM_UNROLL
    for (i32 mask = WARP / 2; mask > 0; mask /= 2) {
        most = max(most, shuffle_xor(most, mask));
        size = max(size, shuffle_xor(size, mask));
    }
    to_accumulator_rows(largest(v), widest);
    // one for both rows of a lane: at K = 80 there is no register for a second
    const float factor = inverse_power(fma(size, max(widest[0], widest[1]), most));
    FPDM_UNROLL
    for (i32 n = 0; n < Tile::outputs; ++n) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) out[n][i] = 0.0f;
    }
    FPDM_NO_UNROLL
    for (i32 start = 0; start < p.T; start += Queries) {
        const i32 valid = p.T - start < Queries ? p.T - start : Queries;
        const i32 filled = ceil_div(valid, Traits::step) * Traits::step;
        if (p.T > Queries) {  // otherwise all is there from before
            sync_block();
            load(start, valid, filled);
            sync_block();
        }
        FPDM_NO_UNROLL
        for (i32 query = 0; query < filled; query += 8 * Traits::tiles_dk) {
            float c[Traits::tiles_dk][8] = {}, dp[Traits::tiles_dk][8] = {};
            dot_rows<K>(k, queries + query * Tile::stride, c);
            dot_rows<K>(v, grads + query * Tile::stride, dp);
            weigh_columns(c, log_sums + query, p.scale2);
            FPDM_UNROLL
            for (i32 n = 0; n < Traits::tiles_dk; ++n) {
                FPDM_UNROLL
                for (i32 i = 0; i < 8; ++i) {
                    const float delta = ld_shared(deltas + query + 8 * n + column_of(i));
                    c[n][i] *= (dp[n][i] - delta) * factor;
                }
            }
            drop_columns(c, valid - query);
            Pack8 ds[2 * Traits::tiles_dk];
            FPDM_UNROLL
            for (i32 n = 0; n < Traits::tiles_dk; ++n) {
                to_operand(c[n], ds[2 * n], ds[2 * n + 1]);
            }
            add_rows<K>(ds, queries + query * Tile::stride, out);
        }
    }
    const float undo = p.scale * unshift * inverse(factor);
    const float undo_dk[2] = {undo, undo};
    store_row<K>(out, undo_dk, dhead + D + row * pitch, valid_row);
}

}  // namespace fpdm
