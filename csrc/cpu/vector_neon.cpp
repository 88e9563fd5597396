// NEON.

#include "simd_neon.h"

#include "vector_body.h"

namespace amq {
namespace {
using S = Neon<Product::wide>;
}
}  // namespace amq

AMQ_DEFINE_VECTOR_KERNELS(neon)
