// Small kernels with one fault each, and controls without: what the shim must and must not report.
#pragma once

#include <elements.cuh>

namespace fpdm {

struct PlantedParams {  // "PP": 16 bytes
    const float* in;    // (64,)
    float* out;         // (64,)
};

enum class Fault {
    none,
    no_sync_block,
    warp_order,
    no_sync_warp,
    read_then_write,
    shared_bounds,
    shared_alignment,
    red_zone,
    divergence,
    lost_lanes,
    early_exit,
    global_bounds,
    global_alignment,
    global_race,
    unwritten,
    too_large,
};

template <Fault F>
struct PlantedTraits {
    static constexpr i32 threads = 64;
    static FPDM_CONSTEXPR i32 smem_bytes() { return F == Fault::too_large ? 100 * 1024 : 256; }
};

template <Fault F>
FPDM_KERNEL void planted_kernel(const PlantedParams p) {
    float* words = reinterpret_cast<float*>(shared_base());
    const i32 x = thread_x();
    float v = ld_global(p.in + x);
    if constexpr (F == Fault::none || F == Fault::no_sync_block || F == Fault::too_large) {
        st_shared(words + x, v);
        if constexpr (F != Fault::no_sync_block) sync_block();
        v = ld_shared(words + (x + 1) % 64);
    } else if constexpr (F == Fault::warp_order || F == Fault::no_sync_warp) {
        st_shared(words + x, v);
        if constexpr (F == Fault::warp_order) sync_warp();
        v = shuffle(v, 0);  // orders nothing
        v = ld_shared(words + (x ^ 1));
    } else if constexpr (F == Fault::read_then_write) {
        v = ld_shared(words + 5);
        if (x == 40) st_shared(words + 5, v);
    } else if constexpr (F == Fault::shared_bounds) {
        if (x == 3) v = ld_shared(words + 64);
    } else if constexpr (F == Fault::shared_alignment) {
        if (x == 3) v = float_of_bits(ld_shared(reinterpret_cast<const Pack8*>(words + 1)).x);
    } else if constexpr (F == Fault::red_zone) {
        if (x == 3) shared_base()[256 + 7] = 0;
    } else if constexpr (F == Fault::divergence) {
        if (x == 3) {
            sync_warp();
        } else {
            v = shuffle(v, 0);
        }
    } else if constexpr (F == Fault::lost_lanes) {
        if (x % 2) return;
        v = shuffle_xor(v, 2);
    } else if constexpr (F == Fault::early_exit) {
        if (x >= 32) return;
        sync_block();
    } else if constexpr (F == Fault::global_bounds) {
        v = ld_global(p.in + x + 1);
    } else if constexpr (F == Fault::global_alignment) {
        if (x == 3) v = float_of_bits(ld_global8(p.in + 1).x);
    } else if constexpr (F == Fault::global_race) {
        st_global(p.out + x / 2, v);
    } else if constexpr (F == Fault::unwritten) {
        v = ld_shared(words + x);
    }
    st_global(p.out + x, v);
}

struct ProductParams {  // "PPP": 24 bytes
    const void* a;      // (32,4) halves, by lane
    const void* b;      // (32,4) halves
    float* c;           // (32,8), added to
};

struct ProductTraits {
    static constexpr i32 threads = 32;
    static FPDM_CONSTEXPR i32 smem_bytes() { return 0; }
};

template <bool Rows>
FPDM_KERNEL void product_kernel(const ProductParams p) {
    const Pack8 a = ld_global8(static_cast<const half_t*>(p.a) + 4 * thread_x());
    const Pack8 b = ld_global8(static_cast<const half_t*>(p.b) + 4 * thread_x());
    float c[8];
    for (i32 i = 0; i < 8; ++i) c[i] = ld_global(p.c + 8 * thread_x() + i);
    if constexpr (Rows) {
        mma884_row(c, a, b);
    } else {
        mma884(c, a, b);
    }
    for (i32 i = 0; i < 8; ++i) st_global(p.c + 8 * thread_x() + i, c[i]);
}

}  // namespace fpdm
