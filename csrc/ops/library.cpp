// The op table: every schema, and the Python module.
//
//   input              [N, C, H, W] or [C, H, W] with a weight [K, C / groups, R, S]
//                      conv2d and its gradients also take sequences, [N, C, L] or [C, L] with [K, C / groups, S]
//   stride, dilation   (h, w); for a sequence (l)
//   padding            (h, w), or (top, bottom, left, right); for a sequence (l), or (left, right)
//   *_size, *_stride   the size of the result, and the memory strides that it should follow
//   activation         a name of activation.h
//   padding_mode       a name of padding_mode.h
#define USE_NUMPY 1  // as in functional.cpp: both compile the inline functions of torch's parser
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "core/activation.h"
#include "core/explain.h"
#include "core/operand_layout.h"
#include "core/overlap.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/simd/processor.h"
#include "ops/checks.h"
#include "ops/expanded_batch.h"
#include "ops/functional.h"
#include "ops/inverted_residual.h"
#include "ops/network.h"
#include "ops/runtime.h"

#ifdef SEPCONV_WITH_CUDA
#include <cuda.h>
#endif

TORCH_LIBRARY(sepconv_ext, m) {
  m.set_python_module("sepconv_ext.ops");
  // Any memory layout is taken as it is: Inductor need not restore the one that it traced.
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "SymInt groups, str activation, str padding_mode=\"zeros\") -> Tensor",
      tags);
  // activation(conv2d(input, weight, bias) + residual), for inference.
  m.def(
      "conv2d_residual(Tensor input, Tensor weight, Tensor? bias, Tensor residual, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str activation) -> Tensor",
      tags);
  m.def(
      "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[] input_size, SymInt[] input_stride, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode=\"zeros\") -> Tensor",
      tags);
  m.def(
      "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, SymInt[] weight_stride, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode=\"zeros\") -> Tensor",
      tags);
  // (grad_input, grad_weight): the two together, as autograd runs them where it wants both.
  m.def(
      "conv2d_both_grads(Tensor grad_output, Tensor input, Tensor weight, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str padding_mode=\"zeros\") -> (Tensor, Tensor)",
      tags);
  m.def(
      "separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor pointwise_weight, "
      "Tensor? pointwise_bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, str depthwise_activation, "
      "str pointwise_activation, bool save_intermediate=False) -> Tensor",
      tags);
  // The same as autograd runs it: (output, intermediate), each of them empty where it is not wanted. The intermediate
  // has the same bits whether it comes along with the output or alone.
  m.def(
      "separable_conv2d_training(Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, "
      "Tensor pointwise_weight, Tensor? pointwise_bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
      "str depthwise_activation, str pointwise_activation, bool output, bool intermediate) -> (Tensor, Tensor)",
      tags);
  m.def("spatial_separable_conv2d(Tensor input, Tensor column, Tensor row, SymInt[] padding) -> Tensor", tags);
  // 1x1 (or none) -> depthwise -> squeeze-and-excitation (or none) -> 1x1 [+ input]; gate: sigmoid or hardsigmoid.
  m.def(
      "inverted_residual(Tensor input, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, "
      "Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, Tensor? squeeze_weight, "
      "Tensor? squeeze_bias, Tensor? excite_weight, Tensor? excite_bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, str expand_activation, str depthwise_activation, str squeeze_activation, str gate, "
      "str project_activation, bool residual) -> Tensor",
      tags);
}

