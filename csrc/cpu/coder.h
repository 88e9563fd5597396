// An entropy coder for codes of channels, each with a model of two bytes; see amq/split/coder.py, which is the
// specification: the model, the arithmetic of its integers and the order of the bytes.
//
// Nothing here is floating-point but `fit`, whose choice goes along with the data: the two ends may be unlike machines.

#pragma once

#include <cstdint>

namespace amq {

constexpr int kMostLevels = 256;
constexpr int kTotalBits = 16;  // frequencies of a channel add up to 2^16

struct CoderArgs {
    const int32_t* levels;  // [channels], 1 to kMostLevels
    const uint8_t* center;  // [channels]
    const uint8_t* scale;   // [channels]
    int64_t channels;
    int64_t tokens;
};

enum class Coded { kGood, kTooShort, kBadStart, kTrailing, kBadEnd };

// 2^(−i/256) for i = 0 … 255, 30 fraction bits: what every table is made of.
void powers(uint32_t* out);

// [levels] of one channel; each at least 1, and at most 2^16 − 1 where there are two levels or more.
void frequencies(int levels, int center, int scale, uint32_t* out);

// Writes from the end of out[0, capacity) towards its start. Returns where the data begins, or −1 where it does not fit.
// codes: [channels, tokens], each below its channel's levels.
int64_t encode(const CoderArgs& args, const uint8_t* codes, uint8_t* out, int64_t capacity);

// Any bytes decode to codes below their channel's levels, or to a complaint; never more than `size` bytes are read.
Coded decode(const CoderArgs& args, const uint8_t* data, int64_t size, uint8_t* codes);

// The bytes of a model that is near the best for each channel; args.center and args.scale are not read.
void fit(const CoderArgs& args, const uint8_t* codes, uint8_t* center, uint8_t* scale);

}  // namespace amq
