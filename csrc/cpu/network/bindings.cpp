// Programs as torch sees them: the schema, the CPU dispatch key, and what Python asks of the networks that are kept.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <chrono>
#include <stdexcept>

#include "cpu/network/network.h"
#include "cpu/simd/huge_pages.h"
#include "ops/checks_program.h"
#include "ops/network.h"
#include "ops/runtime.h"

TORCH_LIBRARY_FRAGMENT(sepconv_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("program(Tensor[] inputs, Tensor constants, str code) -> Tensor[]", tags);
}

namespace sepconv::cpu::network {
namespace {

using at::Tensor;

Tensor output_like(const Port& port, const Size& size, const Tensor& constants) {
  const auto options = constants.options();
  if (port.is_matrix) return at::empty({size.N, size.C}, options);
  return at::empty({size.N, size.C, size.H, size.W}, options, at::MemoryFormat::ChannelsLast);
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
    Operands operands = check_program(network->program(), inputs, constants);
    std::vector<Tensor> outputs = outputs_of(*network, operands, constants);
    count_kernel("cpu_program");
    if (operands.N > 0) network->run(operands);
    return outputs;
  });
}

// The op, called without what Python does on the way to one. `code` lives as long as the caller's text.
std::vector<Tensor> run_program(const std::vector<Tensor>& inputs, const Tensor& constants, std::string_view code) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sepconv_ext::program", "")
                             .typed<std::vector<Tensor>(at::TensorList, const Tensor&, std::string_view)>();
  const pybind11::gil_scoped_release others_may_run;
  return op.call(inputs, constants, code);
}

// How long each step takes: (kind, input size, output size, seconds), the least of `times` runs of the whole batch.
std::vector<std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>, double>> program_times(
    const std::vector<Tensor>& inputs, const Tensor& constants, const std::string& code, int64_t times) {
  const auto network = network_of(code);
  Operands operands = check_program(network->program(), inputs, constants);
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
  m.def("run_program", run_program);
  m.def("program_times", program_times);
}

}  // namespace sepconv::cpu::network

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) { m.impl("program", sepconv::cpu::network::run); }
TORCH_LIBRARY_IMPL(sepconv_ext, CUDA, m) { m.impl("program", sepconv::refuse_program); }

// A derivative asked for is an error, not a result without one.
TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) { m.impl("program", torch::autograd::autogradNotImplementedFallback()); }
