#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fibers.h"

namespace shim {

Thread* current = nullptr;
Block block;

namespace {

constexpr i32 WARP = fpdm::WARP;
constexpr i32 MAX_WORDS = 256 * 1024 / 4;
constexpr u16 MANY = 0xffff;
constexpr unsigned char RED = 0xa5, NAN_BYTE = 0xff;
// stacks start at different cache sets, or 32 lanes would share one
constexpr std::size_t STAGGER = 832, STACK_STEP = STACK + STAGGER;

// who last wrote and read a shared word, and when: `barrier` counts sync_block, `sync` a warp's
// sync_warp. Readers in one barrier epoch are one thread, many of one warp, or of MANY warps.
struct Word {
    u32 write_barrier, write_sync;
    u32 read_barrier, read_sync;
    u16 writer, reader, reader_warp;
};

Thread threads[MAX_THREADS];
u32 warp_sync[MAX_THREADS / WARP];
u32 barrier;
Word words[MAX_WORDS];
alignas(16) unsigned char shared[RED_ZONE + MAX_WORDS * 4 + RED_ZONE];
unsigned char* stacks;
void* scheduler;
char message[512];
bool failed;
bool backwards;
Body body;
const void* parameters;

// an operand, without what it shares with others, and who touched its 2-byte units: a thread of
// the launch, MANY_THREADS, or 0
struct Region {
    Span span;
    std::vector<u32> writers, readers;
};
constexpr u32 MANY_THREADS = 0xffffffffu;
std::vector<Region> regions;

void resume(Thread* next) {
    Thread* self = current;
    current = next;
    switch_stack(self == nullptr ? &scheduler : &self->stack,
                 next == nullptr ? scheduler : next->stack);
}

void entry() {
    body(parameters);
    current->stop = Stop::exit;
    resume(current->next);
}

void report(const char* format, std::va_list args) {
    if (failed) return;
    failed = true;
    i32 n = std::snprintf(message, sizeof message, "block (%d,%d,%d)", block.index[0],
                          block.index[1], block.index[2]);
    if (current != nullptr) {
        n += std::snprintf(message + n, sizeof message - n, " thread %d", current->x);
    }
    n += std::snprintf(message + n, sizeof message - n, ": ");
    std::vsnprintf(message + n, sizeof message - n, format, args);
}

__attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    report(format, args);
    va_end(args);
}

[[noreturn]] void conflict(const char* what, i64 word, i32 first) {
    char other[32] = "several threads";
    if (first >= 0) std::snprintf(other, sizeof other, "thread %d", first);
    fail("race: %s shared word %lld (byte %lld), %s and thread %d, no barrier between (epoch %u)",
         what, word, 4 * word, other, current->x, barrier);
}

void write_word(i64 index) {
    Word& w = words[index];
    const i32 me = current->x, warp = me / WARP;
    const u32 now = warp_sync[warp];
    if (w.write_barrier == barrier && w.writer != me &&
        (w.writer / WARP != warp || w.write_sync == now)) {
        conflict("two writes of", index, w.writer);
    }
    if (w.read_barrier == barrier) {
        const bool ordered = w.reader_warp == warp && (w.read_sync != now || w.reader == me);
        if (!ordered) conflict("read and write of", index, w.reader == MANY ? -1 : w.reader);
    }
    w.write_barrier = barrier;
    w.write_sync = now;
    w.writer = u16(me);
}

void read_word(i64 index) {
    Word& w = words[index];
    const i32 me = current->x, warp = me / WARP;
    const u32 now = warp_sync[warp];
    if (w.write_barrier == barrier && w.writer != me &&
        (w.writer / WARP != warp || w.write_sync == now)) {
        conflict("write and read of", index, w.writer);
    }
    if (w.read_barrier != barrier) {
        w.read_barrier = barrier;
        w.reader_warp = u16(warp);
        w.read_sync = now;
        w.reader = u16(me);
    } else if (w.reader_warp != warp) {
        w.reader_warp = MANY;
        w.reader = MANY;
    } else if (w.read_sync != now) {
        w.read_sync = now;
        w.reader = u16(me);
    } else if (w.reader != me) {
        w.reader = MANY;
    }
}

const char* name_of(Stop stop) {
    static const char* const names[] = {"none",    "sync_block", "sync_warp",  "shuffle",
                                        "mma884", "mma884_row", "the end"};
    return names[i32(stop)];
}

float half_to_float(u16 bits) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return float(h);
}

// The tensor cores of Volta do not round the sum of four products and an accumulator to nearest,
// they truncate it.
float truncate(double v) {
    u64 bits;
    std::memcpy(&bits, &v, 8);
    if (std::isfinite(v) && std::fabs(v) >= 0x1p-126) bits &= ~((u64(1) << 29) - 1);
    std::memcpy(&v, &bits, 8);
    return float(v);
}

