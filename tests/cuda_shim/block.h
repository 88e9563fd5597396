// A block of threads, run one at a time: each until it waits for others, then the first in the order that can go on.
//
// The order is AMQ_SHIM_ORDER: forward (default), reverse, or random:SEED, for threads and blocks alike. Of two threads
// between the same two barriers, forward runs one first and reverse the other, so results that depend on which was
// first differ. Threads that do not all come to the same barrier or warp-wide operation end the process with a message.

#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"
#include "shared_memory.h"

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {

constexpr int kWarp = 32;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    std::fprintf(stderr, "CUDA shim: ");
    va_list values;
    va_start(values, format);
    std::vfprintf(stderr, format, values);
    va_end(values);
    std::fprintf(stderr, "\n");
    std::abort();
}

// Where threads wait for each other: which operation, on which line of the kernel.
struct Site {
    const char* operation;
    const char* file;
    int line;
    bool operator==(const Site& other) const {
        return line == other.line && !std::strcmp(operation, other.operation) && !std::strcmp(file, other.file);
    }
    std::string text() const { return std::string(operation) + " (" + file + ":" + std::to_string(line) + ")"; }
};

// Threads that must all come to one site before any goes on: a warp or the block.
struct Group {
    int first, count;
    int arrived = 0, met = 0;
    Site site{};
};

enum class State { kRuns, kWaits, kReturned };

struct Fiber {
    Context context;
    State state;
    Site site;       // where it waits
    void* exchange;  // what it brings to a warp-wide operation
};

class Order {
   public:
    // Read at each launch, so that one process can try several.
    void read() {
        const char* value = std::getenv("AMQ_SHIM_ORDER");
        const std::string name = value ? value : "forward";
        char* end = nullptr;
        const unsigned long seed = name.rfind("random:", 0) == 0 ? std::strtoul(value + 7, &end, 10) : 0;
        random_ = end && end != value + 7 && *end == 0;
        reverse_ = name == "reverse";
        if (!random_ && !reverse_ && name != "forward")
            fail("AMQ_SHIM_ORDER: expected forward, reverse or random:SEED, got '%s'", value);
        generator_.seed(seed);
    }
    std::vector<int> of(int count) {
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        if (reverse_) std::reverse(order.begin(), order.end());
        if (random_) std::shuffle(order.begin(), order.end(), generator_);
        return order;
    }
    // The place in the order to look from for a thread that can go on.
    int start(int count) { return random_ ? static_cast<int>(generator_() % count) : 0; }

   private:
    bool random_ = false, reverse_ = false;
    std::mt19937 generator_;
};

class Block {
   public:
    // The kernel, called on each fiber, and its arguments.
    using Kernel = void (*)(const void*);

    void run_grid(int blocks, int threads, Kernel kernel, const void* arguments) {
        const std::lock_guard<std::mutex> one_at_a_time(mutex_);
        const Unwatched unwatched;
        adopt(host_);
        order_.read();
        kernel_ = kernel;
        arguments_ = arguments;
        blockDim.x = threads;
        gridDim.x = blocks;
        while (static_cast<int>(fibers_.size()) < threads) {
            fibers_.push_back(std::make_unique<Fiber>());
            start(fibers_.back()->context, &fiber_main);
        }
        for (int block : order_.of(blocks)) {
            blockIdx.x = block;
            spoil_shared_memory();
            run(threads);
        }
    }

    // Of the fiber that runs: waits until the whole block is here.
    void synchronize(const char* file, int line) {
        const Unwatched unwatched;
        char* barrier = &barriers_[everyone_.met % 2];  // two: who waits must not learn of what follows the barrier
        released(barrier);
        meet(everyone_, {"synchronize", file, line}, [](const Group&) {});
        acquired(barrier);
    }

    // Of the fiber that runs: waits until its warp is here, each thread with a T; `combine` then works on all 32.
    template <class T>
    void with_warp(const Site& site, T& mine, void (*combine)(T* const (&)[kWarp])) {
        const Unwatched unwatched;
        fibers_[current_]->exchange = &mine;
        meet(warps_[current_ / kWarp], site, [&](const Group& warp) {
            T* lanes[kWarp];
            for (int lane = 0; lane < kWarp; ++lane)
                lanes[lane] = static_cast<T*>(fibers_[warp.first + lane]->exchange);
            combine(lanes);
        });
    }

