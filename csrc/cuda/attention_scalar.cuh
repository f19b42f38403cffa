// attention and its backward without tensor cores: float32 throughout, elements of type C (half or
// float), any head size up to 128, any alignment. Equations as in attention.cuh and
// attention_backward.cuh; parameters and launch order too, but the statistics are a row's largest
// product, delta and one over the softmax sum: the logarithm of a sum is too coarse for float32.
//
// A block owns Edge rows of one head and walks over tiles of Edge rows of the other side. Thread
// (y, x) of 16 x 16 has the products of rows y + 16 r with rows x + 16 c of the tile; after they
// went through shared memory, rows y + 16 r and columns x + 16 s of the result.
//
// Launch: block = 256, grid = B H ceil(T / Edge), Edge from the traits.
#pragma once

#include <attention_backward.cuh>

namespace fpdm {

constexpr i32 SIDE = 16;

// Operands: how many tiles of Edge rows lie in shared memory beside the products
template <i32 K, i32 Operands>
struct ScalarAttentionTraits {
    static constexpr i32 units = ceil_div(K, 4);
    static constexpr i32 stride = 4 * (units % 2 == 0 ? units + 1 : units);  // floats, bank by bank
    static FPDM_CONSTEXPR i32 bytes(i32 edge) {
        return (Operands * edge * stride + edge * (edge + 4)) * i32(sizeof(float));
    }
    // within the 64 KB of sm_75 too
    static FPDM_CONSTEXPR i32 smem_bytes() { return bytes(bytes(64) <= 64 * 1024 ? 64 : 32); }
    static constexpr i32 threads = SIDE * SIDE;
    static constexpr i32 blocks_per_sm = 1;
    static constexpr i32 slices = ceil_div(K, SIDE);
    static_assert(K >= 1 && K <= 128);
};

template <i32 K, i32 Operands>
struct ScalarAttention : ScalarAttentionTraits<K, Operands> {
    using Base = ScalarAttentionTraits<K, Operands>;
    static constexpr i32 smem = Base::smem_bytes();
    static constexpr i32 edge = smem == Base::bytes(64) ? 64 : 32;  // rows per block and per tile
    static constexpr i32 per = edge / SIDE;                         // rows per thread
    static constexpr i32 weights = edge + 4;                        // stride of the products
    static_assert(smem <= SMEM_LIMIT);
};

template <i32 K>
using ScalarForward = ScalarAttention<K, 3>;
template <i32 K>
using ScalarBackward = ScalarAttention<K, 4>;

FPDM_DEVICE i32 tile_x() { return thread_x() % SIDE; }
FPDM_DEVICE i32 tile_y() { return thread_x() / SIDE; }

// Edge rows of K elements, `pitch` apart, as floats; zeros beyond `valid` rows and K columns
template <i32 K, class S, class C>
FPDM_DEVICE void fill(float* tile, const C* src, i64 pitch, i32 valid) {
    constexpr i32 width = S::units * 4;
    FPDM_NO_UNROLL
    for (i32 index = thread_x(); index < S::edge * width; index += S::threads) {
        const i32 row = index / width, column = index % width;
        float v = 0.0f;
        if (row < valid && column < K) v = widen(ld_global(src + row * pitch + column));
        st_shared(tile + row * S::stride + column, v);
    }
}

FPDM_DEVICE void read4(const float* p, float (&v)[4]) {
    const Pack16 r = ld_shared(reinterpret_cast<const Pack16*>(p));
    v[0] = float_of_bits(r.x);
    v[1] = float_of_bits(r.y);
    v[2] = float_of_bits(r.z);
    v[3] = float_of_bits(r.w);
}

// c[r][k] = row y + 16 r of a times row x + 16 k of b
template <class S>
FPDM_DEVICE void multiply(const float* a, const float* b, float (&c)[S::per][S::per]) {
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) {
        FPDM_UNROLL
        for (i32 k = 0; k < S::per; ++k) c[r][k] = 0.0f;
    }
    FPDM_NO_UNROLL
    for (i32 unit = 0; unit < S::units; ++unit) {
        float u[S::per][4], v[S::per][4];
        FPDM_UNROLL
        for (i32 r = 0; r < S::per; ++r) {
            read4(a + (tile_y() + SIDE * r) * S::stride + 4 * unit, u[r]);
            read4(b + (tile_x() + SIDE * r) * S::stride + 4 * unit, v[r]);
        }
        FPDM_UNROLL
        for (i32 r = 0; r < S::per; ++r) {
            FPDM_UNROLL
            for (i32 k = 0; k < S::per; ++k) {
                FPDM_UNROLL
                for (i32 i = 0; i < 4; ++i) c[r][k] = fma(u[r][i], v[k][i], c[r][k]);
            }
        }
    }
}

