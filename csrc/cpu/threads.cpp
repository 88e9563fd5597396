// What threads.h remembers.

#include "threads.h"

#include <atomic>

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

}  // namespace amq
