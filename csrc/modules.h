// The parts that make up amq._cpu.

#pragma once

#include <pybind11/pybind11.h>

void bind_linear(pybind11::module_& m);
