// Reads memory as fast as a plain loop can: the ceiling that kernels are measured against.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

// Reads `bytes` bytes from `data` on `threads` threads, a contiguous part each, fetching ahead as the kernels do; returns
// a checksum, without which the compiler would drop the reads.
uint64_t read_bytes(const Isa& isa, const uint8_t* data, int64_t bytes, int threads);

}  // namespace amq
