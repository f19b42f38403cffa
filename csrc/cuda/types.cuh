// Plain types shared by every kernel, on the device and on a host. No std headers: NVRTC has none.
#pragma once

namespace fpdm {

using i32 = int;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// storage only; arithmetic is float32
struct half_t {
    u16 bits;
};

struct alignas(8) Pack8 {
    u32 x, y;
};

struct alignas(16) Pack16 {
    u32 x, y, z, w;
};

static_assert(sizeof(i64) == 8 && sizeof(u32) == 4 && sizeof(half_t) == 2);
static_assert(sizeof(Pack8) == 8 && sizeof(Pack16) == 16);

constexpr i32 WARP = 32;
constexpr i32 SMEM_LIMIT = 96 * 1024;  // dynamic shared memory of one block on sm_70

}  // namespace fpdm