// the lane map of the PTX ISA for mma.m8n8k4 with float32 accumulators
void multiply(Thread* lanes, bool rows) {
    for (i32 quad = 0; quad < 4; ++quad) {
        float a[8][4], b[4][8];
        Thread* lane_of[8];
        for (i32 i = 0; i < 8; ++i) {
            lane_of[i] = &lanes[4 * quad + i % 4 + (i >= 4 ? 16 : 0)];
            const u32 wa[2] = {lane_of[i]->a.x, lane_of[i]->a.y};
            const u32 wb[2] = {lane_of[i]->b.x, lane_of[i]->b.y};
            for (i32 k = 0; k < 4; ++k) {
                a[i][k] = half_to_float(u16(wa[k / 2] >> 16 * (k % 2)));
                const float value = half_to_float(u16(wb[k / 2] >> 16 * (k % 2)));
                if (rows) {
                    b[i % 4][k + (i >= 4 ? 4 : 0)] = value;
                } else {
                    b[k][i] = value;
                }
            }
        }
        double d[8][8];
        for (i32 m = 0; m < 8; ++m) {
            for (i32 n = 0; n < 8; ++n) {
                d[m][n] = double(a[m][0]) * b[0][n] + double(a[m][1]) * b[1][n] +
                          double(a[m][2]) * b[2][n] + double(a[m][3]) * b[3][n];
            }
        }
        for (i32 i = 0; i < 8; ++i) {
            const i32 l = lane_of[i]->x % WARP;
            for (i32 e = 0; e < 8; ++e) {
                const i32 m = (l & 1) + (e & 2) + (l >= 16 ? 4 : 0);
                const i32 n = (e & 4) + (l & 2) + (e & 1);
                lane_of[i]->c[e] = truncate(double(lane_of[i]->c[e]) + d[m][n]);
            }
        }
    }
}

// all lanes of a warp stopped at the same collective
void perform(Thread* lanes, Stop what, i32 warp) {
    if (what == Stop::warp) ++warp_sync[warp];
    if (what == Stop::shuffle) {
        for (i32 l = 0; l < WARP; ++l) lanes[l].got = lanes[lanes[l].from % WARP].value;
    }
    if (what == Stop::mma || what == Stop::mma_row) multiply(lanes, what == Stop::mma_row);
}

// runs a warp until its lanes wait for the block (true) or have ended (false)
bool run_warp(i32 warp) {
    Thread* lanes = &threads[warp * WARP];
    while (!failed) {
        Thread* first = nullptr;
        for (i32 l = WARP - 1; l >= 0; --l) {
            if (lanes[l].stop == Stop::exit) continue;
            lanes[l].next = first;
            first = &lanes[l];
        }
        if (first == nullptr) return false;
        resume(first);
        if (failed) break;
        bool ended = false;
        Thread* alive = nullptr;
        for (i32 l = 0; l < WARP; ++l) {
            Thread& t = lanes[l];
            ended |= t.stop == Stop::exit;
            if (t.stop == Stop::exit) continue;
            if (alive != nullptr && t.stop != alive->stop) {
                refuse("divergence: thread %d waits at %s, thread %d at %s", alive->x,
                       name_of(alive->stop), t.x, name_of(t.stop));
                return false;
            }
            if (alive == nullptr) alive = &t;
        }
        if (alive == nullptr) return false;
        if (alive->stop == Stop::block) return true;
        if (ended && alive->stop != Stop::warp) {
            refuse("divergence: thread %d waits at %s, other lanes have ended", alive->x,
                   name_of(alive->stop));
            return false;
        }
        perform(lanes, alive->stop, warp);
    }
    return false;
}

void check_red_zones() {
    const i64 words_used = (block.shared_bytes + 15) / 16 * 16;
    for (i64 i = -RED_ZONE; i < words_used + RED_ZONE; ++i) {
        if (i >= 0 && i < block.shared_bytes) continue;
        if (block.shared[i] != RED) {
            refuse("red zone of the shared memory (%lld bytes) was written at byte %lld",
                   block.shared_bytes, i);
            return;
        }
    }
}

void run_block() {
    ++barrier;
    std::memset(block.shared - RED_ZONE, RED, block.shared_bytes + 15 + 2 * RED_ZONE);
    std::memset(block.shared, NAN_BYTE, block.shared_bytes);
    for (i32 x = 0; x < block.threads; ++x) {
        unsigned char* top = stacks + x * STACK_STEP + STACK;
        threads[x] = Thread{};
        threads[x].x = x;
        threads[x].stack = fresh_stack(x, top, entry);
    }
    for (bool waiting = true; waiting && !failed; ++barrier) {
        waiting = false;
        const i32 warps = block.threads / WARP;
        for (i32 i = 0; i < warps && !failed; ++i) {
            waiting |= run_warp(backwards ? warps - 1 - i : i);
        }
    }
    if (!failed) check_red_zones();
}

}  // namespace

