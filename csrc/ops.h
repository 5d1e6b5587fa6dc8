// The op table, callable from C++: each function here goes through torch's dispatcher, so that autograd, autocast,
// compilation and the device see the call. The schemas stand in library.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace sepconv::ops {

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                  c10::SymInt groups, std::string_view activation, std::string_view padding_mode = "zeros");

at::Tensor conv2d_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_size,
                             c10::SymIntArrayRef input_stride, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             c10::SymIntArrayRef dilation, c10::SymInt groups, std::string_view padding_mode = "zeros");

at::Tensor conv2d_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_size,
                              c10::SymIntArrayRef weight_stride, c10::SymIntArrayRef stride,
                              c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, c10::SymInt groups,
                              std::string_view padding_mode = "zeros");

// (by input, by weight), with the sizes and strides of these.
std::tuple<at::Tensor, at::Tensor> conv2d_both_grads(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, c10::SymIntArrayRef stride,
                                                     c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                     c10::SymInt groups, std::string_view padding_mode = "zeros");

at::Tensor separable_conv2d(const at::Tensor& input, const at::Tensor& depthwise_weight,
                            const std::optional<at::Tensor>& depthwise_bias, const at::Tensor& pointwise_weight,
                            const std::optional<at::Tensor>& pointwise_bias, c10::SymIntArrayRef stride,
                            c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                            std::string_view depthwise_activation, std::string_view pointwise_activation,
                            bool save_intermediate);

std::tuple<at::Tensor, at::Tensor> separable_conv2d_training(
    const at::Tensor& input, const at::Tensor& depthwise_weight, const std::optional<at::Tensor>& depthwise_bias,
    const at::Tensor& pointwise_weight, const std::optional<at::Tensor>& pointwise_bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, std::string_view depthwise_activation,
    std::string_view pointwise_activation, bool output, bool intermediate);

at::Tensor spatial_separable_conv2d(const at::Tensor& input, const at::Tensor& column, const at::Tensor& row,
                                    c10::SymIntArrayRef padding);

}  // namespace sepconv::ops