   private:
    static void fiber_main();

    void run(int threads) {
        position_.resize(threads);
        turns_ = order_.of(threads);
        for (int i = 0; i < threads; ++i) position_[turns_[i]] = i;
        ready_.assign((threads + 63) / 64, 0);
        for (int i = 0; i < threads; ++i) set_ready(i);
        everyone_ = {0, threads};
        warps_.clear();
        for (int i = 0; i < threads; i += kWarp) warps_.push_back({i, kWarp});
        released(&begin_);
        for (returned_ = 0; returned_ < threads;) {
            current_ = next(threads);
            if (current_ < 0) diverged("no thread can go on");
            threadIdx.x = current_;
            switch_to(host_, fibers_[current_]->context);
        }
        acquired(&end_);
    }

    void set_ready(int thread) {
        fibers_[thread]->state = State::kRuns;
        ready_[position_[thread] / 64] |= uint64_t{1} << position_[thread] % 64;
    }

    // The next thread in the order that can go on, taken off the list of those; -1 if there is none.
    int next(int threads) {
        const int start = order_.start(threads), words = static_cast<int>(ready_.size());
        for (int i = 0; i <= words; ++i) {  // the first word twice: what lies before `start` comes last
            const int word = (start / 64 + i) % words;
            const uint64_t bits = i == 0 ? ready_[word] & ~uint64_t{0} << start % 64 : ready_[word];
            if (bits == 0) continue;
            const int bit = __builtin_ctzll(bits);
            ready_[word] &= ~(uint64_t{1} << bit);
            return turns_[word * 64 + bit];
        }
        return -1;
    }

    void suspend(State state) {
        Fiber& fiber = *fibers_[current_];
        fiber.state = state;
        switch_to(fiber.context, host_);
    }

    // The last of the group to come completes the operation for all, and goes on when its turn comes like the others:
    // if it went on at once, the order of the rest would not be the one asked for.
    template <class Complete>
    void meet(Group& group, const Site& site, Complete complete) {
        Fiber& fiber = *fibers_[current_];
        fiber.site = site;
        if (group.arrived == 0) group.site = site;
        if (!(group.site == site)) {
            fiber.state = State::kWaits;
            diverged("threads of one group wait at two places");
        }
        if (++group.arrived == group.count) {
            group.arrived = 0;
            ++group.met;
            complete(group);
            for (int i = 0; i < group.count; ++i) set_ready(group.first + i);
        }
        suspend(group.arrived == 0 ? State::kRuns : State::kWaits);
    }

    std::string doing(int thread) const {
        const Fiber& fiber = *fibers_[thread];
        if (fiber.state == State::kReturned) return "returned";
        return fiber.state == State::kWaits ? "waits at " + fiber.site.text() : "has not come there";
    }

    [[noreturn]] void diverged(const char* what) const {
        std::string text;
        const int threads = everyone_.count;
        for (int first = 0, last; first < threads; first = last + 1) {
            for (last = first; last + 1 < threads && doing(last + 1) == doing(first);) ++last;
            text += "\n  thread " + std::to_string(first);
            if (last > first) text += " to " + std::to_string(last);
            text += ": " + doing(first);
        }
        fail("divergence in block %u of %u, %s:%s", blockIdx.x, gridDim.x, what, text.c_str());
    }

    std::mutex mutex_;
    Order order_;
    Kernel kernel_ = nullptr;
    const void* arguments_ = nullptr;
    Context host_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    Group everyone_{0, 0};
    std::vector<Group> warps_;
    std::vector<int> turns_, position_;  // threads in their order; each thread's place in it
    std::vector<uint64_t> ready_;        // a bit per place: the thread there can go on
    int current_ = 0, returned_ = 0;
    char begin_, end_, barriers_[2];  // for ThreadSanitizer
};

inline Block block;

// A fiber runs the kernel once per block, for whichever block is up when it is resumed.
inline void Block::fiber_main() {
    Block& b = block;
    {
        const Unwatched unwatched;
        arrive(b.fibers_[b.current_]->context, b.host_);
    }
    for (;;) {
        acquired(&b.begin_);
        b.kernel_(b.arguments_);
        released(&b.end_);
        const Unwatched unwatched;
        ++b.returned_;
        b.suspend(State::kReturned);
    }
}

}  // namespace cuda_shim
