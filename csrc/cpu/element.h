// What numbers that are not quantized are kept as.

#pragma once

#include <cstdint>

namespace amq {

enum class Element { float32, half, bfloat };

constexpr int64_t element_bytes(Element element) { return element == Element::float32 ? 4 : 2; }

}  // namespace amq
