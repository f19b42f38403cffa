// Runs one thread block after another on a CPU: every thread of a block is a fiber that gives way at
// barriers, shuffles and mma, and every access to memory is checked.
//
// Order between threads comes from sync_block (all threads of the block) and sync_warp (the threads
// of a warp) alone. Volta schedules threads independently, and neither shuffle nor mma is a memory
// barrier, so two accesses of different threads to one shared word, at least one a write, without
// such an order between them are reported, whatever the fibers' own order was. Global memory has no
// order within a launch at all: what one thread writes, no other may touch.
#pragma once

#include <types.cuh>

namespace shim {

using fpdm::i32;
using fpdm::i64;
using fpdm::u16;
using fpdm::u32;
using fpdm::u64;

constexpr i32 MAX_THREADS = 1024;
constexpr i32 RED_ZONE = 1024;  // bytes on either side of the dynamic shared memory

enum class Stop : unsigned char { none, block, warp, shuffle, mma, mma_row, exit };

// a fiber; `stack` is its stack pointer while another one runs
struct Thread {
    void* stack;
    Thread* next;  // who runs when this one stops
    i32 x;
    Stop stop;
    // operands of a warp's collective, and what this lane gets from a shuffle
    u32 value, got;
    i32 from;
    float* c;
    fpdm::Pack8 a, b;
};

struct Block {
    i32 index[3];
    i32 grid[3];
    i32 threads;
    unsigned char* shared;  // 16-byte aligned
    i64 shared_bytes;
};

// memory that a kernel was given
struct Span {
    u64 begin, end;
};

extern Thread* current;
extern Block block;

// gives way until all threads of the block (Stop::block) or warp have arrived
void wait(Stop what);
// ends the launch with a message
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void shared_access(const void* p, u32 bytes, bool write);
void global_access(const void* p, u32 bytes, bool write);

using Body = void (*)(const void* params);

// one kernel of the registry
struct Kernel {
    const char* name;
    i32 threads;  // per block, at most
    i32 smem;     // bytes
    i32 rows;     // per block, where the kernel fixes it
    u32 params_bytes;
    Body body;
};

template <class P>
constexpr u32 params_bytes(void (*)(P)) {
    return sizeof(P);
}

template <auto kernel, class P>
void call(void (*)(P), const void* params) {
    kernel(*static_cast<const P*>(params));
}

// null-terminated message of what went wrong, or null; `reverse`: last blocks and warps first
const char* launch(const Kernel& kernel, const u32* grid, u32 threads, const void* params,
                   const Span* spans, u32 span_count, bool reverse);

}  // namespace shim
