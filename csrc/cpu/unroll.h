// Loops that the compiler must unroll, because what they index are registers.

#pragma once

#include <utility>

#include "isa.h"

namespace amq {
namespace {

// Calls f(std::integral_constant<int, i>) for i in 0 … count − 1, unrolled.
template <class F, int... i>
AMQ_INLINE void unroll_sequence(const F& f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
}
template <int count, class F>
AMQ_INLINE void unroll(const F& f) {
    unroll_sequence(f, std::make_integer_sequence<int, count>{});
}

}  // namespace
}  // namespace amq
