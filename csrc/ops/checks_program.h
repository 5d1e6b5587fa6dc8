// What the op `program` says of its arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <stdexcept>

#include "cpu/network/network.h"

namespace sepconv {

// The tensors as the program takes them; the outputs are not set.
cpu::network::Operands check_program(const cpu::network::Program&, at::TensorList inputs, const at::Tensor& constants);

// The op on a device that has no programs.
std::vector<at::Tensor> refuse_program(at::TensorList inputs, const at::Tensor& constants, std::string_view code);

[[noreturn]] void raise_for_program(const std::invalid_argument&);

// Returns body(); what the text or the sizes of a program are wrong in becomes torch's error.
template <typename Body>
auto in_torchs_words(const Body& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    raise_for_program(error);
  }
}

}  // namespace sepconv
