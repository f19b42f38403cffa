// What the bindings hand to the kernels: addresses, distances and sizes, all in elements. A variant
// is one instruction set's copy of every kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fpdm {

using i64 = int64_t;

// stride of a weight that lies as Variant::pack leaves it
constexpr i64 PACKED = -1;

// dtype codes
enum { FLOAT32 = 0, BFLOAT16 = 1 };

// (B,D) with unit stride in D
struct Vector {
    const void* p;
    i64 stride;
};

// (B,D) float32 accumulator
struct Sum {
    float* p;
    i64 stride;
};

// operators on z (B,T,D) of z_type, the residual stream's; everything else is of `type`
struct Rows {
    i64 batch, tokens, width;
    int z_type, type;
};

// x W^T + b with W (cols,depth) when transposed, else x W with W (depth,cols)
struct Linear {
    i64 rows, cols, depth;
    int type, out_type;
    bool transposed, gelu;
    const void *x, *weight;
    i64 weight_stride;  // or PACKED
    const void *bias, *addend;
    void *pre, *out;  // null where not wanted: pre, and out before a gate
};

// the part of a fused linear that depends on the sample
struct Block {
    Rows rows;
    const void *z, *prev;
    Vector gate, shift, scale;
    void *z_out, *y;
    float* norms;
};

struct Shape {
    i64 batch, tokens, heads, width;  // width of a head
    int type;
    i64 stride() const { return 3 * heads * width; }
    float scale() const { return float(1 / __builtin_sqrt(double(width))); }
};

struct Variant {
    const char* name;
    i64 columns, pair;  // of a panel of packed weights; bfloat16 along the sum that lie together
    void (*adaln)(const Rows&, const void* z, Vector shift, Vector scale, void* out);
    void (*adaln_backward)(const Rows&, const void* dy, const void* z, Vector scale, void* dz,
                           Sum dshift, Sum dscale);
    void (*gate_residual)(const Rows&, const void* z, const void* y, Vector gate, void* out,
                          const void* prev, float* norms);
    void (*gate_residual_adaln)(const Rows&, const void* z, const void* y, Vector gate,
                                Vector shift, Vector scale, void* z_out, void* out);
    void (*gate_residual_backward)(const Rows&, const void* dout, const void* y, Vector gate,
                                   Sum dgate, void* out);
    void (*gelu)(int type, i64 n, const void* x, void* out);
    void (*gelu_backward)(int type, i64 n, const void* dy, const void* x, void* out, float* total);
    // W (cols,depth) as panels (cols / columns, depth / pair, columns, pair), zeros behind its end
    void (*pack)(int type, i64 cols, i64 depth, const void* weight, i64 stride, void* out);
    void (*linear)(const Linear&);
    void (*adaln_linear)(const Linear&, const Block&);
    void (*linear_gate)(const Linear&, const Block&);
    void (*wgrad)(int type, i64 rows, i64 outs, i64 ins, const void* dy, const void* x,
                  float* dweight, i64 stride, float* dbias);
    void (*attention)(const Shape&, const void* qkv, void* out);
    void (*attention_backward)(const Shape&, const void* dy, const void* qkv, void* out);
};

// the variant of that name, or the best one without a name; null when this processor cannot run it
const Variant* choose(const char* wanted);

// throws std::bad_alloc: compiled once, since the variants share no code of the standard library
[[noreturn]] void out_of_memory(size_t bytes);

namespace portable {
extern const Variant variant;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Variant variant;
}
namespace avx512 {
extern const Variant variant;
}
namespace avx512_bf16 {
extern const Variant variant;
}
#endif

}  // namespace fpdm