void fail(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    report(format, args);
    va_end(args);
    resume(nullptr);
    __builtin_unreachable();
}

void wait(Stop what) {
    current->stop = what;
    resume(current->next);
}

void shared_access(const void* p, u32 bytes, bool write) {
    const i64 at = static_cast<const unsigned char*>(p) - block.shared;
    if (at < 0 || at + i64(bytes) > block.shared_bytes) {
        fail("shared memory: %u bytes at byte %lld, expected within %lld", bytes, at,
             block.shared_bytes);
    }
    if (at % bytes != 0) fail("shared memory: %u bytes at byte %lld, misaligned", bytes, at);
    for (i64 word = at / 4; word < (at + bytes) / 4; ++word) {
        write ? write_word(word) : read_word(word);
    }
}

void global_access(const void* p, u32 bytes, bool write) {
    const u64 at = reinterpret_cast<u64>(p);
    if (at % bytes != 0) fail("global memory: %u bytes at %p, misaligned", bytes, p);
    static std::size_t last = 0;
    const auto holds = [&](const Region& r) { return at >= r.span.begin && at + bytes <= r.span.end; };
    if (last >= regions.size() || !holds(regions[last])) {
        const auto found = std::find_if(regions.begin(), regions.end(), holds);
        if (found == regions.end()) {
            fail("global memory: %s of %u bytes at %p, outside of every operand",
                 write ? "write" : "read", bytes, p);
        }
        last = std::size_t(found - regions.begin());
    }
    Region& r = regions[last];
    const i64 linear = (i64(block.index[2]) * block.grid[1] + block.index[1]) * block.grid[0];
    const u32 me = u32((linear + block.index[0]) * block.threads + current->x + 1);
    for (u64 unit = (at - r.span.begin) / 2; unit < (at - r.span.begin + bytes) / 2; ++unit) {
        u32 &writer = r.writers[unit], &reader = r.readers[unit];
        const u32 other = writer != 0 && writer != me ? writer
                          : write && reader != 0 && reader != me ? reader
                                                                 : 0;
        if (other != 0) {
            fail("race: %s of global memory at %p, which another thread %s", write ? "write" : "read",
                 p, other == writer ? "writes" : "reads");
        }
        if (write) {
            writer = me;
        } else {
            reader = reader == 0 || reader == me ? me : MANY_THREADS;
        }
    }
}

// operands that overlap become one region
static void set_regions(const Span* given, u32 count) {
    std::vector<Span> spans(given, given + count);
    std::sort(spans.begin(), spans.end(), [](Span a, Span b) { return a.begin < b.begin; });
    regions.clear();
    for (const Span& s : spans) {
        if (!regions.empty() && s.begin < regions.back().span.end) {
            regions.back().span.end = std::max(regions.back().span.end, s.end);
        } else {
            regions.push_back({s, {}, {}});
        }
    }
    for (Region& r : regions) {
        r.writers.assign((r.span.end - r.span.begin) / 2, 0);
        r.readers.assign((r.span.end - r.span.begin) / 2, 0);
    }
}

const char* launch(const Kernel& kernel, const u32* grid, u32 block_threads, const void* params,
                   const Span* spans, u32 span_count, bool reverse) {
    failed = false;
    backwards = reverse;
    current = nullptr;
    scheduler = own_stack();
    block = Block{};
    if (stacks == nullptr) {
        void* mapped = mmap(nullptr, MAX_THREADS * STACK_STEP, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return "no memory for stacks";
        stacks = static_cast<unsigned char*>(mapped);
    }
    if (block_threads == 0 || block_threads % WARP != 0 || i64(block_threads) > kernel.threads) {
        refuse("block of %u threads, expected whole warps and at most %d", block_threads,
               kernel.threads);
    }
    if (kernel.smem > fpdm::SMEM_LIMIT) {
        refuse("dynamic shared memory: %d bytes, expected at most %d", kernel.smem,
               fpdm::SMEM_LIMIT);
    }
    if (failed) return message;
    body = kernel.body;
    parameters = params;
    set_regions(spans, span_count);
    block.threads = i32(block_threads);
    block.shared = shared + RED_ZONE;
    block.shared_bytes = kernel.smem;
    for (i32 d = 0; d < 3; ++d) block.grid[d] = i32(grid[d]);
    const i64 blocks = i64(block.grid[0]) * block.grid[1] * block.grid[2];
    for (i64 i = 0; i < blocks && !failed; ++i) {
        const i64 linear = backwards ? blocks - 1 - i : i;
        block.index[0] = i32(linear % block.grid[0]);
        block.index[1] = i32(linear / block.grid[0] % block.grid[1]);
        block.index[2] = i32(linear / block.grid[0] / block.grid[1]);
        run_block();
    }
    return failed ? message : nullptr;
}

}  // namespace shim
