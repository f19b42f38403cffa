// The product of a few rows with one panel of columns, and the packing of its operands.
//
// A word is what one lane multiplies at a time: a float, or a pair of bfloat16 that are neighbours
// along the sum. Operands whose type has no product of its own are widened to float when packed.
#pragma once

#include "vec.h"

namespace fpdm {
namespace FPDM_ISA {

template <class T>
struct WordOf {
    using type = float;
};
#if FPDM_BF16_DOT
template <>
struct WordOf<bf16> {
    using type = uint32_t;
};
#endif
template <class T>
using Word = typename WordOf<T>::type;
template <class T>
constexpr int PER_WORD = sizeof(Word<T>) == 4 && sizeof(T) == 2 && FPDM_BF16_DOT ? 2 : 1;
// memory of T can be read as words
template <class T>
constexpr bool NATIVE = sizeof(T) * PER_WORD<T> == 4;
template <class T>
inline i64 words(i64 n) {
    return ceil_div(n, PER_WORD<T>);
}

inline vf multiply_add(vf acc, float a, vf b) { return acc + a * b; }
#if FPDM_BF16_DOT
inline vf multiply_add(vf acc, uint32_t a, vu b) {
    return bits<vf>(_mm512_dpbf16_ps(bits<__m512>(acc), (__m512bh)bits<__m512i>(splat(a)),
                                     (__m512bh)bits<__m512i>(b)));
}
#endif

// words summed one after another: longer sums are sums of such runs, for accuracy
constexpr i64 RUN = 256;

// c (R, V LANES), rows COLS apart, = a b, or += it.  a[r stride + k] or, packed, a[r + k stride]; b
// (depth, COLS)
template <int R, int V, bool packed, class W>
void tile(i64 depth, const W* a, i64 stride, const W* b, float* c, bool add) {
    i64 k = 0;
    do {
        vf acc[R][V] = {};
        for (i64 end = min2(depth, k + RUN); k < end; k++) {
            auto b0 = load(b), b1 = load(b + (V - 1) * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                W x = packed ? a[r] : a[r * stride];
                acc[r][0] = multiply_add(acc[r][0], x, b0);
                if (V == 2) acc[r][V - 1] = multiply_add(acc[r][V - 1], x, b1);
            }
            a += packed ? stride : 1;
            b += COLS;
        }
        const bool begins = k <= RUN && !add;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                float* into = c + r * COLS + v * LANES;
                store(into, begins ? acc[r][v] : load(into) + acc[r][v]);
            }
    } while (k < depth);
}

template <class W>
using Tile = void (*)(i64, const W*, i64, const W*, float*, bool);

// for n <= ROWS rows
template <int V, bool packed, class W, int R = ROWS>
inline Tile<W> tile_for(i64 n) {
    if constexpr (R > 1)
        if (n < R) return tile_for<V, packed, W, R - 1>(n);
    return tile<R, V, packed, W>;
}

// equal blocks of at most ROWS rows, as many for every one of `shares`: block i starts at first(i)
struct RowBlocks {
    i64 rows, count;
    explicit RowBlocks(i64 n, i64 shares = 1)
        : rows(n), count(min2(n, ceil_div(ceil_div(n, i64(ROWS)), shares) * shares)) {}
    i64 first(i64 i) const { return i * rows / count; }
};

// word of n columns in one lane each: element k of the sum, or elements k and k + 1
template <class T>
inline vf row_word(const T* p, i64, bool, i64 n, float*) {
    return get(p, n);
}
template <class T>
inline vu row_word(const T* p, i64 stride, bool pair, i64 n, uint32_t*) {
    vu low = bits<vu>(get(p, n)) >> 16;
    return pair ? low | bits<vu>(get(p + stride, n)) : low;
}

// dst (words, width) from rows along the sum: the source is (depth, stride), where n columns may be
// read; zeros stand for the rest of the width
template <class T>
inline void pack_rows(const T* src, i64 stride, i64 depth, i64 n, Word<T>* dst, i64 width) {
    for (i64 k = 0; k < depth; k += PER_WORD<T>, dst += width, src += PER_WORD<T> * stride) {
        bool last = k + PER_WORD<T> >= depth;
        for (i64 c = 0; c < width; c += LANES) {
            i64 m = max2<i64>(0, min2<i64>(LANES, n - c));
            auto w = row_word(src + c, stride, k + 1 < depth, m, dst);
            // a short row spills into the next, which is written after it
            if (width - c >= LANES || !last)
                store(dst + c, w);
            else
                __builtin_memcpy(dst + c, &w, size_t(width - c) * 4);
        }
    }
}

#if defined(__AVX512F__)
// 16 x 16 words from rows `stride` elements apart
template <class T, class W>
inline void transpose(const T* src, i64 stride, W* dst, i64 width) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++)
        if constexpr (NATIVE<T>)
            r[i] = _mm512_loadu_si512(src + i * stride);
        else
            r[i] = bits<__m512i>(load(src + i * stride));
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(dst + i * width, _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88));
        _mm512_storeu_si512(dst + (i + 8) * width, _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd));
        _mm512_storeu_si512(dst + (i + 4) * width, _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88));
        _mm512_storeu_si512(dst + (i + 12) * width,
                            _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd));
    }
}
#endif

// dst (words, width) from rows across the sum: the source is (n, stride) with `depth` columns
template <class T>
inline void pack_columns(const T* src, i64 stride, i64 depth, i64 n, Word<T>* dst, i64 width) {
    i64 done = 0, whole = 0;
#if defined(__AVX512F__)
    whole = n / LANES * LANES;
    for (constexpr i64 per = LANES * PER_WORD<T>; done + per <= depth; done += per)
        for (i64 i = 0; i < whole; i += LANES)
            transpose(src + i * stride + done, stride, dst + done / PER_WORD<T> * width + i, width);
#endif
    for (i64 i = 0; i < n; i++) {
        const T* p = src + i * stride;
        for (i64 k = i < whole ? done : 0; k < depth; k += PER_WORD<T>) {
            Word<T>& w = dst[k / PER_WORD<T> * width + i];
            if constexpr (PER_WORD<T> == 1)
                w = to_float(p[k]);
            else
                w = p[k].bits | (k + 1 < depth ? uint32_t(p[k + 1].bits) << 16 : 0);
        }
    }
    for (i64 k = 0; k < words<T>(depth); k++)
        for (i64 i = n; i < width; i++) dst[k * width + i] = 0;
}

// one row as words along the sum
template <class T>
inline void copy_row(const T* src, i64 depth, Word<T>* dst) {
    if constexpr (PER_WORD<T> == 1) {
        columns(depth, [=](i64 c, i64 n) { put(dst + c, get(src + c, n), n); });
    } else {
        // pairs lie in memory as they do in words
        __builtin_memcpy(dst, src, size_t(depth) * sizeof(T));
        if (depth % 2) dst[depth / 2] = src[depth - 1].bits;
    }
}

}  // namespace FPDM_ISA
}  // namespace fpdm
