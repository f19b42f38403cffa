// Switching between stacks: six registers on x86-64, ucontext elsewhere (or with SHIM_UCONTEXT).
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace shim {

constexpr std::size_t STACK = 64 * 1024;

#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)

extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type shim_switch,@function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch,.-shim_switch
)");

inline void switch_stack(void** from, void* to) { shim_switch(from, to); }

// what the scheduler's own stack pointer is before its first switch
inline void* own_stack() { return nullptr; }

// what switch_stack takes to call `entry` on a fresh stack whose last byte is before `top`
inline void* fresh_stack(i32, unsigned char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(top) & ~std::uintptr_t(15));
    *--sp = nullptr;  // a return address would be here: the ABI's alignment
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    return sp;
}

#else

}  // namespace shim
#include <ucontext.h>
namespace shim {

inline ucontext_t contexts[MAX_THREADS + 1];

// a stack pointer is the context's address and never changes
inline void switch_stack(void** from, void* to) {
    swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

inline void* own_stack() { return &contexts[MAX_THREADS]; }

inline void* fresh_stack(i32 x, unsigned char* top, void (*entry)()) {
    ucontext_t* context = &contexts[x];
    getcontext(context);
    context->uc_stack.ss_sp = top - STACK;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

#endif

}  // namespace shim
