// Threads that go through one function together: shares of a loop, and a barrier between its parts.
//
// A decoded token has some 150 parts of a few microseconds each. Starting a parallel region for each of them would cost
// more than the parts, so a region spans the whole token, and its barriers spin. A thread that waits long yields: on a
// shared machine the one that it waits for may need this very processor.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

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
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};

// What a team's threads share.
class TeamState {
public:
    // `loops`: how many calls of Team::share there may be.
    explicit TeamState(int loops) : next_(loops) {}
    void reset() {
        for (Counter& next : next_) next.value.store(0, std::memory_order_relaxed);
    }

private:
    friend struct Team;
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    Barrier barrier_;
    std::vector<Counter> next_;
};

// One thread's view of the team. All threads call `share` and `wait` in the same order.
struct Team {
    int index, count;
    TeamState& state;
    int loop = 0;

    // This thread's share of 0 … total − 1, in order.
    int64_t begin(int64_t total) const { return total * index / count; }
    int64_t end(int64_t total) const { return total * (index + 1) / count; }
    void wait() {
        if (count > 1) state.barrier_.wait(count);
    }

    // run(begin, end) for ranges that, over all threads, make up 0 … total − 1 and begin at multiples of `unit`. Short loops
    // in equal shares; of long ones the last quarter piece by piece for whoever comes first, because on a shared machine no
    // two processors are equally fast.
    template <class Run>
    void share(int64_t total, int64_t unit, const Run& run) {
        constexpr int kLong = 32, kPieces = 4;  // units of each thread; its pieces of the last quarter
        if (total < unit * count) unit = 1;     // a thread with a slow range helps more than one with none
        const int64_t units = (total + unit - 1) / unit;
        if (units < kLong * count || count == 1) {
            const int64_t first = begin(units) * unit, last = end(units) * unit;
            if (first < last) run(first, last < total ? last : total);
            return;
        }
        const int64_t fixed = units * 3 / 4 / count * count, piece = ((units - fixed) / (kPieces * count) + 1) * unit;
        run(begin(fixed) * unit, end(fixed) * unit);
        std::atomic<int64_t>& next = state.next_[loop++].value;
        for (;;) {
            const int64_t first = fixed * unit + piece * next.fetch_add(1, std::memory_order_relaxed);
            if (first >= total) return;
            run(first, first + piece < total ? first + piece : total);
        }
    }
};

// Calls run(team) on at most `threads` threads at once. `regions`: of calls that take about as long.
template <class Run>
void run_team(int threads, TeamState& state, Regions& regions, const Run& run) {
    state.reset();
    Region region(regions, is_forked_child() ? 1 : std::max(threads, 1));
    const int count = region.threads();
    const auto start = [&](int index, int of) {
        Team team{index, of, state};
        run(team);
        region.ended();
    };
    if (count == 1) return start(0, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(count)
    start(omp_get_thread_num(), omp_get_num_threads());  // the runtime may grant fewer than asked
#else
    std::vector<std::thread> workers;
    for (int index = 1; index < count; ++index) workers.emplace_back(start, index, count);
    start(0, count);
    for (std::thread& worker : workers) worker.join();
#endif
}

}  // namespace amq
