// The formats that are compiled in: a new one is its file and its name here.

#pragma once

#include "int2.cuh"
#include "int3.cuh"
#include "int4.cuh"
#include "int5.cuh"
#include "int6.cuh"
#include "int8.cuh"

#define AMQ_CUDA_FORMATS(X) X(int2) X(int3) X(int4) X(int5) X(int6) X(int8)

namespace amq {

enum FormatIndex : int {
#define AMQ_INDEX(name) kIndex_##name,
    AMQ_CUDA_FORMATS(AMQ_INDEX)
#undef AMQ_INDEX
    kFormats
};

}  // namespace amq
