// AVX-512 with VNNI.

#include "simd_avx512.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Avx512<true>;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(avx512vnni)
