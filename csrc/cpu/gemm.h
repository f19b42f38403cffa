// Products with a weight, fused with what comes before and after; weight gradients.
#pragma once

#include "kernels.h"
#include "gelu.h"
#include "rows.h"
#include "tile.h"

namespace fpdm {
namespace FPDM_ISA {

// one run of packed weights: half of a core's second-level cache
constexpr i64 PANEL_BYTES = 512 << 10, PANELS = PANEL_BYTES / (RUN * COLS * 4);
// blocks of rows whose sums are unfinished at a time, and the distance of their rows as words: not a
// multiple of the page, so that they do not share sets of the cache
constexpr i64 BLOCKS = 8, DISTANCE = RUN + 16;
// rows per thread from which every thread packs the weight for itself: words that another core has
// just packed come slowly
constexpr i64 OWN_PACKING = 96;
// words of all those copies, 32 MiB: 64 threads would hold some 600 of a deep product
constexpr i64 OWN_WORDS = 8 << 20;
// of a weight gradient: tokens per partial sum, whatever the number of threads; blocks of outs and
// panels of ins whose sums are unfinished at a time
constexpr i64 DEPTH = 128, HELD = 32, GROUP = 12;

// What becomes of a tile: bias or addend, rounding, GELU or gate, store. T: dtype of the product,
// O: of the output, Z: of the residual stream. Members are copied first: a store of bfloat16 might
// change them, for all that the compiler knows.
template <class T, class O>
struct Store {
    const Linear& l;

    void operator()(i64 first, i64 rows, i64 col, i64 cols, const float* c) const {
        const i64 width = l.cols;
        const T* bias = l.bias ? static_cast<const T*>(l.bias) + col : nullptr;
        O* out = static_cast<O*>(l.out) + first * width + col;
        columns(cols, [=](i64 j, i64 n) {
            const vf u = bias ? get(bias + j, n) : vf{};
            for (i64 r = 0; r < rows; r++) put(out + r * width + j, load(c + r * COLS + j) + u, n);
        });
    }
};

template <class T, bool is_bias, bool keeps>
struct StoreGelu {
    const Linear& l;

    void operator()(i64 first, i64 rows, i64 col, i64 cols, const float* c) const {
        const i64 width = l.cols, at = first * width + col;
        const T* u =
            is_bias ? static_cast<const T*>(l.bias) + col : static_cast<const T*>(l.addend) + at;
        T *out = static_cast<T*>(l.out) + at, *pre = keeps ? static_cast<T*>(l.pre) + at : nullptr;
        columns(cols, [=](i64 j, i64 n) {
            vf term = get(u + j, n);
            for (i64 r = 0; r < rows; r++) {
                if (!is_bias) term = get(u + r * width + j, n);
                vf v = rounded<T>(load(c + r * COLS + j) + term);
                if (keeps) put(pre + r * width + j, v, n);
                put(out + r * width + j, gelu<T>(v), n);
            }
        });
    }
};

template <class Z, class T>
struct StoreGate {
    const Linear& l;
    const Block& b;

    void operator()(i64 first, i64 rows, i64 col, i64 cols, const float* c) const {
        const i64 width = l.cols, tokens = b.rows.tokens, at = first * width + col;
        const T* bias = static_cast<const T*>(l.bias) + col;
        const Z* z = static_cast<const Z*>(b.z) + at;
        Z* out = static_cast<Z*>(b.z_out) + at;
        T* product = l.out ? static_cast<T*>(l.out) + at : nullptr;
        const T* gates[ROWS];
        for (i64 r = 0; r < rows; r++) gates[r] = row<T>(b.gate, (first + r) / tokens) + col;
        columns(cols, [&](i64 j, i64 n) {
            const vf u = get(bias + j, n);
            for (i64 r = 0; r < rows; r++) {
                vf p = rounded<T>(load(c + r * COLS + j) + u);
                if (product) put(product + r * width + j, p, n);
                vf g = get(gates[r] + j, n);
                put(out + r * width + j, get(z + r * width + j, n) + g * p, n);
            }
        });
    }
};

// rows that can be multiplied where they lie, and lie together
template <class T>
inline bool direct(const Linear& l) {
    return NATIVE<T> && l.depth % PER_WORD<T> == 0 && words<T>(l.depth) <= RUN &&
           reinterpret_cast<uintptr_t>(l.x) % 4 == 0;
}

template <class T>
inline void pack_panel(const Linear& l, i64 panel, Word<T>* dst) {
    i64 col = panel * COLS, n = min2<i64>(COLS, l.cols - col);
    const T* w = static_cast<const T*>(l.weight);
    if (l.transposed)
        pack_columns(w + col * l.weight_stride, l.weight_stride, l.depth, n, dst, COLS);
    else
        pack_rows(w + col, l.weight_stride, l.depth, n, dst, COLS);
}

template <class T>
void pack_all(i64 cols, i64 depth, const void* weight, i64 stride, void* out) {
    const i64 panels = ceil_div(cols, i64(COLS)), size = words<T>(depth) * COLS;
    Linear l{};
    l.cols = cols, l.depth = depth, l.transposed = true;
    l.weight = weight, l.weight_stride = stride;
    parallel(cols * depth, [&](Team team) {
        team.each(panels, [&](i64 p) { pack_panel<T>(l, p, static_cast<Word<T>*>(out) + p * size); });
    });
}

// How a team shares the tiles of blocks of rows by panels: the blocks, or the panels of few rows
// where that leaves the slowest thread no more. Panels alone are too few for many threads.
struct Shares {
    bool few;
    RowBlocks blocks;
    Team by_rows, by_panels;

