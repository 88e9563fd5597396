// The parts that make up amq._cpu, and what they share.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "cpu/linear.h"

void bind_linear(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
void bind_coder(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);

// A prepared weight as Python names it: (format, address, bytes, out_features).
using Part = std::tuple<std::string, uintptr_t, int64_t, int64_t>;

// The weight that `part` names, if its bytes are those of its shape.
amq::LinearPart checked_part(const Part& part, int64_t in_features, int64_t group_size);
