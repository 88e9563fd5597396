// Any processor.

#include "simd_portable.h"

#include "linear_body.h"

namespace amq {
namespace {
using S = Portable;
}
}  // namespace amq

AMQ_DEFINE_LINEAR_KERNELS(portable)
