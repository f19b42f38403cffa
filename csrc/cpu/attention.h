// Attention of one head at a time, whole in the caches of a core: COLS queries lie in the lanes, so
// that the softmax over the keys needs no sum across lanes.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "tile.h"

namespace fpdm {
namespace FPDM_ISA {

constexpr double LOG2E = 1.4426950408889634;
// keys whose probabilities are summed one after another
constexpr i64 KEYS = 64;

// one operand of one head: rows of `width` elements, `stride` apart
template <class T>
struct Head {
    const T* p;
    i64 stride, rows, width;
};

// memory handed out in order, 64-byte aligned; without a start it only counts
struct Arena {
    char* start;
    size_t used = 0;

    template <class T>
    T* take(i64 n) {
        size_t at = used;
        used += (size_t(n) * sizeof(T) + 63) / 64 * 64;
        return start ? reinterpret_cast<T*>(start + at) : nullptr;
    }
};

// rows as words, where they lie or copied
template <class T>
struct RowWords {
    const Word<T>* p;
    i64 stride;

    RowWords(Head<T> h, Word<T>* copy) {
        if (NATIVE<T> && h.width % PER_WORD<T> == 0 && h.stride % PER_WORD<T> == 0 &&
            reinterpret_cast<uintptr_t>(h.p) % 4 == 0) {
            p = reinterpret_cast<const Word<T>*>(h.p);
            stride = h.stride / PER_WORD<T>;
            return;
        }
        p = copy;
        stride = words<T>(h.width);
        for (i64 r = 0; r < h.rows; r++) copy_row(h.p + r * h.stride, h.width, copy + r * stride);
    }
};

// rows as panels of columns for a sum over the rows
template <class T>
inline void pack_panels(Head<T> h, Word<T>* dst) {
    for (i64 c = 0; c < h.width; c += COLS, dst += words<T>(h.rows) * COLS)
        pack_rows(h.p + c, h.stride, h.rows, min2<i64>(COLS, h.width - c), dst, COLS);
}

// s (rows,COLS) = rows of `a` times the packed panel b
template <class T>
inline void scores(RowWords<T> a, i64 rows, i64 depth, const Word<T>* b, bool wide, float* s) {
    RowBlocks blocks(rows);
    for (i64 i = 0; i < blocks.count; i++) {
        i64 r = blocks.first(i), n = blocks.first(i + 1) - r;
        Tile<Word<T>> f = wide ? tile_for<2, false, Word<T>>(n) : tile_for<1, false, Word<T>>(n);
        f(words<T>(depth), a.p + r * a.stride, a.stride, b, s + r * COLS, false);
    }
}

// put_row(row, column, n, v) for the product of rows of `a` (packed: columns of it) with packed
// panels
template <bool packed, class T, class F>
inline void product(i64 rows, i64 depth, const Word<T>* a, i64 stride, const Word<T>* panels,
                    i64 width, F put_row) {
    alignas(64) float c[ROWS * COLS];
    RowBlocks blocks(rows);
    for (i64 i = 0; i < blocks.count; i++) {
        i64 r = blocks.first(i), n = blocks.first(i + 1) - r;
        for (i64 col = 0; col < width; col += COLS) {
            bool wide = width - col > LANES;
            Tile<Word<T>> f =
                wide ? tile_for<2, packed, Word<T>>(n) : tile_for<1, packed, Word<T>>(n);
            f(depth, a + (packed ? r : r * stride), stride, panels + col * depth, c, false);
            for (i64 j = 0; j < n; j++)
                columns(min2<i64>(COLS, width - col),
                        [&](i64 k, i64 m) { put_row(r + j, col + k, m, load(c + j * COLS + k)); });
        }
    }
}

// s (rows,COLS) -> words (rows,COLS) for a sum over the rows; floats are their own words
inline void row_words(float*, i64, i64, float*) {}
inline void row_words(const float* s, i64 rows, i64 lanes, uint32_t* w) {
    for (i64 r = 0; r < rows; r += 2)
        for (i64 c = 0; c < lanes; c += LANES) {
            vu low = __builtin_convertvector(to_bf16(load(s + r * COLS + c)), vu);
            vu high = r + 1 < rows
                          ? __builtin_convertvector(to_bf16(load(s + (r + 1) * COLS + c)), vu)
                          : vu{};
            store(w + r / 2 * COLS + c, low | high << 16);
        }
}

// e^(scale (s - max over the rows)), its sum per lane in `total`
template <bool exact>
inline void exponentials(float* s, i64 rows, i64 lanes, float scale, float* total) {
    const float factor = float(double(scale) * LOG2E);
    for (i64 c = 0; c < lanes; c += LANES) {
        vf top = load(s + c), t{};
        for (i64 r = 1; r < rows; r++) top = larger(top, load(s + r * COLS + c));
        for (i64 first = 0; first < rows; first += KEYS) {
            vf run{};
            for (i64 r = first; r < min2(rows, first + KEYS); r++) {
                vf e = exp2_negative<exact>((load(s + r * COLS + c) - top) * factor);
                store(s + r * COLS + c, e);
                run += e;
            }
            t += run;
        }
        store(total + c, t);
    }
}

template <class T>
struct Forward {
    Word<T>*query, *keys, *values, *weights;
    float *s, *total;

