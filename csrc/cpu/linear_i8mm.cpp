// NEON with DotProd and I8MM.

#include "simd_neon.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Neon<Product::unsigned_>;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(i8mm)
