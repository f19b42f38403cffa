// Products with a weight, fused with what comes before and after; weight gradients.
#pragma once

#include "kernels.h"
#include "gelu.h"
#include "rows.h"
#include "tile.h"

namespace fpdm {
namespace FPDM_ISA {

// packed weights in flight: half of a core's second-level cache
constexpr i64 PANEL_BYTES = 512 << 10;
// tokens per partial sum of a weight gradient, whatever the number of threads
constexpr i64 DEPTH = 512;

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

// rows that can be multiplied where they lie
template <class T>
inline bool direct(const Linear& l) {
    return NATIVE<T> && l.depth % PER_WORD<T> == 0 && reinterpret_cast<uintptr_t>(l.x) % 4 == 0;
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

// x W for the row blocks x panels that are this thread's; `b` holds panels [first, last)
template <class T, class Epilogue>
void multiply(Team team, const Linear& l, i64 first, i64 last, const Word<T>* b, Word<T>* packed,
              const Epilogue& store_tile) {
    using W = Word<T>;
    const T* x = static_cast<const T*>(l.x);
    i64 depth = words<T>(l.depth);
    RowBlocks blocks(l.rows);
    // few rows: the panels are shared out too
    i64 parts = blocks.count >= 2 * team.size ? 1 : min2(last - first, team.size);
    alignas(64) float c[ROWS * COLS];
    team.each(blocks.count * parts, [&](i64 unit) {
        i64 i = unit / parts, part = unit % parts, r = blocks.first(i), n = blocks.first(i + 1) - r;
        const W* a = reinterpret_cast<const W*>(x + r * l.depth);
        if (packed) {
            pack_columns(x + r * l.depth, l.depth, l.depth, n, packed, ROWS);
            a = packed;
        }
        Tile<W> product = packed ? tile_for<2, true, W>(n) : tile_for<2, false, W>(n);
        i64 end = first + (part + 1) * (last - first) / parts;
        for (i64 p = first + part * (last - first) / parts; p < end; p++) {
            product(depth, a, packed ? ROWS : depth, b + (p - first) * depth * COLS, c);
            store_tile(r, n, p * COLS, min2<i64>(COLS, l.cols - p * COLS), c);
        }
    });
}

// before(team) and after(team) run in the same team, around the product
template <class T, class Epilogue, class Before, class After>
void linear_with(const Linear& l, const Epilogue& epilogue, Before before, After after) {
    using W = Word<T>;
    i64 depth = words<T>(l.depth), panels = ceil_div(l.cols, i64(COLS)), size = depth * COLS;
    i64 group = min2(panels, max2<i64>(1, PANEL_BYTES / (size * 4 + 1)));
    i64 own = direct<T>(l) ? 0 : (depth * ROWS + 15) / 16 * 16;
    W* memory = reinterpret_cast<W*>(scratch(size_t(group * size + own * most_threads() + 16) * 4));
    parallel(l.rows * l.cols * l.depth / 32, [&](Team team) {
        before(team);
        for (i64 first = 0; first < panels; first += group) {
            i64 last = min2(panels, first + group);
            team.each(last - first, [&](i64 p) { pack_panel<T>(l, first + p, memory + p * size); });
            team.barrier();
            multiply<T>(team, l, first, last, memory,
                        own ? memory + group * size + team.index * own : nullptr, epilogue);
            team.barrier();
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

// db += the sum of the rows of dy for some columns, in runs of 16 rows
template <class T>
inline void add_bias(const T* dy, i64 stride, i64 depth, i64 n, float* db) {
    columns(n, [=](i64 c, i64 k) {
        vf total{};
        for (i64 first = 0; first < depth; first += 16) {
            vf run{};
            for (i64 r = first; r < min2(depth, first + 16); r++)
                run += get(dy + r * stride + c, k);
            total += run;
        }
        put(db + c, get(db + c, k) + total, k);
    });
}

// dW (outs,ins) += dy^T x, db += sum dy, DEPTH tokens at a time
template <class T>
void wgrad(i64 rows, i64 outs, i64 ins, const T* dy, const T* x, float* dweight, i64 stride,
           float* dbias) {
    using W = Word<T>;
    i64 depth = words<T>(min2(rows, DEPTH)), panels = ceil_div(ins, i64(COLS));
    RowBlocks blocks(outs);
    i64 left = depth * ROWS, right = depth * COLS;
    W* memory =
        reinterpret_cast<W*>(scratch(size_t(blocks.count * left + panels * right + 16) * 4));
    W* b = memory + blocks.count * left;
    parallel(rows * outs * ins / 32, [&](Team team) {
        alignas(64) float c[ROWS * COLS];
        for (i64 first = 0; first < rows; first += DEPTH) {
            i64 n = min2(DEPTH, rows - first), k = words<T>(n);
            team.each(blocks.count + panels, [&](i64 i) {
                if (i < panels)
                    return pack_rows(x + first * ins + i * COLS, ins, n, ins - i * COLS,
                                     b + i * right, COLS);
                i64 o = blocks.first(i - panels), count = blocks.first(i - panels + 1) - o;
                pack_rows(dy + first * outs + o, outs, n, outs - o, memory + (i - panels) * left,
                          ROWS);
                if (dbias) add_bias(dy + first * outs + o, outs, n, count, dbias + o);
            });
            team.barrier();
            team.each(blocks.count * panels, [&](i64 i) {
                i64 block = i / panels, p = i % panels, o = blocks.first(block),
                    count = blocks.first(block + 1) - o;
                tile_for<2, true, W>(count)(k, memory + block * left, ROWS, b + p * right, c);
                for (i64 r = 0; r < count; r++)
                    columns(min2<i64>(COLS, ins - p * COLS), [&](i64 j, i64 m) {
                        float* into = dweight + (o + r) * stride + p * COLS + j;
                        put(into, get(into, m) + load(c + r * COLS + j), m);
                    });
            });
            team.barrier();
        }
    });
}

}  // namespace FPDM_ISA
}  // namespace fpdm