    Forward(const Shape& h, Arena& memory) {
        i64 t = h.tokens, depth = words<T>(h.width), panels = ceil_div(h.width, i64(COLS));
        query = memory.take<Word<T>>(depth * COLS);
        keys = memory.take<Word<T>>(t * depth);
        values = memory.take<Word<T>>(words<T>(t) * panels * COLS);
        s = memory.take<float>(t * COLS);
        weights = PER_WORD<T> == 1 ? reinterpret_cast<Word<T>*>(s)
                                   : memory.take<Word<T>>(words<T>(t) * COLS);
        total = memory.take<float>(COLS);
    }

    void run(const Shape& h, const T* q, T* out) {
        i64 t = h.tokens, w = h.width, stride = h.stride(), d = h.heads * w;
        RowWords<T> k({q + d, stride, t, w}, keys);
        pack_panels<T>({q + 2 * d, stride, t, w}, values);
        for (i64 first = 0; first < t; first += COLS) {
            i64 n = min2<i64>(COLS, t - first), lanes = n > LANES ? COLS : LANES;
            pack_columns(q + first * stride, stride, w, n, query, COLS);
            scores<T>(k, t, w, query, n > LANES, s);
            exponentials<sizeof(T) == 4>(s, t, lanes, h.scale(), total);
            row_words(s, t, lanes, weights);
            product<true, T>(n, words<T>(t), weights, COLS, values, w,
                             [&](i64 r, i64 c, i64 m, vf v) {
                                 put(out + (first + r) * d + c, v * (1.f / total[r]), m);
                             });
        }
    }
};

template <class T>
struct Backward {
    Word<T>*query, *dy_lanes, *keys, *values, *key_panels, *query_panels, *dy_panels, *words_s;
    float *s, *ds, *total, *dk, *dv;
    T *p_rows, *ds_rows;

    Backward(const Shape& h, Arena& memory) {
        i64 t = h.tokens, depth = words<T>(h.width), width = ceil_div(h.width, i64(COLS)) * COLS;
        query = memory.take<Word<T>>(depth * COLS);
        dy_lanes = memory.take<Word<T>>(depth * COLS);
        keys = memory.take<Word<T>>(t * depth);
        values = memory.take<Word<T>>(t * depth);
        key_panels = memory.take<Word<T>>(words<T>(t) * width);
        query_panels = memory.take<Word<T>>(words<T>(COLS) * width);
        dy_panels = memory.take<Word<T>>(words<T>(COLS) * width);
        s = memory.take<float>(t * COLS);
        ds = memory.take<float>(t * COLS);
        dk = memory.take<float>(t * h.width);
        dv = memory.take<float>(t * h.width);
        total = memory.take<float>(COLS);
        bool pairs = PER_WORD<T> == 2;
        words_s = pairs ? memory.take<Word<T>>(words<T>(t) * COLS) : reinterpret_cast<Word<T>*>(ds);
        p_rows = pairs ? memory.take<T>(t * COLS) : nullptr;
        ds_rows = pairs ? memory.take<T>(t * COLS) : nullptr;
    }

    // s = softmax, ds = scale s (dp - sum s dp), lanes of queries
    void softmax_backward(i64 rows, i64 lanes, float scale) {
        exponentials<sizeof(T) == 4>(s, rows, lanes, scale, total);
        for (i64 c = 0; c < lanes; c += LANES) {
            vf inverse = 1.f / load(total + c), delta{};
            for (i64 first = 0; first < rows; first += KEYS) {
                vf run{};
                for (i64 r = first; r < min2(rows, first + KEYS); r++) {
                    vf p = load(s + r * COLS + c) * inverse;
                    store(s + r * COLS + c, p);
                    run += p * load(ds + r * COLS + c);
                }
                delta += run;
            }
            for (i64 r = 0; r < rows; r++) {
                i64 at = r * COLS + c;
                vf g = load(s + at) * (load(ds + at) - delta) * scale;
                store(ds + at, g);
                if constexpr (PER_WORD<T> == 2) {
                    store(p_rows + at, load(s + at));
                    store(ds_rows + at, g);
                }
            }
        }
    }

