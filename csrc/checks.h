// Checks of arguments from Python for the bindings in module.cpp; pybind11 turns what they throw into ValueError.
//
// Sizes come from files that anybody may have edited: each is bounded where it is read, and products are taken by
// `product`, which refuses what does not fit. Memory comes as an address with its length, and what a call would read or
// write of it is compared with that length first.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/rotation.h"

namespace amq {

// Of any size or count from Python: beyond every model, and products of two fit int64.
constexpr int64_t kMost = INT32_MAX;

// What Python gives of a tensor: (address, bytes). (0, 0) stands for none, and for an empty one.
using Memory = std::tuple<uintptr_t, int64_t>;

inline const Isa& find_isa(const std::string& name) {
    if (name.empty()) return best_isa();
    for (const Isa& isa : isas())
        if (isa.name == name && !missing_feature(isa)) return isa;
    throw std::invalid_argument("isa: expected one of isas(), got '" + name + "'");
}

inline void require(bool holds, const char* argument, const std::string& expected, int64_t got) {
    if (!holds)
        throw std::invalid_argument(std::string(argument) + ": expected " + expected + ", got " + std::to_string(got));
}

inline int64_t require_size(int64_t value, const char* name, int64_t least) {
    require(value >= least, name, "at least " + std::to_string(least), value);
    require(value <= kMost, name, "at most " + std::to_string(kMost), value);
    return value;
}

inline int require_threads(int threads) {
    require(threads >= 1, "threads", "at least 1", threads);
    require(threads <= 1 << 16, "threads", "at most 65536", threads);
    return threads;
}

inline void require_rotation(bool rotated, int64_t in_features) {
    require(!rotated || in_features % kRotation == 0, "in_features of a rotated weight", "a multiple of " + std::to_string(kRotation),
            in_features);
}

// The product of numbers that are not negative.
inline int64_t product(std::initializer_list<int64_t> factors, const char* name) {
    int64_t result = 1;
    for (int64_t factor : factors)
        if (__builtin_mul_overflow(result, factor, &result))
            throw std::invalid_argument(std::string(name) + ": its size does not fit 64 bits");
    return result;
}

// Bytes from the first to the last element of `rows` rows of `columns` elements that lie `stride` elements apart.
inline int64_t strided_bytes(int64_t rows, int64_t columns, int64_t stride, int64_t itemsize, const char* name) {
    int64_t elements = product({rows - 1, stride}, name);
    if (__builtin_add_overflow(elements, columns, &elements))
        throw std::invalid_argument(std::string(name) + ": its size does not fit 64 bits");
    return product({elements, itemsize}, name);
}

// The address of memory of at least `bytes` bytes.
template <class T>
T* address_of(const Memory& memory, const char* name, int64_t bytes) {
    const auto& [address, length] = memory;
    require(address != 0, name, "an address", 0);
    require(length >= bytes, name, "at least " + std::to_string(bytes) + " bytes", length);
    return reinterpret_cast<T*>(address);
}

// The address of memory of exactly `bytes` bytes.
template <class T>
T* exact_address_of(const Memory& memory, const char* name, int64_t bytes) {
    require(std::get<1>(memory) == bytes, name, std::to_string(bytes) + " bytes", std::get<1>(memory));
    return address_of<T>(memory, name, bytes);
}

}  // namespace amq