namespace sepconv {
namespace {

namespace py = pybind11;

// Facts of the build, given by setup.py as macros.
py::dict build_info() {
  py::dict info;
#ifdef SEPCONV_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
  info["cuda_archs"] = py::str(SEPCONV_CUDA_ARCHS).attr("split")();
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  info["debug"] = SEPCONV_DEBUG != 0;
  info["compiler"] = __VERSION__;
  info["torch_version"] = TORCH_VERSION;
  info["cpu_isas"] = cpu::isas_built();
  info["cpu_isa"] = cpu::isa_name(cpu::isa());
  return info;
}

Map parse_map(const std::string& name) {
  if (name == "forward") return Map::forward;
  if (name == "grad_input") return Map::grad_input;
  if (name == "grad_weight") return Map::grad_weight;
  TORCH_CHECK_VALUE(false, "map must be 'forward', 'grad_input' or 'grad_weight', but is '", name, "'");
}

// A device to plan for that need not be in the machine: multiprocessors, and 90 for compute capability 9.0.
using DeviceFacts = std::optional<std::tuple<int, int>>;

// The explanation of a kernel for zero padding, with what the border kernel does after it or instead of it.
Explanation with_borders(Explanation e, const char* borders, Map map, const ConvShape& shape, PaddingMode mode) {
  const BorderExtent extent = border_extent(map, shape, mode);
  if (e.aten || extent == BorderExtent::none) return e;
  const std::string name = name_of(mode);
  if (extent == BorderExtent::all)
    return {borders, "all of the result depends on the " + name + " padding", false, "", 0};
  e.reason += std::string("; then ") + borders + " for what depends on the " + name + " padding";
  return e;
}

// The plan of the call that `map` would make for these tensors; nothing is run. Without a grad_output it is taken to
// have the layout that the forward call gives the output.
Explanation explain(const std::string& map_name, const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, const DeviceFacts& cuda_device,
                    const std::string& padding_mode, const std::optional<at::Tensor>& grad_output,
                    const std::string& activation_name, bool residual) {
  const Map map = parse_map(map_name);
  const PaddingMode mode = parse_padding_mode(padding_mode);
  [[maybe_unused]] const Finish finish{parse_activation(activation_name), residual};
  const auto aten = [](const char* reason) { return Explanation{"aten", reason, true, "", 0}; };
  if (!has_kernel_dtype(input)) return aten("no kernel for this dtype");
  const ConvArgs args{stride, padding, dilation, groups, mode};
  Checked checked = check_forward(input, weight, bias, args);
  if (is_one_image(map, checked.shape)) {
    Explanation one = explain(map_name, first_image(input), weight, bias, stride, padding, dilation, groups,
                              cuda_device, padding_mode, grad_output, activation_name, residual);
    one.reason += "; the batch is one image, computed once";
    return one;
  }
  if (map != Map::forward) {
    const Strides usual = checked.shape.y;
    const at::DimVector one(checked.result.size.size(), 1);
    const at::Tensor g =  // for its size alone
        grad_output ? *grad_output : at::empty(one, input.options()).expand(checked.result.size);
    checked = map == Map::grad_input ? check_grad_input(g, weight, input.sizes(), input.strides(), args)
                                     : check_grad_weight(g, input, weight.sizes(), weight.strides(), args);
    if (!grad_output) checked.shape.y = usual;
  }
  ConvShape& shape = checked.shape;
  const DType dtype = dtype_of(input);
  if (const auto overlap = Overlap::worth_taking(shape, mode)) {
    if (overlap->is_empty()) return {"none", "no tap meets a pixel: the result is the bias, or zero", false, "", 0};
    shape = overlap->of(shape);
  }
#ifdef SEPCONV_WITH_CUDA
  if (cuda_device) {
    const auto [multiprocessors, capability] = *cuda_device;
    return with_borders(cuda::explain(map, shape, dtype, finish, multiprocessors, capability), "cuda_borders", map,
                        shape, mode);
  }
  if (input.is_cuda()) {
    return with_borders(cuda::explain(map, shape, dtype, finish, input.get_device()), "cuda_borders", map, shape, mode);
  }
#endif
  TORCH_CHECK(!cuda_device, "cuda_device was given, but this build has no CUDA part");
  if (input.is_cpu()) return with_borders(cpu::explain(map, shape, dtype), "cpu_borders", map, shape, mode);
  return aten("no kernel for this device");
}

// The plan of a call of separable_conv2d; nothing is run.
Explanation explain_separable(const at::Tensor& input, const at::Tensor& depthwise_weight,
                              const std::optional<at::Tensor>& depthwise_bias, const at::Tensor& pointwise_weight,
                              const std::optional<at::Tensor>& pointwise_bias, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  if (!has_kernel_dtype(input)) return {"aten", "no kernel for this dtype", true, "", 0};
  const SeparableShape shape = check_separable(input, depthwise_weight, depthwise_bias, pointwise_weight,
                                               pointwise_bias, stride, padding, dilation)
                                   .shape;
  if (Overlap::worth_taking(shape.depthwise, PaddingMode::zeros)) {
    return {"composite", "the filter reaches far beyond the image: two calls, the first of what overlaps", false, "",
            0};
  }
#ifdef SEPCONV_WITH_CUDA
  if (input.is_cuda()) return cuda::explain(shape, dtype_of(input), input.get_device());
#endif
  if (input.is_cpu()) return cpu::explain(shape, dtype_of(input));
  return {"aten", "no kernel for this device", true, "", 0};
}

// The plan of a call of inverted_residual; nothing is run.
Explanation explain_inverted_residual(const at::Tensor& input, const std::optional<at::Tensor>& expand_weight,
                                      const std::optional<at::Tensor>& expand_bias, const at::Tensor& depthwise_weight,
                                      const std::optional<at::Tensor>& depthwise_bias, const at::Tensor& project_weight,
                                      const std::optional<at::Tensor>& project_bias,
                                      const std::optional<at::Tensor>& squeeze_weight,
                                      const std::optional<at::Tensor>& squeeze_bias,
                                      const std::optional<at::Tensor>& excite_weight,
                                      const std::optional<at::Tensor>& excite_bias, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::vector<int64_t> dilation, bool residual,
                                      const DeviceFacts& cuda_device) {
  if (!has_kernel_dtype(input)) return {"aten", "no kernel for this dtype", true, "", 0};
  const std::vector<c10::SymInt> strides(stride.begin(), stride.end()), sides(padding.begin(), padding.end()),
      dilations(dilation.begin(), dilation.end());
  const char* const any = name_of(Activation::identity);  // no plan asks for the activations
  const inverted_residual::Call call{input,
                                     expand_weight,
                                     expand_bias,
                                     depthwise_weight,
                                     depthwise_bias,
                                     project_weight,
                                     project_bias,
                                     squeeze_weight,
                                     squeeze_bias,
                                     excite_weight,
                                     excite_bias,
                                     strides,
                                     sides,
                                     dilations,
                                     any,
                                     any,
                                     any,
                                     "sigmoid",
                                     any,
                                     residual};
  const BlockShape shape = inverted_residual::block_shape(call, check_inverted_residual(call));
  const DType dtype = dtype_of(input);
#ifdef SEPCONV_WITH_CUDA
  if (cuda_device) return cuda::explain(shape, dtype, std::get<0>(*cuda_device), std::get<1>(*cuda_device));
  if (input.is_cuda()) return cuda::explain(shape, dtype, input.get_device());
#endif
  TORCH_CHECK(!cuda_device, "cuda_device was given, but this build has no CUDA part");
  if (input.is_cpu()) return cpu::explain(shape, dtype);
  return {"composite", "calls of conv2d: no kernel for this device", false, "", 0};
}

// Runs `call`, with the kernel and the cut of PlanByHand in each of its CUDA calls on this thread.
py::object run_plan(const std::string& kernel, const std::map<std::string, int64_t>& cut, const py::function& call) {
#ifdef SEPCONV_WITH_CUDA
  const PlanByHand hand{kernel, cut};
  struct Former {
    const PlanByHand* plan;
    ~Former() { set_plan_by_hand(plan); }
  } const former{set_plan_by_hand(&hand)};
  return call();
#else
  TORCH_CHECK(false, "run_plan: this build has no CUDA part, in which kernel '", kernel, "' with a cut of ", cut.size(),
              " numbers could run ", py::repr(call).cast<std::string>());
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  add_functional(m);
  cpu::network::add_network(m);
  m.def("build_info", build_info);
  m.def("kernel_counts", kernel_counts);
  m.def("reset_kernel_counts", reset_kernel_counts);
  m.def("strict", strict);
  m.def("set_strict", set_strict);
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        const std::string former = cpu::isa_name(cpu::isa());
        cpu::set_isa(name);
        return former;
      },
      "Returns the former value.");
  m.def("set_likes_long_runs", cpu::set_likes_long_runs, "Returns the former value.");
  m.def(
      "set_half_kernels",
      [](bool bfloat16, bool float16) {
        const cpu::HalfKernels former = cpu::half_kernels();
        cpu::set_half_kernels({bfloat16, float16});
        return std::pair(former.bfloat16, former.float16);
      },
      "Whether the plan takes oneDNN to have kernels of bfloat16, and of float16. Returns the former values.");
  // For what Python adds to an op's result; a wrapper of torch.func or a fake tensor has no storage to ask.
  m.def("check_storage", [](const std::string& name, const at::Tensor& t) {
    if (t.has_storage() && !at::isTensorSubclassLike(t)) check_storage(name.c_str(), t);
  });
  // For convolutions that are made in Python: a parameter is cast once for all calls, which Python cannot say.
  m.def("cast_by_autocast", [](const at::Tensor& t) {
    const c10::DeviceType device = t.device().type();
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  });
  m.def("derivative_from_output",
        [](const std::string& activation) { return derivative_from_output(parse_activation(activation)); });
  m.def("activations", [] { return std::vector<std::string>(kActivationNames, kActivationNames + kActivationCount); });

