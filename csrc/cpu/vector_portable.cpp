// Any processor.

#include "simd_portable.h"

#include "vector_body.h"

namespace amq {
namespace {
using S = Portable;
}
}  // namespace amq

AMQ_DEFINE_VECTOR_KERNELS(portable)
