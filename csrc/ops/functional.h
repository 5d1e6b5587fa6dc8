#pragma once

#include <pybind11/pybind11.h>

namespace sepconv {

// Adds `conv1d` and `conv2d`, the calls of torch.nn.functional with its argument parsing, to the module.
void add_functional(pybind11::module_& module);

}  // namespace sepconv
