// What the Python module gets of the networks (csrc/library.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace sepconv::cpu::network {

void add_network(pybind11::module_&);

}  // namespace sepconv::cpu::network
