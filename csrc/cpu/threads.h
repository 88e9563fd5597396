// Splitting the rows of an output over threads.
//
// With OpenMP on Linux the threads are torch's: its wheel brings a libgomp.so.1, a process maps that name once, and so
// after `import torch` both share one pool and no second set of workers spins against torch's. Without OpenMP (Apple
// clang) threads are started per call.
//
// A forked child has none of its parent's threads, and the pool that it inherits waits for them for ever: there
// everything runs on the calling thread.

#pragma once

#include <algorithm>
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

// Calls run(begin, end) on at most `threads` threads with ranges that partition [0, rows) in order.
template <class Run>
void parallel_rows(int64_t rows, int threads, const Run& run) {
    const int count = static_cast<int>(std::clamp<int64_t>(rows, 1, std::max(threads, 1)));
    const auto part = [&](int64_t index, int64_t parts) { run(rows * index / parts, rows * (index + 1) / parts); };
    if (count == 1 || is_forked_child()) return part(0, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(count)
    part(omp_get_thread_num(), omp_get_num_threads());  // the runtime may grant fewer threads than asked
#else
    std::vector<std::thread> workers;
    for (int index = 1; index < count; ++index) workers.emplace_back(part, index, count);
    part(0, count);
    for (std::thread& worker : workers) worker.join();
#endif
}

}  // namespace amq
