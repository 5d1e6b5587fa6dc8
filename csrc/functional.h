#pragma once

#include <pybind11/pybind11.h>

namespace sepconv {

// Adds `conv2d`, F.conv2d's call with F.conv2d's argument parsing, to the module.
void add_functional(pybind11::module_& module);

}  // namespace sepconv
