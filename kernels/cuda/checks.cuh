// What the C functions ask of their arguments.

#pragma once

#include <cstdint>

#include "calls.h"

namespace amq {

inline bool is_kind(int kind) { return kind == kHalf || kind == kBfloat16 || kind == kFloat; }
inline int element_bytes(int kind) { return kind == kFloat ? 4 : 2; }

inline bool at_multiple(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Whether an address is null, or would fault where elements of so many bytes are read.
inline bool bad(const void* address, int bytes) { return !address || !at_multiple(address, bytes); }
inline bool bad(const float* address) { return bad(address, alignof(float)); }
inline bool bad_if_any(const float* address) { return address && bad(address); }

}  // namespace amq
