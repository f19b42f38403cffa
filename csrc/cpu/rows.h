// Operators on rows of D: layer norm with modulation, gated residual, and their backward.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace fpdm {
namespace FPDM_ISA {

constexpr float LN_EPS = 1e-6f;
// tokens per partial sum over a sample, whatever the number of threads
constexpr i64 CHUNK = 32;

template <class T>
inline const T* row(Vector v, i64 b) {
    return static_cast<const T*>(v.p) + b * v.stride;
}

struct Moments {
    float mean, rstd;
};

// The centred pass also finds what the rounded mean missed: the variance of a constant row is 0.
template <class Z>
inline Moments moments(const Z* z, i64 d) {
    vf s0{}, s1{};
    i64 c = 0;
    for (; c + 2 * LANES <= d; c += 2 * LANES) {
        s0 += load(z + c);
        s1 += load(z + c + LANES);
    }
    for (; c < d; c += LANES) s0 += get(z + c, min2<i64>(LANES, d - c));
    const float share = 1.f / float(d), about = sum(s0 + s1) * share;
    vf q0{}, q1{};
    s0 = s1 = vf{};
    for (c = 0; c + 2 * LANES <= d; c += 2 * LANES) {
        vf a = load(z + c) - about, b = load(z + c + LANES) - about;
        s0 += a;
        s1 += b;
        q0 += a * a;
        q1 += b * b;
    }
    for (; c < d; c += LANES) {
        i64 n = min2<i64>(LANES, d - c);
        vf a = keep(get(z + c, n) - about, n);
        s0 += a;
        q0 += a * a;
    }
    const float missed = sum(s0 + s1) * share, square = sum(q0 + q1) * share - missed * missed;
    return {about + missed, 1.f / __builtin_sqrtf((square < 0 ? 0 : square) + LN_EPS)};
}

template <class Z, class T>
inline void adaln_row(const Z* z, const T* shift, const T* scale, T* out, i64 d) {
    Moments m = moments(z, d);
    columns(d, [&](i64 c, i64 n) {
        vf xhat = (get(z + c, n) - m.mean) * m.rstd;
        put(out + c, xhat * (1.f + get(scale + c, n)) + get(shift + c, n), n);
    });
}

template <class Z, class T>
void adaln(const Rows& r, const void* z, Vector shift, Vector scale, void* out) {
    i64 n = r.batch * r.tokens, d = r.width;
    parallel(n * d, [&](Team team) {
        team.each(n, [&](i64 i) {
            i64 b = i / r.tokens;
            adaln_row(static_cast<const Z*>(z) + i * d, row<T>(shift, b), row<T>(scale, b),
                      static_cast<T*>(out) + i * d, d);
        });
    });
}

template <class Z, class T>
inline void gate_row(const Z* z, const T* y, const T* gate, Z* out, i64 d) {
    columns(d, [&](i64 c, i64 n) {
        put(out + c, get(z + c, n) + get(gate + c, n) * get(y + c, n), n);
    });
}

// |out - prev|^2 and |out|^2 of one row
template <class Z>
inline void square_row(const Z* out, const Z* prev, i64 d, float* squares) {
    vf s0{}, s1{};
    columns(d, [&](i64 c, i64 n) {
        vf a = get(out + c, n), b = a - get(prev + c, n);
        s0 += b * b;
        s1 += a * a;
    });
    squares[0] = sum(s0);
    squares[1] = sum(s1);
}

// the rows' squares, kept in `squares` (rows,2), become norms (2,B)
inline void finish_norms(Team team, const Rows& r, const float* squares, float* norms) {
    team.each(r.batch, [&](i64 b) {
        double s0 = 0, s1 = 0;
        for (i64 t = b * r.tokens; t < (b + 1) * r.tokens; t++) {
            s0 += double(squares[2 * t]);
            s1 += double(squares[2 * t + 1]);
        }
        norms[b] = float(__builtin_sqrt(s0));
        norms[r.batch + b] = float(__builtin_sqrt(s1));
    });
}

template <class Z, class T>
void gate_residual(const Rows& r, const void* z, const void* y, Vector gate, void* out,
                   const void* prev, float* norms) {
    i64 n = r.batch * r.tokens, d = r.width;
    float* squares = norms ? reinterpret_cast<float*>(scratch(size_t(n) * 8 + 8)) : nullptr;
    parallel(n * d, [&](Team team) {
        team.each(n, [&](i64 i) {
            Z* o = static_cast<Z*>(out) + i * d;
            gate_row(static_cast<const Z*>(z) + i * d, static_cast<const T*>(y) + i * d,
                     row<T>(gate, i / r.tokens), o, d);
            if (norms) square_row(o, static_cast<const Z*>(prev) + i * d, d, squares + 2 * i);
        });
        if (!norms) return;
        team.barrier();
        finish_norms(team, r, squares, norms);
    });
}

template <class Z, class T>
void gate_residual_adaln(const Rows& r, const void* z, const void* y, Vector gate, Vector shift,
                         Vector scale, void* z_out, void* out) {
    i64 n = r.batch * r.tokens, d = r.width;
    parallel(n * d, [&](Team team) {
        team.each(n, [&](i64 i) {
            i64 b = i / r.tokens;
            Z* o = static_cast<Z*>(z_out) + i * d;
            gate_row(static_cast<const Z*>(z) + i * d, static_cast<const T*>(y) + i * d,
                     row<T>(gate, b), o, d);
            adaln_row(o, row<T>(shift, b), row<T>(scale, b), static_cast<T*>(out) + i * d, d);
        });
    });
}

// Sums over the tokens of each sample: body(b, first, end, partial) adds tokens first..end to
// `partial` (k,D), which starts at zero; add(b, column offset 0..k D) receives the sums of all
// chunks in their order.
template <class Body>
void token_sums(const Rows& r, int k, const Sum* sums, i64 work, Body body) {
    i64 d = r.width, chunks = max2<i64>(1, ceil_div(r.tokens, CHUNK)), size = k * d;
    float* partial = reinterpret_cast<float*>(scratch(size_t(r.batch * chunks * size + 1) * 4));
    parallel(work, [&](Team team) {
        team.each(r.batch * chunks, [&](i64 i) {
            i64 b = i / chunks, first = i % chunks * CHUNK;
            float* p = partial + i * size;
            __builtin_memset(p, 0, size_t(size) * 4);
            body(b, first, min2(r.tokens, first + CHUNK), p);
        });
        team.barrier();
        team.each(r.batch * k, [&](i64 i) {
            i64 b = i / k, which = i % k;
            float* into = sums[which].p + b * sums[which].stride;
            const float* p = partial + b * chunks * size + which * d;
            columns(d, [&](i64 c, i64 n) {
                vf s = get(p + c, n);
                for (i64 j = 1; j < chunks; j++) s += get(p + j * size + c, n);
                put(into + c, get(into + c, n) + s, n);
            });
        });
    });
}

template <class Z, class T>
inline void adaln_backward_row(const T* dy, const Z* z, const T* scale, Z* dz, float* dshift,
                               float* dscale, i64 d) {
    Moments m = moments(z, d);
    vf s0{}, s1{};
    columns(d, [&](i64 c, i64 n) {
        vf g = get(dy + c, n), xhat = (get(z + c, n) - m.mean) * m.rstd;
        put(dshift + c, get(dshift + c, n) + g, n);
        put(dscale + c, get(dscale + c, n) + g * xhat, n);
        g *= 1.f + get(scale + c, n);
        // behind the width g is zero, xhat is not
        s0 += g;
        s1 += g * xhat;
    });
    float mean_g = sum(s0) / float(d), mean_gx = sum(s1) / float(d);
    columns(d, [&](i64 c, i64 n) {
        vf xhat = (get(z + c, n) - m.mean) * m.rstd, g = get(dy + c, n) * (1.f + get(scale + c, n));
        put(dz + c, get(dz + c, n) + m.rstd * (g - mean_g - xhat * mean_gx), n);
    });
}

template <class Z, class T>
void adaln_backward(const Rows& r, const void* dy, const void* z, Vector scale, void* dz,
                    Sum dshift, Sum dscale) {
    i64 d = r.width;
    Sum sums[2] = {dshift, dscale};
    token_sums(r, 2, sums, r.batch * r.tokens * d, [&](i64 b, i64 first, i64 end, float* p) {
        for (i64 i = b * r.tokens + first; i < b * r.tokens + end; i++)
            adaln_backward_row(static_cast<const T*>(dy) + i * d, static_cast<const Z*>(z) + i * d,
                               row<T>(scale, b), static_cast<Z*>(dz) + i * d, p, p + d, d);
    });
}

template <class Z, class T>
void gate_residual_backward(const Rows& r, const void* dout, const void* y, Vector gate, Sum dgate,
                            void* out) {
    i64 d = r.width;
    token_sums(r, 1, &dgate, r.batch * r.tokens * d, [&](i64 b, i64 first, i64 end, float* p) {
        const T* g = row<T>(gate, b);
        for (i64 i = b * r.tokens + first; i < b * r.tokens + end; i++) {
            const Z* dz = static_cast<const Z*>(dout) + i * d;
            const T* yi = static_cast<const T*>(y) + i * d;
            T* dy = static_cast<T*>(out) + i * d;
            columns(d, [&](i64 c, i64 n) {
                vf v = get(dz + c, n);
                put(p + c, get(p + c, n) + v * get(yi + c, n), n);
                put(dy + c, v * get(g + c, n), n);
            });
        }
    });
}

}  // namespace FPDM_ISA
}  // namespace fpdm
