// AVX2 with FMA and F16C.

#include "simd_avx2.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Avx2<false>;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(avx2)
