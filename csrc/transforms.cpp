// How the ops behave under torch's own transforms: autocast, and torch.func (vmap, grad, jvp and their compositions).
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "aten_route.h"
#include "checks.h"
#include "ops.h"
#include "runtime.h"

namespace sepconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

// Under autocast the convolution runs in the reduced type, as torch's conv2d does. Gradients need no rule: they are
// computed outside autocast, on tensors that are reduced already.
template <c10::DeviceType device, c10::DispatchKey key>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                       std::string_view activation, std::string_view padding_mode) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return ops::conv2d(cast(input), cast(weight), bias ? std::make_optional(cast(*bias)) : bias, stride, padding,
                     dilation, std::move(groups), activation, padding_mode);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor separable_conv2d_autocast(const Tensor& input, const Tensor& depthwise_weight,
                                 const std::optional<Tensor>& depthwise_bias, const Tensor& pointwise_weight,
                                 const std::optional<Tensor>& pointwise_bias, SymIntArrayRef stride,
                                 SymIntArrayRef padding, SymIntArrayRef dilation, std::string_view depthwise_activation,
                                 std::string_view pointwise_activation, bool save_intermediate) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  const auto cast_bias = [&](const std::optional<Tensor>& t) { return t ? std::make_optional(cast(*t)) : t; };
  return ops::separable_conv2d(cast(input), cast(depthwise_weight), cast_bias(depthwise_bias), cast(pointwise_weight),
                               cast_bias(pointwise_bias), stride, padding, dilation, depthwise_activation,
                               pointwise_activation, save_intermediate);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor spatial_separable_conv2d_autocast(const Tensor& input, const Tensor& column, const Tensor& row,
                                         SymIntArrayRef padding) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return ops::spatial_separable_conv2d(cast(input), cast(column), cast(row), padding);
}

// torch.func traces through differentiable functions; C++ autograd functions are closed to it. The whole call is made
// of ATen's functions instead, at the door of the outermost transform.
Tensor conv2d_functorch(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                        std::string_view activation, std::string_view padding_mode) {
  count_aten("a torch.func transform");
  return aten::conv2d(input, weight, bias, stride, padding, dilation, groups, parse_activation(activation),
                      parse_padding_mode(padding_mode));
}

Tensor conv2d_grad_input_functorch(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                                   SymIntArrayRef input_stride, SymIntArrayRef stride, SymIntArrayRef padding,
                                   SymIntArrayRef dilation, SymInt groups, std::string_view padding_mode) {
  count_aten("a torch.func transform");
  return aten::conv2d_grad_input(grad_output, weight, input_size, input_stride, stride, padding, dilation, groups,
                                 parse_padding_mode(padding_mode));
}

Tensor conv2d_grad_weight_functorch(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size,
                                    SymIntArrayRef weight_stride, SymIntArrayRef stride, SymIntArrayRef padding,
                                    SymIntArrayRef dilation, SymInt groups, std::string_view padding_mode) {
  count_aten("a torch.func transform");
  return aten::conv2d_grad_weight(grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups,
                                  parse_padding_mode(padding_mode));
}

Tensor separable_conv2d_functorch(const Tensor& input, const Tensor& depthwise_weight,
                                  const std::optional<Tensor>& depthwise_bias, const Tensor& pointwise_weight,
                                  const std::optional<Tensor>& pointwise_bias, SymIntArrayRef stride,
                                  SymIntArrayRef padding, SymIntArrayRef dilation,
                                  std::string_view depthwise_activation, std::string_view pointwise_activation,
                                  bool /*save_intermediate*/) {
  count_aten("a torch.func transform");
  return aten::separable_conv2d({input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride,
                                 padding, dilation, parse_activation(depthwise_activation),
                                 parse_activation(pointwise_activation)});
}

Tensor spatial_separable_conv2d_functorch(const Tensor& input, const Tensor& column, const Tensor& row,
                                          SymIntArrayRef padding) {
  count_aten("a torch.func transform");
  return aten::spatial_separable_conv2d(input, column, row, padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, AutocastCPU, m) {
  m.impl("conv2d", conv2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("separable_conv2d", separable_conv2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("spatial_separable_conv2d", spatial_separable_conv2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(sepconv_ext, AutocastCUDA, m) {
  m.impl("conv2d", conv2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("separable_conv2d", separable_conv2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("spatial_separable_conv2d", spatial_separable_conv2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

TORCH_LIBRARY_IMPL(sepconv_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("conv2d", conv2d_functorch);
  m.impl("conv2d_grad_input", conv2d_grad_input_functorch);
  m.impl("conv2d_grad_weight", conv2d_grad_weight_functorch);
  m.impl("separable_conv2d", separable_conv2d_functorch);
  m.impl("spatial_separable_conv2d", spatial_separable_conv2d_functorch);
}

}  // namespace sepconv