    Shares(i64 rows, i64 panels, Team team)
        : few(few_rows(rows, panels, team.size)),
          blocks(rows, few ? 1 : team.size),
          by_rows(few ? Team{0, 1} : team),
          by_panels(few ? team : Team{0, 1}) {}

    // a tile of less than 4 rows takes as long as one of 4
    static i64 height(const RowBlocks& b) {
        return b.count ? max2<i64>(4, ceil_div(b.rows, b.count)) : 0;
    }
    static bool few_rows(i64 rows, i64 panels, i64 threads) {
        const RowBlocks each(rows, threads), whole(rows);
        return each.count < 2 * threads &&
               whole.count * height(whole) * ceil_div(panels, threads) <=
                   ceil_div(each.count, threads) * height(each) * panels;
    }
};

// one thread's memory in `linear_with`: rows as words, where they cannot be multiplied as they lie,
// and sums of the runs so far
template <class T>
struct Held {
    Word<T>* rows;
    float* sums;

    static i64 row_words(const Linear& l) { return direct<T>(l) ? 0 : BLOCKS * ROWS * DISTANCE; }
    static i64 size(const Linear& l, i64 group) {
        return row_words(l) + (words<T>(l.depth) > RUN ? BLOCKS * group : 1) * ROWS * COLS;
    }
};

// x W for this thread's blocks of rows; `b` holds panels [first, last)
template <class T, class Epilogue>
void multiply(Team team, const Linear& l, i64 first, i64 last, const Word<T>* b, Held<T> held,
              const Epilogue& store_tile) {
    using W = Word<T>;
    const T* x = static_cast<const T*>(l.x);
    const i64 depth = words<T>(l.depth), group = last - first;
    const Shares shares(l.rows, group, team);
    const RowBlocks& blocks = shares.blocks;
    shares.by_rows.runs(blocks.count, BLOCKS, [&](i64 top, i64 end) {
        for (i64 k = 0; k == 0 || k < depth; k += RUN) {
            const i64 run = min2(RUN, depth - k), from = k * PER_WORD<T>;
            for (i64 r = blocks.first(top); held.rows && r < blocks.first(end); r++)
                copy_row(x + r * l.depth + from, min2(RUN * PER_WORD<T>, l.depth - from),
                         held.rows + (r - blocks.first(top)) * DISTANCE);
            shares.by_panels.each(group, [&](i64 p) {
                for (i64 i = top; i < end; i++) {
                    i64 r = blocks.first(i), n = blocks.first(i + 1) - r, col = (first + p) * COLS;
                    const W* a = held.rows
                                     ? held.rows + (r - blocks.first(top)) * DISTANCE
                                     : reinterpret_cast<const W*>(x + r * l.depth) + k;
                    float* c = held.sums + (depth > RUN ? (i - top) * group + p : 0) * ROWS * COLS;
                    tile_for<2, false, W>(n)(run, a, held.rows ? DISTANCE : depth,
                                             b + (p * depth + k) * COLS, c, k > 0);
                    if (k + RUN >= depth) store_tile(r, n, col, min2<i64>(COLS, l.cols - col), c);
                }
            });
        }
    });
}

// before(team) and after(team) run in the same team, around the product, and wait for the others
// where they need them
template <class T, class Epilogue, class Before, class After>
void linear_with(const Linear& l, const Epilogue& epilogue, Before before, After after) {
    using W = Word<T>;
    const i64 depth = words<T>(l.depth), panels = ceil_div(l.cols, i64(COLS)), size = depth * COLS,
              group = min2(panels, PANELS), held = Held<T>::size(l, group),
              packed = ceil_div(group * size, i64(16)) * 16, threads = most_threads();
    const bool ready = l.weight_stride == PACKED,
               shared = l.rows < OWN_PACKING * threads || threads * packed > OWN_WORDS;
    const i64 copies = ready ? 0 : shared ? 1 : threads;
    W* memory = reinterpret_cast<W*>(scratch(size_t(threads * held + copies * packed + 16) * 4));
    parallel(l.rows * l.cols * l.depth / 32, [&](Team team) {
        before(team);
        const Team packers = shared ? team : Team{0, 1};
        W *mine = memory + team.index * held,
          *b = memory + threads * held + (shared ? 0 : team.index * packed);
        W* rows = direct<T>(l) ? nullptr : mine;
        float* sums = reinterpret_cast<float*>(mine + Held<T>::row_words(l));
        for (i64 first = 0; first < panels; first += group) {
            i64 last = min2(panels, first + group);
            if (ready) {
                const W* panel = static_cast<const W*>(l.weight) + first * size;
                multiply<T>(team, l, first, last, panel, {rows, sums}, epilogue);
                continue;
            }
            packers.each(last - first, [&](i64 p) { pack_panel<T>(l, first + p, b + p * size); });
            packers.barrier();
            multiply<T>(team, l, first, last, b, {rows, sums}, epilogue);
            if (last < panels) packers.barrier();
        }
        after(team);
    });
}

inline void nothing(Team) {}

template <class T>
void linear(const Linear& l) {
    if (l.gelu && l.bias && l.pre)
        return linear_with<T>(l, StoreGelu<T, true, true>{l}, nothing, nothing);
    if (l.gelu && l.bias) return linear_with<T>(l, StoreGelu<T, true, false>{l}, nothing, nothing);
    if (l.gelu && l.pre) return linear_with<T>(l, StoreGelu<T, false, true>{l}, nothing, nothing);
    if (l.gelu) return linear_with<T>(l, StoreGelu<T, false, false>{l}, nothing, nothing);
    if (l.out_type == 0) return linear_with<T>(l, Store<T, float>{l}, nothing, nothing);
    linear_with<T>(l, Store<T, bf16>{l}, nothing, nothing);
}

template <class Z, class T>
void adaln_linear(const Linear& l, const Block& b) {
    auto normalise = [&](Team team) {
        i64 d = l.depth;
        team.each(l.rows, [&](i64 i) {
            i64 s = i / b.rows.tokens;
            adaln_row(static_cast<const Z*>(b.z) + i * d, row<T>(b.shift, s), row<T>(b.scale, s),
                      static_cast<T*>(b.y) + i * d, d);
        });
        team.barrier();
    };
    linear_with<T>(l, Store<T, T>{l}, normalise, nothing);
}

// z' = z + g (x W^T + b); then LN(z') (1 + scale) + shift when b.y, norms when b.norms
template <class Z, class T>
void linear_gate(const Linear& l, const Block& b) {
    i64 d = l.cols;
    float* squares =
        b.norms ? reinterpret_cast<float*>(scratch<1>(size_t(l.rows) * 8 + 8)) : nullptr;
    auto finish = [&](Team team) {
        if (!b.y && !b.norms) return;
        team.barrier();
        team.each(l.rows, [&](i64 i) {
            i64 s = i / b.rows.tokens;
            const Z* z = static_cast<const Z*>(b.z_out) + i * d;
            if (b.y)
                adaln_row(z, row<T>(b.shift, s), row<T>(b.scale, s), static_cast<T*>(b.y) + i * d,
                          d);
            if (b.norms) square_row(z, static_cast<const Z*>(b.prev) + i * d, d, squares + 2 * i);
        });
        if (!b.norms) return;
        team.barrier();
        finish_norms(team, b.rows, squares, b.norms);
    };
    linear_with<T>(l, StoreGate<Z, T>{l, b}, nothing, finish);
}

// dW (outs,ins) += dy^T x in tiles of outs by ins. The threads share nothing but what they read:
// each packs both operands, DEPTH tokens at a time, and adds to dW once.
template <class T>
struct WeightGradient {
    i64 rows, outs, ins;
    const T *dy, *x;
    float* dweight;
    i64 stride;
    float* dbias;

