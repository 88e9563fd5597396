// Splitting the rows of an output over threads.
//
// With OpenMP on Linux the threads are torch's: its wheel brings a libgomp.so.1, a process maps that name once, and so
// after `import torch` both share one pool and no second set of workers spins against torch's. Without OpenMP (Apple
// clang) threads are started per call.
//
// A forked child has none of its parent's threads, and the pool that it inherits waits for them for ever: there
// everything runs on the calling thread.
//
// A region is over when its slowest thread is. Where another process holds a core, the thread there waits for a slice of
// time, some 3 ms, and all others wait for that thread, at every barrier: two threads are slower than one. So regions tell
// how long their threads stood in line for a processor, and while that is much, they get fewer (`Regions`).

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace amq {

// Whether this process was forked from one that had loaded this module.
bool is_forked_child();

inline int64_t nanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// How long the calling thread could have run and stood in line instead, since it last asked; 0 where the system does not tell.
int64_t queued_since_last();

// How many threads the next region gets, by what the last ones lost. All times are in ns.
//
// Where one of n threads stands in line for a processor for more than 1/n of the time, and all others wait for it, n − 1
// threads would have been done before, and as these spin and yield meanwhile, at three quarters of that already. What is lost
// beyond is added up. At kPatience regions get one thread less for a pause; then one more is tried. If time is lost again,
// the next pause is twice as long, so that trying costs a few percent. Threads that merely have more to do stand in no line.
class Regions {
public:
    int granted(int asked, int64_t now) const {
        const int fewer = fewer_.load(std::memory_order_relaxed);
        const int threads = std::max(1, asked - fewer);
        return fewer > 0 && now >= until_.load(std::memory_order_relaxed) ? std::min(asked, threads + 1) : threads;
    }

    // A region that asked for so many threads and got `threads` took `wall` until `now`; one of them stood in line for so
    // long.
    void note(int asked, int threads, int64_t wall, int64_t queued, int64_t now);

    static constexpr int64_t kLeast = 300'000;  // what less is lost does not count

private:
    static constexpr int64_t kPatience = 4'000'000, kCalm = 2'500'000;
    static constexpr int64_t kShortest = 100'000'000, kLongest = 1'600'000'000, kWalls = 8;

    // Several callers may read and write these at once: what gets lost is the judgement of one region.
    std::atomic<int> fewer_{0};
    std::atomic<int64_t> until_{0}, pause_{0}, lost_{0};
};

// One parallel region, from before it starts until its threads have joined. `regions`: those that are alike.
class Region {
public:
    Region(Regions& regions, int asked)
        : regions_(regions), begin_(nanoseconds()), asked_(asked), threads_(regions.granted(asked, begin_)) {}
    ~Region() {
        if (threads_ == 1) return;
        const int64_t now = nanoseconds();
        regions_.note(asked_, threads_, now - begin_, queued_.load(std::memory_order_relaxed), now);
    }
    Region(const Region&) = delete;

    int threads() const { return threads_; }
    // A thread's part is done.
    void ended() {
        const int64_t time = nanoseconds() - begin_;
        if (time < Regions::kLeast) return;
        const int64_t queued = std::min(time, queued_since_last());
        int64_t most = queued_.load(std::memory_order_relaxed);
        while (queued > most && !queued_.compare_exchange_weak(most, queued, std::memory_order_relaxed)) {}
    }

private:
    Regions& regions_;
    const int64_t begin_;
    const int asked_, threads_;
    std::atomic<int64_t> queued_{0};
};

Regions& regions_of_rows();

// Calls run(begin, end) on at most `threads` threads with ranges that partition [0, rows) in order. `regions`: of calls that
// take about as long.
template <class Run>
void parallel_rows(int64_t rows, int threads, const Run& run, Regions& regions = regions_of_rows()) {
    const int asked = static_cast<int>(std::clamp<int64_t>(rows, 1, std::max(threads, 1)));
    const auto part = [&](int64_t index, int64_t parts) { run(rows * index / parts, rows * (index + 1) / parts); };
    if (asked == 1 || is_forked_child()) return part(0, 1);
    Region region(regions, asked);
    const int count = region.threads();
    if (count == 1) return part(0, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(count)
    {
        part(omp_get_thread_num(), omp_get_num_threads());  // the runtime may grant fewer threads than asked
        region.ended();
    }
#else
    const auto start = [&](int index) {
        part(index, count);
        region.ended();
    };
    std::vector<std::thread> workers;
    for (int index = 1; index < count; ++index) workers.emplace_back(start, index);
    start(0);
    for (std::thread& worker : workers) worker.join();
#endif
}

}  // namespace amq
