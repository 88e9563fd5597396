// NEON.

#include "simd_neon.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Neon<Product::wide>;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(neon)