    using W = Word<T>;
    static constexpr i64 LEFT = DEPTH * ROWS, RIGHT = DEPTH * COLS;

    // at least 1, without a panel too: dbias is summed with the first
    i64 group() const { return max2<i64>(1, min2(ceil_div(ins, i64(COLS)), GROUP)); }
    i64 size() const { return HELD * LEFT + group() * (RIGHT + HELD * ROWS * COLS) + 16; }

    // this thread's share of panels [panel, end)
    void run(Team team, i64 panel, i64 end, W* left) const {
        W* right = left + HELD * LEFT + 16;
        float* sums = reinterpret_cast<float*>(right + group() * RIGHT);
        const Shares shares(outs, end - panel, team);
        const RowBlocks& blocks = shares.blocks;
        shares.by_rows.runs(blocks.count, HELD, [&](i64 top, i64 bottom) {
            for (i64 first = 0; first < rows; first += DEPTH) {
                const i64 n = min2(DEPTH, rows - first);
                pack_left(blocks, top, bottom, first, n, left);
                if (dbias && panel == 0 && shares.by_panels.index == 0)
                    add_bias(blocks.first(top), blocks.first(bottom), first, n);
                shares.by_panels.each(end - panel, [&](i64 p) {
                    i64 col = (panel + p) * COLS;
                    W* b = right + p * RIGHT;
                    pack_rows(x + first * ins + col, ins, n, ins - col, b, COLS);
                    for (i64 i = top; i < bottom; i++) {
                        i64 o = blocks.first(i), count = blocks.first(i + 1) - o;
                        float* c = sums + ((i - top) * (end - panel) + p) * ROWS * COLS;
                        tile_for<2, true, W>(count)(words<T>(n), left + (i - top) * LEFT, ROWS, b,
                                                    c, first > 0);
                        if (first + DEPTH >= rows) add(o, count, col, c);
                    }
                });
            }
        });
    }

