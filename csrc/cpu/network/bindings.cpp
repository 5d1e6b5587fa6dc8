// Programs as torch sees them: the schema, the CPU dispatch key, and what Python asks of the networks that are kept.
#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <chrono>
#include <stdexcept>

#include "cpu/network/network.h"
#include "cpu/simd/huge_pages.h"
#include "ops/network.h"
#include "ops/runtime.h"

TORCH_LIBRARY_FRAGMENT(sepconv_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("program(Tensor[] inputs, Tensor constants, str code) -> Tensor[]", tags);
}

namespace sepconv::cpu::network {
namespace {

using at::Tensor;

void check_memory(const Tensor& tensor, const std::string& name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32 for a frozen program, but is ",
                   tensor.scalar_type());
  TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU for a frozen program, but is on ", tensor.device());
}

Operands operands_of(const Program& program, at::TensorList inputs, const Tensor& constants) {
  TORCH_CHECK(inputs.size() == program.inputs.size(), "the program takes ", program.inputs.size(), " inputs, but got ",
              inputs.size());
  check_memory(constants, "constants");
  TORCH_CHECK(constants.dim() == 1 && constants.is_contiguous(), "constants must be one dense row, but has size ",
              constants.sizes(), " and strides ", constants.strides());
  Operands operands;
  operands.constants = constants.const_data_ptr<float>(), operands.constant_count = constants.numel();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& input = inputs[i];
    const std::string name = "inputs[" + std::to_string(i) + "]";
    check_memory(input, name);
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

Tensor output_like(const Port& port, const Size& size, const Tensor& constants) {
  const auto options = constants.options();
  if (port.is_matrix) return at::empty({size.N, size.C}, options);
  return at::empty({size.N, size.C, size.H, size.W}, options, at::MemoryFormat::ChannelsLast);
}

// Calls body(), with what it throws as torch's error.
template <typename Body>
auto in_torchs_words(const Body& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK(false, "a frozen program: ", error.what());
  }
}

std::vector<Tensor> outputs_of(Network& network, Operands& operands, const Tensor& constants) {
  const std::vector<Size> sizes = network.output_sizes(operands);
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < sizes.size(); ++i) {
    outputs.push_back(output_like(network.program().outputs[i], sizes[i], constants));
    advise_huge_pages(outputs[i].mutable_data_ptr(), outputs[i].nbytes());
    operands.outputs.push_back(outputs[i].mutable_data_ptr<float>());
  }
  return outputs;
}

std::vector<Tensor> run(at::TensorList inputs, const Tensor& constants, std::string_view code) {
  return in_torchs_words([&] {
    const auto network = network_of(code);
    Operands operands = operands_of(network->program(), inputs, constants);
    std::vector<Tensor> outputs = outputs_of(*network, operands, constants);
    count_kernel("cpu_program");
    if (operands.N > 0) network->run(operands);
    return outputs;
  });
}

// How long each step takes: (kind, input size, output size, seconds), the least of `times` runs of the whole batch.
std::vector<std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>, double>> program_times(
    const std::vector<Tensor>& inputs, const Tensor& constants, const std::string& code, int64_t times) {
  const auto network = network_of(code);
  Operands operands = operands_of(network->program(), inputs, constants);
  const std::vector<Tensor> outputs = outputs_of(*network, operands, constants);
  std::vector<std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>, double>> result;
  for (int64_t run = 0; run < times; ++run) {
    size_t step = 0;
    auto before = std::chrono::steady_clock::now();
    network->run_timed(operands, [&](const PlannedStep& planned) {
      const auto now = std::chrono::steady_clock::now();
      const double seconds = std::chrono::duration<double>(now - before).count();
      const auto sizes = [](const Size& s) { return std::vector<int64_t>{s.N, s.C, s.H, s.W}; };
      if (run == 0) result.emplace_back(planned.step.kind->name, sizes(planned.in[0]), sizes(planned.out), seconds);
      std::get<3>(result[step]) = std::min(std::get<3>(result[step]), seconds);
      ++step;
      before = std::chrono::steady_clock::now();
    });
  }
  return result;
}

}  // namespace

void add_network(pybind11::module_& m) {
  m.def("retain_program", retain_network);
  m.def("release_program", release_network);
  m.def("idle_arena_bytes", idle_arena_bytes);
  m.def("program_times", program_times);
}

}  // namespace sepconv::cpu::network

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) { m.impl("program", sepconv::cpu::network::run); }

// A derivative asked for is an error, not a result without one.
TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) { m.impl("program", torch::autograd::autogradNotImplementedFallback()); }
