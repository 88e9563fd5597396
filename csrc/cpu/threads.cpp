// What threads.h remembers.

#include "threads.h"

#include <cstdio>

#ifdef __linux__
#include <fcntl.h>
#include <unistd.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace amq {
namespace {

std::atomic<bool> forked_child{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif

#ifdef __linux__
// A thread's statistics of Linux's scheduler: "ns on a processor, ns in line for one, times it ran". The file stays open, and
// a reading takes half a microsecond.
class Queue {
public:
    Queue() : last_(read()) {}
    ~Queue() {
        if (file_ >= 0) close(file_);
    }
    int64_t since_last() {
        const int64_t before = last_;
        last_ = read();
        return last_ - before;
    }

private:
    int64_t read() const {
        char text[96];
        const ssize_t length = file_ < 0 ? -1 : pread(file_, text, sizeof text - 1, 0);
        long long queued = 0;
        if (length <= 0) return 0;
        text[length] = 0;
        return std::sscanf(text, "%*s %lld", &queued) == 1 ? queued : 0;
    }

    const int file_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    int64_t last_;
};
#endif

}  // namespace

bool is_forked_child() {
#if defined(__unix__) || defined(__APPLE__)
    (void)registered;
#endif
    return forked_child;
}

int64_t queued_since_last() {
#ifdef __linux__
    thread_local Queue own;
    return own.since_last();
#else
    return 0;
#endif
}

Regions& regions_of_rows() {
    static Regions all;
    return all;
}

void Regions::note(int asked, int threads, int64_t wall, int64_t queued, int64_t now) {
    const int fewer = fewer_.load(std::memory_order_relaxed);
    const int64_t until = until_.load(std::memory_order_relaxed), pause = pause_.load(std::memory_order_relaxed);
    const bool tries = fewer > 0 && now >= until;
    const int64_t lost = lost_.load(std::memory_order_relaxed) + (queued > kLeast ? queued : 0) - 3 * wall / (4 * threads);
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
