// What threads.h remembers.

#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace amq {
namespace {

std::atomic<bool> forked_child{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif

}  // namespace

bool is_forked_child() {
#if defined(__unix__) || defined(__APPLE__)
    (void)registered;
#endif
    return forked_child;
}

Regions& regions_of_rows() {
    static Regions all;
    return all;
}

void Regions::note(int asked, int threads, int64_t wall, int64_t waited, int64_t now) {
    const int fewer = fewer_.load(std::memory_order_relaxed);
    const int64_t until = until_.load(std::memory_order_relaxed), pause = pause_.load(std::memory_order_relaxed);
    const bool tries = fewer > 0 && now >= until;
    const int64_t lost = lost_.load(std::memory_order_relaxed) + (waited > kLeast ? waited : 0) - wall / threads;
    if (lost >= (fewer > 0 ? kLeast : kPatience)) {
        const int64_t next = std::clamp(now - until < pause ? 2 * pause : kShortest, kShortest, kLongest);
        fewer_.store(asked - threads + 1, std::memory_order_relaxed);
        pause_.store(next, std::memory_order_relaxed);
        until_.store(now + std::max(next, kWalls * wall), std::memory_order_relaxed);
        lost_.store(0, std::memory_order_relaxed);
    } else if (tries && lost <= -kCalm) {
        fewer_.store(asked - threads, std::memory_order_relaxed);
        until_.store(now, std::memory_order_relaxed);
        lost_.store(0, std::memory_order_relaxed);
    } else {
        lost_.store(std::max(lost, tries ? -kCalm : 0), std::memory_order_relaxed);
    }
}

}  // namespace amq
