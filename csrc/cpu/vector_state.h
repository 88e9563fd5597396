// Kernels of recurrent operators (vector.h), once for all instruction sets; included by vector_body.h.

#pragma once

#include "vector.h"

namespace amq {
namespace {

template <class S>
void convolve(const ConvolveArgs&) {}

template <class S>
void delta(const DeltaArgs&) {}

}  // namespace
}  // namespace amq
