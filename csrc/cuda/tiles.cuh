// Tensor-core products of 32 rows per warp with tiles in shared memory, on mma.m8n8k4.
//
// A warp owns 32 rows, 8 per quad-pair; all quad-pairs multiply them with the same columns. In
// operand layout a lane holds one whole row, l % 4 + (4 if l >= 16) of its quad-pair. In
// accumulator layout it holds 4 of 8 columns of the rows (l & 1) + (4 if l >= 16) and 2 more:
// row_of(i) picks among the two. Products of K = 72 need 18 steps of k4 and no padding.
#pragma once

#include <elements.cuh>

namespace fpdm {

constexpr i32 QUAD_ROWS = 8;

// Rows of K halves in shared memory, read 16 bytes at a time by four rows at once: whole multiples
// of 16 bytes, and not of 64, or the four would meet in the same banks.
template <i32 K>
struct TileTraits {
    static constexpr i32 units = ceil_div(K, 8);
    static constexpr i32 stride = 8 * (units % 4 == 0 ? units + 1 : units);  // halves
    static constexpr i32 steps = K / 4;
    static constexpr i32 outputs = ceil_div(K, 8);  // accumulators of 8 columns
    static FPDM_CONSTEXPR i32 bytes(i32 rows) { return rows * stride * i32(sizeof(half_t)); }
    static_assert(K % 4 == 0, "mma.m8n8k4");
};

template <bool Whole>
struct PackChoice {
    using type = Pack16;
};
template <>
struct PackChoice<false> {
    using type = Pack8;
};

FPDM_DEVICE i32 lane() { return thread_x() % WARP; }
FPDM_DEVICE bool upper() { return lane() >= 16; }
FPDM_DEVICE i32 operand_row() { return lane() % 4 + (upper() ? 4 : 0); }
FPDM_DEVICE i32 warp_row() { return (lane() % 16) / 4 * QUAD_ROWS + operand_row(); }
FPDM_CONSTEXPR i32 row_of(i32 i) { return i / 2 % 2; }
FPDM_DEVICE i32 column_of(i32 i) { return (i & 4) + (lane() & 2) + (i & 1); }

FPDM_DEVICE Pack8 low(const Pack16& v) { return Pack8{v.x, v.y}; }
FPDM_DEVICE Pack8 high(const Pack16& v) { return Pack8{v.z, v.w}; }
FPDM_DEVICE Pack16 join(Pack8 a, Pack8 b) { return Pack16{a.x, a.y, b.x, b.y}; }

// the lane's row in operand layout, from global memory; zeros if not valid
template <i32 K>
FPDM_DEVICE void load_row(const half_t* row, bool valid, Pack8 (&a)[K / 4]) {
    FPDM_UNROLL
    for (i32 s = 0; s < K / 4; ++s) a[s] = Pack8{0, 0};
    if (!valid) return;
    if constexpr (K % 8 == 0) {
        FPDM_UNROLL
        for (i32 s = 0; s < K / 4; s += 2) {
            const Pack16 r = ld_global16(row + 4 * s);
            a[s] = low(r);
            a[s + 1] = high(r);
        }
    } else {
        FPDM_UNROLL
        for (i32 s = 0; s < K / 4; ++s) a[s] = ld_global8(row + 4 * s);
    }
}

// rows of K halves, `pitch` apart in global memory, into a tile; zeros from `valid` to `rows`
template <i32 K, i32 Threads>
FPDM_DEVICE void load_tile(half_t* tile, const half_t* src, i64 pitch, i32 valid, i32 rows) {
    using Part = typename PackChoice<K % 8 == 0>::type;  // rows are that much aligned
    constexpr i32 width = sizeof(Part) / sizeof(half_t), parts = K / width;
    constexpr i32 batch = 3;  // reads in flight per thread
    FPDM_NO_UNROLL
    for (i32 first = thread_x(); first < rows * parts; first += batch * Threads) {
        Part v[batch] = {};
        FPDM_UNROLL
        for (i32 j = 0; j < batch; ++j) {
            const i32 row = (first + j * Threads) / parts, part = (first + j * Threads) % parts;
            const half_t* from = src + row * pitch + part * width;
            if (row < valid) v[j] = ld_global(reinterpret_cast<const Part*>(from));
        }
        FPDM_UNROLL
        for (i32 j = 0; j < batch; ++j) {
            const i32 row = (first + j * Threads) / parts, part = (first + j * Threads) % parts;
            half_t* to = tile + row * TileTraits<K>::stride + part * width;
            if (row < rows) st_shared(reinterpret_cast<Part*>(to), v[j]);
        }
    }
}

// c += a tile^T for 8 Tiles rows of the tile: c[n] has their columns 8 n .. 8 n + 7
template <i32 K, i32 Tiles>
FPDM_DEVICE void dot_rows(const Pack8 (&a)[K / 4], const half_t* tile, float (&c)[Tiles][8]) {
    constexpr i32 stride = TileTraits<K>::stride;
    const half_t* row = tile + operand_row() * stride;
    FPDM_UNROLL
    for (i32 s = 0; s + 1 < K / 4; s += 2) {
        FPDM_UNROLL
        for (i32 n = 0; n < Tiles; ++n) {
            const half_t* from = row + n * 8 * stride + 4 * s;
            const Pack16 b = ld_shared(reinterpret_cast<const Pack16*>(from));
            mma884(c[n], a[s], low(b));
            mma884(c[n], a[s + 1], high(b));
        }
    }
    if constexpr (K % 8 == 4) {
        FPDM_UNROLL
        for (i32 n = 0; n < Tiles; ++n) {
            const half_t* from = row + n * 8 * stride + K - 4;
            mma884(c[n], a[K / 4 - 1], ld_shared(reinterpret_cast<const Pack8*>(from)));
        }
    }
}

// c += p tile for 4 Steps rows of the tile, p[j] the operand with columns 4 j .. 4 j + 3.
// A 16-byte read feeds two accumulators: of 16 columns, c[2n] has 0-3 and 8-11, c[2n+1] 4-7 and
// 12-15. What is left over of K (8, 4) goes to accumulators in plain order.
template <i32 K, i32 Steps>
FPDM_DEVICE void add_rows(const Pack8 (&p)[Steps], const half_t* tile,
                          float (&c)[TileTraits<K>::outputs][8]) {
    constexpr i32 stride = TileTraits<K>::stride, pairs = K / 16, rest = K % 16;
    const half_t* row = tile + lane() % 4 * stride;
    FPDM_UNROLL
    for (i32 j = 0; j < Steps; ++j) {
        FPDM_UNROLL
        for (i32 n = 0; n < pairs; ++n) {
            const half_t* from = row + 4 * j * stride + 16 * n + (upper() ? 8 : 0);
            const Pack16 b = ld_shared(reinterpret_cast<const Pack16*>(from));
            mma884_row(c[2 * n], p[j], low(b));
            mma884_row(c[2 * n + 1], p[j], high(b));
        }
        if constexpr (rest >= 8) {
            const half_t* from = row + 4 * j * stride + 16 * pairs + (upper() ? 4 : 0);
            mma884_row(c[2 * pairs], p[j], ld_shared(reinterpret_cast<const Pack8*>(from)));
        }
        if constexpr (rest % 8 == 4) {
            const half_t* from = row + 4 * j * stride + K - 4;
            Pack8 b = {0, 0};  // the upper lanes' four columns do not exist
            if (!upper()) b = ld_shared(reinterpret_cast<const Pack8*>(from));
            mma884_row(c[K / 8], p[j], b);
        }
    }
}

// one accumulator (8 columns) as two operands (columns 0-3 and 4-7), rounded to half: a lane and
// its neighbour at distance 2 swap the halves of their two rows
FPDM_DEVICE void to_operand(const float (&c)[8], Pack8& first, Pack8& second) {
    const u32 near[2] = {pack_halves(c[0], c[1]), pack_halves(c[4], c[5])};
    const u32 far[2] = {pack_halves(c[2], c[3]), pack_halves(c[6], c[7])};
    const bool odd = (lane() & 2) != 0;
    u32 got[2];
    FPDM_UNROLL
    for (i32 h = 0; h < 2; ++h) got[h] = shuffle_xor(odd ? near[h] : far[h], 2);
    first = odd ? Pack8{got[0], far[0]} : Pack8{near[0], got[0]};
    second = odd ? Pack8{got[1], far[1]} : Pack8{near[1], got[1]};
}

// the two values of a lane's rows in accumulator layout, from one value per row in operand layout
FPDM_DEVICE void to_accumulator_rows(float v, float (&out)[2]) {
    out[0] = shuffle(v, lane() & ~2);
    out[1] = shuffle(v, lane() | 2);
}

// c times a factor per row, as halves, into the lane's row (operand layout) in global memory
template <i32 K>
FPDM_DEVICE void store_row(float (&c)[TileTraits<K>::outputs][8], const float (&factor)[2],
                           half_t* row, bool valid) {
    constexpr i32 outputs = TileTraits<K>::outputs, pairs = K / 16;
    Pack8 parts[outputs][2];
    FPDM_UNROLL
    for (i32 n = 0; n < outputs; ++n) {
        FPDM_UNROLL
        for (i32 i = 0; i < 8; ++i) c[n][i] *= factor[row_of(i)];
        to_operand(c[n], parts[n][0], parts[n][1]);
    }
    if (!valid) return;
    FPDM_UNROLL
    for (i32 n = 0; n < pairs; ++n) {
        FPDM_UNROLL
        for (i32 h = 0; h < 2; ++h) {
            const Pack8 a = parts[2 * n][h], b = parts[2 * n + 1][h];
            if constexpr (K % 8 == 0) {
                st_global16(row + 16 * n + 8 * h, join(a, b));
            } else {
                st_global8(row + 16 * n + 8 * h, a);
                st_global8(row + 16 * n + 8 * h + 4, b);
            }
        }
    }
    if constexpr (K % 16 >= 8) {
        st_global8(row + 16 * pairs, parts[2 * pairs][0]);
        st_global8(row + 16 * pairs + 4, parts[2 * pairs][1]);
    }
    if constexpr (K % 8 == 4) st_global8(row + K - 4, parts[K / 8][0]);
}

}  // namespace fpdm
