// Reads memory as fast as a plain loop can: the ceiling that kernels are measured against.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

// How far ahead a read fetches: which is best differs between processors, and the ceiling is the best of all.
constexpr int kAheads[] = {512, 2048, 4096};

// Reads `bytes` bytes from `data` on `threads` threads, a contiguous part each, fetching kAheads[ahead] bytes ahead; returns
// a checksum, without which the compiler would drop the reads.
uint64_t read_bytes(const Isa& isa, const uint8_t* data, int64_t bytes, int threads, int ahead);

}  // namespace amq
