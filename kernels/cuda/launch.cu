// What the library says of itself. No torch, no CUDA call before amq_cuda_check or a launch, so the library loads on a machine
// without a driver.
//
// Status: 0, or a cudaError_t, or one of Status in calls.h. amq/kernels/cuda.py turns it into an error that names the linear.

#include "calls.h"
#include "device.cuh"
#include "formats.cuh"

extern "C" {

// Whether codes of so many bits are compiled in.
AMQ_EXPORT int amq_cuda_has_bits(int bits) { return amq::is_compiled(bits); }

// The text of a cudaError_t.
AMQ_EXPORT const char* amq_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

// Bytes of the index-th struct of AMQ_CALLS, 0 past the last: whether library and Python agree.
int64_t amq_cuda_struct_bytes(int index) {
#define AMQ_BYTES(name) sizeof(amq::name),
    constexpr int64_t bytes[] = {AMQ_CALLS(AMQ_BYTES)};
#undef AMQ_BYTES
    return index >= 0 && index < static_cast<int>(sizeof bytes / sizeof *bytes) ? bytes[index] : 0;
}

}  // extern "C"
