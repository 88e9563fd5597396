// NEON.

#include "simd_neon.h"

#include "quantize_body.h"

namespace amq {
namespace {
using S = Neon<Product::wide>;
}
}  // namespace amq

AMQ_DEFINE_QUANTIZE_KERNELS(neon)
