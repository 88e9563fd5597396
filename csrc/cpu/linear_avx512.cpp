// AVX-512 F, BW, DQ and VL.

#include "simd_avx512.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Avx512<false>;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(avx512)