// c[r] = row y + 16 r of a times the same row of b, in the order of multiply: equal operands give
// equal results, so dP - delta is 0 where there is one key
template <class S>
FPDM_DEVICE void multiply_rows(const float* a, const float* b, float (&c)[S::per]) {
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) {
        const i32 row = (tile_y() + SIDE * r) * S::stride;
        c[r] = 0.0f;
        FPDM_NO_UNROLL
        for (i32 unit = 0; unit < S::units; ++unit) {
            float u[4], v[4];
            read4(a + row + 4 * unit, u);
            read4(b + row + 4 * unit, v);
            FPDM_UNROLL
            for (i32 i = 0; i < 4; ++i) c[r] = fma(u[i], v[i], c[r]);
        }
    }
}

// out[r][s] += sum over j of c[y + 16 r][j] b[j][x + 16 s]; c goes through shared memory
template <i32 K, class S>
FPDM_DEVICE void accumulate(const float (&c)[S::per][S::per], float* products, const float* b,
                            float (&out)[S::per][S::slices]) {
    sync_block();
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) {
        FPDM_UNROLL
        for (i32 k = 0; k < S::per; ++k) {
            const i32 row = tile_y() + SIDE * r, column = tile_x() + SIDE * k;
            st_shared(products + row * S::weights + column, c[r][k]);
        }
    }
    sync_block();
    FPDM_NO_UNROLL
    for (i32 j = 0; j < S::edge; j += 4) {
        float w[S::per][4];
        FPDM_UNROLL
        for (i32 r = 0; r < S::per; ++r) {
            read4(products + (tile_y() + SIDE * r) * S::weights + j, w[r]);
        }
        FPDM_UNROLL
        for (i32 i = 0; i < 4; ++i) {
            FPDM_UNROLL
            for (i32 s = 0; s < S::slices; ++s) {
                const i32 column = tile_x() + SIDE * s;
                const float v = column < K ? ld_shared(b + (j + i) * S::stride + column) : 0.0f;
                FPDM_UNROLL
                for (i32 r = 0; r < S::per; ++r) out[r][s] = fma(w[r][i], v, out[r][s]);
            }
        }
    }
}

// over the 16 threads that share a row
FPDM_DEVICE float row_max(float v) {
    FPDM_UNROLL
    for (i32 mask = SIDE / 2; mask > 0; mask /= 2) v = max(v, shuffle_xor(v, mask));
    return v;
}

FPDM_DEVICE float row_sum(float v) {
    FPDM_UNROLL
    for (i32 mask = SIDE / 2; mask > 0; mask /= 2) v = add(v, shuffle_xor(v, mask));
    return v;
}

template <class S>
struct ScalarSoftmax {
    float peak[S::per], sum[S::per];

    FPDM_DEVICE void start() {
        FPDM_UNROLL
        for (i32 r = 0; r < S::per; ++r) {
            peak[r] = minus_infinity();
            sum[r] = 0.0f;
        }
    }

    // c, products with `valid` keys, becomes 2^(scale (c - peak)): the largest is 1 exactly. out,
    // summed before, decays
    FPDM_DEVICE void update(float (&c)[S::per][S::per], float scale, i32 valid,
                            float (&out)[S::per][S::slices]) {
        FPDM_UNROLL
        for (i32 r = 0; r < S::per; ++r) {
            float top = minus_infinity(), added = 0.0f;
            FPDM_UNROLL
            for (i32 k = 0; k < S::per; ++k) {
                if (tile_x() + SIDE * k >= valid) c[r][k] = minus_infinity();
                top = max(top, c[r][k]);
            }
            const float now = max(peak[r], row_max(top));
            const float finite = now == minus_infinity() ? 0.0f : now;
            const float decay = precise_exp2((peak[r] - finite) * scale);
            peak[r] = now;
            FPDM_UNROLL
            for (i32 k = 0; k < S::per; ++k) {
                c[r][k] = precise_exp2((c[r][k] - finite) * scale);
                added += c[r][k];
            }
            sum[r] = fma(sum[r], decay, row_sum(added));
            FPDM_UNROLL
            for (i32 s = 0; s < S::slices; ++s) out[r][s] *= decay;
        }
    }
};

