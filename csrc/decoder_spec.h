// A DecoderSpec of amq/runtime/decoder_spec.py, and what was read of the tensors that it names → cpu/decoder.h's DecoderModel.

#pragma once

#include <pybind11/pybind11.h>

#include "cpu/decoder.h"

namespace amq {

// spec: a DecoderSpec. weights: {name: (kind, memory, memory of scales, memory of zero points, rotation)} of every tensor that it names,
// kind being a format, of tiles, or of packed rows where there are scales, or an element (float32, float16, bfloat16); vectors and arrays
// are float32. Addresses must outlive the result.
// Throws std::invalid_argument that names the field or tensor where a size does not fit.
DecoderModel read_model(const pybind11::handle& spec, const pybind11::dict& weights, int64_t context, int64_t group_size);

}  // namespace amq
