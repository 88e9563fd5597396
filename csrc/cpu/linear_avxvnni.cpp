// AVX2 with AVX-VNNI.

#include "simd_avx2.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Avx2<true>;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(avxvnni)
