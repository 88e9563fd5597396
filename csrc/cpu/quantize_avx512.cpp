// AVX-512 F, BW, DQ and VL; VNNI and AMX have nothing to add here.

#include "simd_avx512.h"

#include "quantize_body.h"

namespace amq {
namespace {
using S = Avx512<false>;
}
}  // namespace amq

AMQ_DEFINE_QUANTIZE_KERNELS(avx512)
