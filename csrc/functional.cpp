// F.conv2d's and F.conv1d's calls, parsed by torch's own parser: the same arguments are accepted, the same TypeErrors
// raised, and __torch_function__ is honoured, at the cost of a built-in function instead of an op looked up from Python.
#define FMT_HEADER_ONLY 1  // torch's headers format with fmt, which its libraries do not export

#include "functional.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/utils/wrap_outputs.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include "checks.h"
#include "ops.h"

namespace sepconv {
namespace {

using c10::SymInt;

// One value stands for both dimensions.
std::array<SymInt, 2> pair(const char* name, const std::vector<SymInt>& values) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, name, " must be one value or 2 (height, width), but has ",
              values.size(), " entries");
  return {values.front(), values.back()};
}

// The only value of a sequence's convolution.
const SymInt& single(const char* name, const std::vector<SymInt>& values) {
  TORCH_CHECK(values.size() == 1, name, " must be one value, but has ", values.size(), " entries");
  return values.front();
}

PyObject* module_object = nullptr;  // borrowed: the module outlives its functions

PyObject* conv2d(PyObject*, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static torch::PythonArgParser parser(
      {"conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymIntArrayRef[2] stride=1, SymIntArrayRef[2] "
       "padding=0, "
       "SymIntArrayRef[2] dilation=1, SymInt groups=1)"});
  torch::ParsedArgs<7> parsed;
  auto r = parser.parse(nullptr, args, kwargs, parsed);
  if (r.has_torch_function()) {
    const auto self = pybind11::handle(module_object).attr("conv2d");
    return torch::handle_torch_function_no_python_arg_parser(r.overloaded_args, args, kwargs, "conv2d", self.ptr(),
                                                             "sepconv_ext._C");
  }
  const at::Tensor input = r.tensor(0), weight = r.tensor(1);
  const std::optional<at::Tensor> bias = r.optionalTensor(2);
  const auto stride = pair("stride", r.symintlist(3)), padding = pair("padding", r.symintlist(4)),
             dilation = pair("dilation", r.symintlist(5));
  const SymInt groups = r.toSymInt(6);
  at::Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    const bool unbatched = input.dim() == 3;
    output = ops::conv2d(unbatched ? input.unsqueeze(0) : input, weight, bias, stride, padding, dilation, groups,
                         "identity");
    if (unbatched) output = output.squeeze(0);
  }
  return torch::autograd::utils::wrap(output);
  END_HANDLE_TH_ERRORS
}

// A sequence is an image of one row: views of the same memory, so that [N, C, L] in the memory order [N, L, C] is a
// channels_last image, and comes back in that order.
PyObject* conv1d(PyObject*, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static torch::PythonArgParser parser(
      {"conv1d(Tensor input, Tensor weight, Tensor? bias=None, SymIntArrayRef[1] stride=1, SymIntArrayRef[1] "
       "padding=0, "
       "SymIntArrayRef[1] dilation=1, SymInt groups=1)"});
  torch::ParsedArgs<7> parsed;
  auto r = parser.parse(nullptr, args, kwargs, parsed);
  if (r.has_torch_function()) {
    const auto self = pybind11::handle(module_object).attr("conv1d");
    return torch::handle_torch_function_no_python_arg_parser(r.overloaded_args, args, kwargs, "conv1d", self.ptr(),
                                                             "sepconv_ext._C");
  }
  const at::Tensor input = r.tensor(0), weight = r.tensor(1);
  const std::optional<at::Tensor> bias = r.optionalTensor(2);
  const std::array<SymInt, 2> stride{1, single("stride", r.symintlist(3))},
      padding{0, single("padding", r.symintlist(4))}, dilation{1, single("dilation", r.symintlist(5))};
  const SymInt groups = r.toSymInt(6);
  at::Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    check_sequence(input, weight);
    const bool unbatched = input.dim() == 2;
    const at::Tensor row = (unbatched ? input.unsqueeze(0) : input).unsqueeze(2);
    output = ops::conv2d(row, weight.unsqueeze(2), bias, stride, padding, dilation, groups, "identity").squeeze(2);
    if (unbatched) output = output.squeeze(0);
  }
  return torch::autograd::utils::wrap(output);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"conv1d", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(conv1d)), METH_VARARGS | METH_KEYWORDS,
     "torch.nn.functional.conv1d's call, by this package's kernels."},
    {"conv2d", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(conv2d)), METH_VARARGS | METH_KEYWORDS,
     "torch.nn.functional.conv2d's call, by this package's kernels."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_functional(pybind11::module_& module) {
  module_object = module.ptr();
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace sepconv
