// AVX2 with FMA and F16C.

#include "simd_avx2.h"

#include "vector_body.h"

namespace amq {
namespace {
using S = Avx2<false>;
}
}  // namespace amq

AMQ_DEFINE_VECTOR_KERNELS(avx2)
