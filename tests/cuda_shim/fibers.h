// Fibers for the threads of a block: stacks of their own, and a switch that the sanitizers know of.
//
// The host resumes a fiber, the fiber suspends itself back to the host. On x86-64 the switch is written out, because
// swapcontext makes a system call each time and a kernel switches at every barrier, mma and shuffle of every thread.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

#if defined(__x86_64__) && !defined(CUDA_SHIM_UCONTEXT)
#define CUDA_SHIM_OWN_SWITCH
// Pushes what a function must preserve, leaves its stack pointer in *from and takes up `to`, left the same way.
extern "C" void cuda_shim_switch(void** from, void* to);
asm(R"(
    .pushsection .text
    .type cuda_shim_switch, @function
cuda_shim_switch:
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
    .size cuda_shim_switch, .-cuda_shim_switch
    .popsection
)");
#else
#include <ucontext.h>
#endif

namespace cuda_shim {

// Enough for a kernel and for what a sanitizer needs to report an error in it.
constexpr size_t kStackBytes = 256 << 10;

struct Context {
#ifdef CUDA_SHIM_OWN_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t state;
#endif
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    void* sanitizer = nullptr;  // AddressSanitizer's fake stack, or ThreadSanitizer's fiber
};

// A new fiber's stack, with a page below it that faults.
inline char* new_stack() {
    const size_t guard = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
        std::perror("CUDA shim: no memory for a fiber's stack");
        std::abort();
    }
    return static_cast<char*>(memory) + guard;
}

// Readies a fiber whose first resumption calls `entry`, which never returns.
inline void start(Context& fiber, void (*entry)()) {
    char* stack = new_stack();
    fiber.stack = stack;
    fiber.stack_bytes = kStackBytes;
#ifdef CUDA_SHIM_OWN_SWITCH
    // Six registers, the address that the switch returns to, and no caller above it, where a stack trace ends.
    auto top = reinterpret_cast<uintptr_t*>(stack + kStackBytes) - 8;
    top[6] = reinterpret_cast<uintptr_t>(entry);
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.state);
    fiber.state.uc_stack.ss_sp = stack;
    fiber.state.uc_stack.ss_size = kStackBytes;
    fiber.state.uc_link = nullptr;
    makecontext(&fiber.state, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
}

// Makes `host` the context of the thread that calls.
inline void adopt([[maybe_unused]] Context& host) {
#if defined(__SANITIZE_THREAD__)
    host.sanitizer = __tsan_get_current_fiber();
#endif
}

// To be called first in `entry` and after each switch: AddressSanitizer learns on which stack it is, and `previous`
// where its own is.
inline void arrive([[maybe_unused]] Context& here, [[maybe_unused]] Context& previous) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(here.sanitizer, &previous.stack, &previous.stack_bytes);
#endif
}

// Returns when something switches back to `from`.
inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUDA_SHIM_OWN_SWITCH
    cuda_shim_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.state, &to.state);
#endif
    arrive(from, to);
}

// What ThreadSanitizer is told. Fibers are unordered to it but for these; the shim's own memory is not its business.
inline void released([[maybe_unused]] void* order) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(order);
#endif
}
inline void acquired([[maybe_unused]] void* order) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(order);
#endif
}
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
    Unwatched() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unwatched() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    Unwatched() {}
    ~Unwatched() {}
#endif
};

}  // namespace cuda_shim