  py::class_<Explanation>(m, "Explanation")
      .def_readonly("kernel", &Explanation::kernel)
      .def_readonly("reason", &Explanation::reason)
      .def_readonly("aten", &Explanation::aten)
      .def_readonly("tile", &Explanation::tile)
      .def_readonly("workspace_bytes", &Explanation::workspace_bytes)
      .def_readonly("adds_residual", &Explanation::adds_residual)
      .def("__repr__", [](const Explanation& e) {
        std::string text = e.kernel + ": " + e.reason;
        if (!e.tile.empty()) text += "; tile " + e.tile;
        if (e.workspace_bytes > 0) text += "; workspace " + std::to_string(e.workspace_bytes) + " bytes";
        return text;
      });
  m.def("explain", explain, py::arg("map"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("cuda_device") = py::none(),
        py::arg("padding_mode") = "zeros", py::arg("grad_output") = py::none(), py::arg("activation") = "identity",
        py::arg("residual") = false);
  m.def("explain_separable", explain_separable);
  m.def("explain_inverted_residual", explain_inverted_residual, py::arg("input"), py::arg("expand_weight"),
        py::arg("expand_bias"), py::arg("depthwise_weight"), py::arg("depthwise_bias"), py::arg("project_weight"),
        py::arg("project_bias"), py::arg("squeeze_weight"), py::arg("squeeze_bias"), py::arg("excite_weight"),
        py::arg("excite_bias"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("residual"),
        py::arg("cuda_device") = py::none());
  m.def("run_plan", run_plan, py::arg("kernel"), py::arg("cut"), py::arg("call"),
        "Private, for sweeps: the result of call(), whose CUDA calls on this thread run this kernel with this cut.");
}

}  // namespace sepconv