// rows y + 16 r, columns x + 16 s, times a factor per row
template <i32 K, class S, class C>
FPDM_DEVICE void store_tile(const float (&out)[S::per][S::slices], const float (&factor)[S::per],
                            C* dst, i64 pitch, i32 valid) {
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) {
        FPDM_UNROLL
        for (i32 s = 0; s < S::slices; ++s) {
            const i32 row = tile_y() + SIDE * r, column = tile_x() + SIDE * s;
            C narrowed;
            narrow(out[r][s] * factor[r], narrowed);
            if (row < valid && column < K) st_global(dst + row * pitch + column, narrowed);
        }
    }
}

template <class C, i32 K>
FPDM_KERNEL void FPDM_BOUNDS(SIDE* SIDE, 1) scalar_attention_kernel(const AttentionParams p) {
    using S = ScalarForward<K>;
    float* queries = reinterpret_cast<float*>(shared_base());
    float* keys = queries + S::edge * S::stride;
    float* values = keys + S::edge * S::stride;
    float* products = values + S::edge * S::stride;
    const HeadRows at = head_rows(p.T, p.H, S::edge);
    const i64 D = i64(p.H) * K, pitch = 3 * D;
    const C* head = static_cast<const C*>(p.qkv) + at.sample * p.T * pitch + at.head * K;
    float out[S::per][S::slices] = {}, c[S::per][S::per], factor[S::per];
    ScalarSoftmax<S> softmax;
    softmax.start();

    fill<K, S>(queries, head + at.first * pitch, pitch, p.T - at.first);
    FPDM_NO_UNROLL
    for (i32 start = 0; start < p.T; start += S::edge) {
        sync_block();
        fill<K, S>(keys, head + D + start * pitch, pitch, p.T - start);
        fill<K, S>(values, head + 2 * D + start * pitch, pitch, p.T - start);
        sync_block();
        multiply<S>(queries, keys, c);
        softmax.update(c, p.scale, p.T - start, out);
        accumulate<K, S>(c, products, values, out);
    }
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) factor[r] = precise_reciprocal(softmax.sum[r]);
    C* dst = static_cast<C*>(p.out) + (at.sample * p.T + at.first) * D + at.head * K;
    store_tile<K, S>(out, factor, dst, D, p.T - at.first);
}

template <class C, i32 K>
FPDM_KERNEL void FPDM_BOUNDS(SIDE* SIDE, 1)
    scalar_attention_dq_kernel(const AttentionBackwardParams p) {
    using S = ScalarBackward<K>;
    float* queries = reinterpret_cast<float*>(shared_base());
    float* grads = queries + S::edge * S::stride;
    float* keys = grads + S::edge * S::stride;
    float* values = keys + S::edge * S::stride;
    float* products = values + S::edge * S::stride;
    const HeadRows at = head_rows(p.T, p.H, S::edge);
    const i64 D = i64(p.H) * K, pitch = 3 * D;
    const i64 packed = at.sample * p.T * pitch + at.head * K;
    const i64 plain = (at.sample * p.T + at.first) * D + at.head * K;
    const C* head = static_cast<const C*>(p.qkv) + packed;
    const i32 rows = p.T - at.first;
    float dq[S::per][S::slices] = {}, c[S::per][S::per], dp[S::per][S::per];
    float delta[S::per], factor[S::per];
    ScalarSoftmax<S> softmax;
    softmax.start();

    fill<K, S>(queries, head + at.first * pitch, pitch, rows);
    fill<K, S>(grads, static_cast<const C*>(p.dy) + plain, D, rows);
    fill<K, S>(values, static_cast<const C*>(p.y) + plain, D, rows);
    sync_block();
    multiply_rows<S>(grads, values, delta);
    FPDM_NO_UNROLL
    for (i32 start = 0; start < p.T; start += S::edge) {
        sync_block();
        fill<K, S>(keys, head + D + start * pitch, pitch, p.T - start);
        fill<K, S>(values, head + 2 * D + start * pitch, pitch, p.T - start);
        sync_block();
        multiply<S>(queries, keys, c);
        softmax.update(c, p.scale2, p.T - start, dq);
        multiply<S>(grads, values, dp);
        FPDM_UNROLL
        for (i32 r = 0; r < S::per; ++r) {
            FPDM_UNROLL
            for (i32 k = 0; k < S::per; ++k) c[r][k] *= dp[r][k] - delta[r];
        }
        accumulate<K, S>(c, products, keys, dq);
    }
    float* statistics = p.statistics + (at.sample * p.H + at.head) * 3 * p.T + at.first;
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) {
        const i32 row = tile_y() + SIDE * r;
        const float inverse_sum = precise_reciprocal(softmax.sum[r]);
        factor[r] = p.scale * inverse_sum;
        if (tile_x() == 0 && row < rows) {
            st_global(statistics + row, softmax.peak[r]);
            st_global(statistics + p.T + row, delta[r]);
            st_global(statistics + 2 * p.T + row, inverse_sum);
        }
    }
    store_tile<K, S>(dq, factor, static_cast<C*>(p.dqkv) + packed + at.first * pitch, pitch, rows);
}

