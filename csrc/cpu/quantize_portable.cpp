// Any processor.

#include "simd_portable.h"

#include "quantize_body.h"

namespace amq {
namespace {
using S = Portable;
}
}  // namespace amq

AMQ_DEFINE_QUANTIZE_KERNELS(portable)