    // A query that is not there, the other half of the last one's word, has no part in any sum: its
    // products with an infinite key were NaN.
    void clear(i64 rows, i64 query) {
        for (i64 r = 0; r < rows; r++) p_rows[r * COLS + query] = ds_rows[r * COLS + query] = T{};
    }

    const Word<T>* rows_of(const float* f, const T* r) const {
        return reinterpret_cast<const Word<T>*>(PER_WORD<T> == 1 ? static_cast<const void*>(f) : r);
    }

    void run(const Shape& h, const T* q, const T* dy, T* out) {
        i64 t = h.tokens, w = h.width, stride = h.stride(), d = h.heads * w;
        RowWords<T> k({q + d, stride, t, w}, keys), v({q + 2 * d, stride, t, w}, values);
        pack_panels<T>({q + d, stride, t, w}, key_panels);
        for (i64 first = 0; first < t; first += COLS) {
            i64 n = min2<i64>(COLS, t - first), lanes = n > LANES ? COLS : LANES,
                across = COLS / PER_WORD<T>;
            const T *qi = q + first * stride, *dyi = dy + first * d;
            pack_columns(qi, stride, w, n, query, COLS);
            pack_columns(dyi, d, w, n, dy_lanes, COLS);
            scores<T>(k, t, w, query, n > LANES, s);
            scores<T>(v, t, w, dy_lanes, n > LANES, ds);
            softmax_backward(t, lanes, h.scale());
            if (PER_WORD<T> == 2 && n % 2) clear(t, n);
            pack_panels<T>({dyi, d, n, w}, dy_panels);
            pack_panels<T>({qi, stride, n, w}, query_panels);
            bool begins = first == 0, ends = first + COLS >= t;
            auto add_to = [&](float* sum, T* into) {
                return [=](i64 r, i64 c, i64 m, vf x) {
                    if (!begins) x += get(sum + r * w + c, m);
                    if (ends)
                        put(into + r * stride + c, x, m);
                    else
                        put(sum + r * w + c, x, m);
                };
            };
            product<false, T>(t, words<T>(n), rows_of(s, p_rows), across, dy_panels, w,
                              add_to(dv, out + 2 * d));
            product<false, T>(t, words<T>(n), rows_of(ds, ds_rows), across, query_panels, w,
                              add_to(dk, out + d));
            row_words(ds, t, lanes, words_s);
            product<true, T>(
                n, words<T>(t), words_s, COLS, key_panels, w,
                [&](i64 r, i64 c, i64 m, vf x) { put(out + (first + r) * stride + c, x, m); });
        }
    }
};

// body(workspace, sample, head) for every head
template <class Work, class F>
void per_head(const Shape& h, F body) {
    Arena count{nullptr};
    Work(h, count);
    size_t size = (count.used + 4095) / 4096 * 4096;
    char* memory = scratch(size * size_t(most_threads()));
    parallel(h.batch * h.heads * h.tokens * h.tokens * h.width / 8, [&](Team team) {
        Arena mine{memory + size * size_t(team.index)};
        Work work(h, mine);
        team.each(h.batch * h.heads, [&](i64 i) { body(work, i / h.heads, i % h.heads); });
    });
}

template <class T>
void attention(const Shape& h, const void* qkv, void* out) {
    i64 d = h.heads * h.width;
    per_head<Forward<T>>(h, [&](Forward<T>& work, i64 b, i64 head) {
        work.run(h, static_cast<const T*>(qkv) + b * h.tokens * 3 * d + head * h.width,
                 static_cast<T*>(out) + b * h.tokens * d + head * h.width);
    });
}

template <class T>
void attention_backward(const Shape& h, const void* dy, const void* qkv, void* out) {
    i64 d = h.heads * h.width;
    per_head<Backward<T>>(h, [&](Backward<T>& work, i64 b, i64 head) {
        i64 at = b * h.tokens * d + head * h.width, packed = b * h.tokens * 3 * d + head * h.width;
        work.run(h, static_cast<const T*>(qkv) + packed, static_cast<const T*>(dy) + at,
                 static_cast<T*>(out) + packed);
    });
}

}  // namespace FPDM_ISA
}  // namespace fpdm