    // some tokens of all blocks at a time: they lie side by side
    void pack_left(const RowBlocks& blocks, i64 top, i64 bottom, i64 first, i64 n, W* left) const {
        for (i64 t = 0; t < n; t += 16)
            for (i64 i = top; i < bottom; i++)
                pack_rows(dy + (first + t) * outs + blocks.first(i), outs, min2<i64>(16, n - t),
                          outs - blocks.first(i), left + (i - top) * LEFT + words<T>(t) * ROWS,
                          ROWS);
    }

    // db += the sum of some tokens, of sums of 16; the packing has just read them
    void add_bias(i64 o, i64 end, i64 first, i64 n) const {
        columns(end - o, [&](i64 j, i64 k) {
            const T* p = dy + first * outs + o + j;
            vf total{};
            for (i64 t = 0; t < n; t += 16) {
                vf run{};
                for (i64 r = t; r < min2(n, t + 16); r++) run += get(p + r * outs, k);
                total += run;
            }
            put(dbias + o + j, get(dbias + o + j, k) + total, k);
        });
    }

    void add(i64 o, i64 count, i64 col, const float* c) const {
        for (i64 r = 0; r < count; r++)
            columns(min2<i64>(COLS, ins - col), [&](i64 j, i64 m) {
                float* into = dweight + (o + r) * stride + col + j;
                put(into, get(into, m) + load(c + r * COLS + j), m);
            });
    }
};

template <class T>
void wgrad(i64 rows, i64 outs, i64 ins, const T* dy, const T* x, float* dweight, i64 stride,
           float* dbias) {
    const WeightGradient<T> job{rows, outs, ins, dy, x, dweight, stride, dbias};
    const i64 panels = ceil_div(ins, i64(COLS)), group = job.group(), size = job.size() + 16;
    auto* memory = reinterpret_cast<Word<T>*>(scratch(size_t(size * most_threads()) * 4));
    parallel(rows * outs * ins / 32, [&](Team team) {
        for (i64 panel = 0; panel == 0 || panel < panels; panel += group)
            job.run(team, panel, min2(panels, panel + group), memory + team.index * size);
    });
}

}  // namespace FPDM_ISA
}  // namespace fpdm
