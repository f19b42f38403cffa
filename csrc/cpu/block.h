// One application of the block x -> f(x), forward and backward: kernel after kernel as
// fpdm/block.py orders them, nothing but kernels in between. Residual stream and products are of one
// type.
#pragma once

#include "kernels.h"

namespace fpdm {

struct Weight {
    const void* p;
    i64 stride;
    const void* bias;
};

// float32, added to; null where the weight is frozen
struct Gradient {
    float* p;
    i64 stride;
    float* bias;
};

template <class T>
struct Products {
    T inj_a, inj_w2, qkv, proj, fc1, fc2;
};

// what every application reads, of `rows.batch` samples; without injection u is null
struct Operands {
    Rows rows;
    i64 heads;
    void *u, *modulation;  // (B,T,2D), (B,6D)
    i64 modulation_stride;
    Products<Weight> w;
};

constexpr i64 ACTIVATIONS = 12;

// what a backward reads again (fpdm/block.py); null: not kept
struct Activations {
    void *pre, *a, *z, *y1, *qkv, *o, *p, *z2, *y2, *h, *gh, *r;
};

// where that lives which is not kept
struct Workspace {
    void *wide, *y, *o;  // (B,T,4D), (B,T,D) twice
};

// out = f(x), elsewhere; norms: |f(x) - x| and |f(x)| per sample (2,B), or null
void forward(const Variant&, const Operands&, const Activations& keep, const Workspace&,
             const void* x, void* out, float* norms);

struct Sums {
    Products<Gradient> w;
    float *modulation, *u;  // (B,6D), (B,T,2D)
    i64 modulation_stride;
    bool frozen() const { return !w.qkv.p; }
};

struct Reverse {
    void *wide, *d0, *d1, *e;  // (B,T,4D), (B,T,D) three times
};

// g becomes the gradient with respect to z, f's first half: x without injection
void backward(const Variant&, const Operands&, const Activations& kept, const Sums&,
              const Reverse&, const void* z, void* g);

// z = W2 gelu(A x + u) + b2: g goes on from z to x, where `wants_dx`
void injection_backward(const Variant&, const Operands&, const Activations& kept, const Sums&,
                        const Reverse&, const void* x, void* g, bool wants_dx);

// out = f(x) again from what is kept of it: (z + g1 p) + g2 r
void again(const Variant&, const Operands&, const Activations& kept, const void* z, void* out);

inline i64 element(int type) { return type == FLOAT32 ? 4 : 2; }
inline char* bytes(void* p) { return static_cast<char*>(p); }
inline const char* bytes(const void* p) { return static_cast<const char*>(p); }

}  // namespace fpdm
