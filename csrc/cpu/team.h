// Threads that go through one function together: shares of a loop, and a barrier between its parts.
//
// A decoded token has some 150 parts of a few microseconds each. Starting a parallel region for each of them would cost
// more than the parts, so a region spans the whole token, and its barriers spin. A thread that waits long yields: on a
// shared machine the one that it waits for may need this very processor.

#pragma once

#include <atomic>
#include <cstdint>

#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace amq {

class Barrier {
public:
    void wait(int count) {
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < kSpins) pause();
            else sched_yield();
        }
    }

private:
    static constexpr int kSpins = 2000;  // some 50 µs

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};

// One thread's view of the team.
struct Team {
    int index, count;
    Barrier& barrier;

    // This thread's share of 0 … total − 1, in order.
    int64_t begin(int64_t total) const { return total * index / count; }
    int64_t end(int64_t total) const { return total * (index + 1) / count; }
    void wait() const {
        if (count > 1) barrier.wait(count);
    }
};

// Calls run(team) on at most `threads` threads at once.
template <class Run>
void run_team(int threads, const Run& run) {
    Barrier barrier;
    if (threads <= 1 || is_forked_child()) return run(Team{0, 1, barrier});
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    run(Team{omp_get_thread_num(), omp_get_num_threads(), barrier});  // the runtime may grant fewer than asked
#else
    std::vector<std::thread> workers;
    for (int index = 1; index < threads; ++index) workers.emplace_back([&, index] { run(Team{index, threads, barrier}); });
    run(Team{0, threads, barrier});
    for (std::thread& worker : workers) worker.join();
#endif
}

}  // namespace amq
