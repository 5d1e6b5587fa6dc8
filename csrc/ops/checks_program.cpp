#include "ops/checks_program.h"

namespace sepconv {
namespace {

using at::Tensor;
using cpu::network::InputSize;
using cpu::network::Operands;
using cpu::network::Program;

void check_dtype(const Tensor& tensor, const std::string& name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32 for a frozen program, but is ",
                   tensor.scalar_type(), ": freeze the model in that dtype instead");
}

}  // namespace

Operands check_program(const Program& program, at::TensorList inputs, const Tensor& constants) {
  TORCH_CHECK(inputs.size() == program.inputs.size(), "the program takes ", program.inputs.size(), " inputs, but got ",
              inputs.size());
  check_dtype(constants, "constants");
  TORCH_CHECK(constants.dim() == 1 && constants.is_contiguous(), "constants must be one dense row, but has size ",
              constants.sizes(), " and strides ", constants.strides());
  Operands operands;
  operands.constants = constants.const_data_ptr<float>(), operands.constant_count = constants.numel();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& input = inputs[i];
    const std::string name = "inputs[" + std::to_string(i) + "]";
    check_dtype(input, name);
    const int64_t rank = program.inputs[i].is_matrix ? 2 : 4;
    TORCH_CHECK(input.dim() == rank, name, " must have ", rank, " dimensions, but has ", input.dim());
    TORCH_CHECK(input.size(0) == inputs[0].size(0), name, " must have as many images as inputs[0], ", inputs[0].size(0),
                ", but has ", input.size(0));
    InputSize size{{input.size(0), 1, 1, input.size(1)}, {input.stride(0), input.stride(1), 0, 0}};
    if (rank == 4) {
      size.size.H = input.size(2), size.size.W = input.size(3);
      size.strides.h = input.stride(2), size.strides.w = input.stride(3);
    }
    operands.N = input.size(0);
    operands.inputs.push_back(input.const_data_ptr<float>());
    operands.input_sizes.push_back(size);
  }
  return operands;
}

std::vector<Tensor> refuse_program(at::TensorList inputs, const Tensor& constants, std::string_view) {
  TORCH_CHECK(false, "a frozen program runs on the CPU, but got inputs on ", inputs[0].device(), " and constants on ",
              constants.device(), ": freeze the model on that device instead");
}

void raise_for_program(const std::invalid_argument& error) { TORCH_CHECK(false, "a frozen program: ", error.what()); }

}  // namespace sepconv