// rows are keys, columns queries; a query beyond T gets probability 0
template <class C, i32 K>
FPDM_KERNEL void FPDM_BOUNDS(SIDE* SIDE, 1)
    scalar_attention_dkv_kernel(const AttentionBackwardParams p) {
    using S = ScalarBackward<K>;
    float* keys = reinterpret_cast<float*>(shared_base());
    float* values = keys + S::edge * S::stride;
    float* queries = values + S::edge * S::stride;
    float* grads = queries + S::edge * S::stride;
    float* products = grads + S::edge * S::stride;
    const HeadRows at = head_rows(p.T, p.H, S::edge);
    const i64 D = i64(p.H) * K, pitch = 3 * D;
    const i64 packed = at.sample * p.T * pitch + at.head * K;
    const C* head = static_cast<const C*>(p.qkv) + packed;
    const C* dy = static_cast<const C*>(p.dy) + at.sample * p.T * D + at.head * K;
    C* dhead = static_cast<C*>(p.dqkv) + packed + at.first * pitch;
    const float* statistics = p.statistics + (at.sample * p.H + at.head) * 3 * p.T;
    const i32 rows = p.T - at.first;
    float dk[S::per][S::slices] = {}, dv[S::per][S::slices] = {};
    float c[S::per][S::per], dp[S::per][S::per], ones[S::per], scales[S::per];

    fill<K, S>(keys, head + D + at.first * pitch, pitch, rows);
    fill<K, S>(values, head + 2 * D + at.first * pitch, pitch, rows);
    FPDM_NO_UNROLL
    for (i32 start = 0; start < p.T; start += S::edge) {
        sync_block();
        fill<K, S>(queries, head + start * pitch, pitch, p.T - start);
        fill<K, S>(grads, dy + start * D, D, p.T - start);
        sync_block();
        multiply<S>(keys, queries, c);
        multiply<S>(values, grads, dp);
        FPDM_UNROLL
        for (i32 k = 0; k < S::per; ++k) {
            const i32 query = start + tile_x() + SIDE * k;
            const bool inside = query < p.T;
            const float peak = inside ? ld_global(statistics + query) : 0.0f;
            const float delta = inside ? ld_global(statistics + p.T + query) : 0.0f;
            const float weight = inside ? ld_global(statistics + 2 * p.T + query) : 0.0f;
            FPDM_UNROLL
            for (i32 r = 0; r < S::per; ++r) {
                c[r][k] = weight * precise_exp2((c[r][k] - peak) * p.scale2);
                dp[r][k] = c[r][k] * (dp[r][k] - delta);
                // an infinite key or value makes NaN of a query of zeros
                if (!inside) c[r][k] = dp[r][k] = 0.0f;
            }
        }
        accumulate<K, S>(c, products, grads, dv);
        accumulate<K, S>(dp, products, queries, dk);
    }
    FPDM_UNROLL
    for (i32 r = 0; r < S::per; ++r) {
        ones[r] = 1.0f;
        scales[r] = p.scale;
    }
    store_tile<K, S>(dk, scales, dhead + D, pitch, rows);
    store_tile<K, S>(dv, ones, dhead + 2 * D, pitch, rows);
}

}  // namespace fpdm
