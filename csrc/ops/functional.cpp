// F.conv2d's and F.conv1d's calls, parsed by torch's own parser: the same arguments are accepted, the same TypeErrors
// raised, and __torch_function__ is honoured, at the cost of a built-in function instead of an op looked up from
// Python.
#define FMT_HEADER_ONLY 1  // torch's headers format with fmt, which its libraries do not export
#define USE_NUMPY 1        // as torch was built: its parser takes NumPy's integers for integers

#include "ops/functional.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/utils/wrap_outputs.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include "ops/checks.h"
#include "ops/ops.h"

namespace sepconv {
namespace {

using c10::SymInt;

using Values = std::vector<SymInt>;  // one for each spatial dimension

// One value stands for all dimensions.
Values values(const char* name, Values given, size_t dims) {
  if (dims == 1) {
    TORCH_CHECK(given.size() == 1, name, " must be one value, but has ", given.size(), " entries");
  } else {
    TORCH_CHECK(given.size() == 1 || given.size() == 2, name, " must be one value or 2 (height, width), but has ",
                given.size(), " entries");
    if (given.size() == 1) given.push_back(given.front());
  }
  return given;
}

// Padding that has a name, in numbers: 'same' with its odd value behind the image, 'causal' with all of it before a
// sequence. torch.compile traces functional.py's words for the same.
Values named_padding(std::string_view name, const at::Tensor& weight, const Values& stride, const Values& dilation) {
  const size_t dims = stride.size();
  const bool same = name == "same", causal = dims == 1 && name == "causal";
  if (name == "valid") return Values(dims, 0);
  TORCH_CHECK(same || causal, "padding must be 'same'", dims == 1 ? ", 'valid' or 'causal'" : " or 'valid'",
              ", but is '", name, "'");
  TORCH_CHECK(weight.dim() == static_cast<int64_t>(dims) + 2, "weight must have ", dims + 2, " dimensions, but has ",
              weight.dim());
  Values sides;
  for (size_t dim = 0; dim < dims; ++dim) {
    TORCH_CHECK(causal || stride[dim] == 1, "padding='same' needs a stride of 1, but stride is ", stride);
    const SymInt zeros = dilation[dim] * (weight.sym_size(2 + dim) - 1), before = causal ? zeros : zeros / 2;
    sides.push_back(before), sides.push_back(zeros - before);
  }
  return sides;
}

// Python's own integers are taken at once: torch's parser asks several classes of symbols first.
SymInt integer(torch::PythonArgs& r, int index) {
  const auto given = r.args[index];
  return given != nullptr && PyLong_CheckExact(given) ? SymInt(THPUtils_unpackLong(given)) : r.toSymInt(index);
}

PyObject* module_object = nullptr;  // borrowed: the module outlives its functions

// The call `name` of torch.nn.functional, for `dims` spatial dimensions. What this package adds comes by keyword.
PyObject* convolution(const char* name, size_t dims, torch::PythonArgParser& parser, PyObject* args, PyObject* kwargs) {
  torch::ParsedArgs<9> parsed;
  auto r = parser.parse(nullptr, args, kwargs, parsed);
  if (r.has_torch_function()) {
    const auto self = pybind11::handle(module_object).attr(name);
    return torch::handle_torch_function_no_python_arg_parser(r.overloaded_args, args, kwargs, name, self.ptr(),
                                                             "sepconv_ext._C");
  }
  const at::Tensor input = r.tensor(0), weight = r.tensor(1);
  const std::optional<at::Tensor> bias = r.optionalTensor(2);
  const Values stride = values("stride", r.symintlist(3), dims), dilation = values("dilation", r.symintlist(5), dims);
  const bool has_name = r.idx == 1;
  const Values padding =
      has_name ? named_padding(r.stringView(4), weight, stride, dilation) : values("padding", r.symintlist(4), dims);
  const SymInt groups = integer(r, 6);
  const std::string_view activation = r.stringView(7), padding_mode = r.stringView(8);
  at::Tensor output;
  {
    pybind11::gil_scoped_release no_gil;
    output = ops::conv2d(input, weight, bias, stride, padding, dilation, groups, activation, padding_mode);
  }
  return torch::autograd::utils::wrap(output);
}

PyObject* conv2d(PyObject*, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static torch::PythonArgParser parser(
      {"conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymIntArrayRef[2] stride=1, SymIntArrayRef[2] "
       "padding=0, "
       "SymIntArrayRef[2] dilation=1, SymInt groups=1, *, c10::string_view activation=\"identity\", "
       "c10::string_view padding_mode=\"zeros\")",
       "conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymIntArrayRef[2] stride=1, "
       "c10::string_view padding=\"valid\", SymIntArrayRef[2] dilation=1, SymInt groups=1, *, "
       "c10::string_view activation=\"identity\", c10::string_view padding_mode=\"zeros\")"});
  return convolution("conv2d", 2, parser, args, kwargs);
  END_HANDLE_TH_ERRORS
}

PyObject* conv1d(PyObject*, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static torch::PythonArgParser parser(
      {"conv1d(Tensor input, Tensor weight, Tensor? bias=None, SymIntArrayRef[1] stride=1, SymIntArrayRef[1] "
       "padding=0, "
       "SymIntArrayRef[1] dilation=1, SymInt groups=1, *, c10::string_view activation=\"identity\", "
       "c10::string_view padding_mode=\"zeros\")",
       "conv1d(Tensor input, Tensor weight, Tensor? bias=None, SymIntArrayRef[1] stride=1, "
       "c10::string_view padding=\"valid\", SymIntArrayRef[1] dilation=1, SymInt groups=1, *, "
       "c10::string_view activation=\"identity\", c10::string_view padding_mode=\"zeros\")"});
  return convolution("conv1d", 1, parser, args, kwargs);
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
