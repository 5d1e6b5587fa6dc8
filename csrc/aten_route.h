// The same three maps by torch's own convolution: for what no kernel here covers, and where ATen is measured faster.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>

#include "activation.h"
#include "padding_mode.h"
#include "separable.h"

namespace sepconv::aten {

// Plain numbers as the symbolic ones that the functions below take.
inline c10::SymIntArrayRef sym(at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); }

// Differentiable, and open to every transform of torch (forward-mode AD, vmap): built from ATen's own functions.
at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                  const c10::SymInt& groups, Activation activation, PaddingMode = PaddingMode::zeros);

at::Tensor conv2d_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_size,
                             c10::SymIntArrayRef input_stride, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             c10::SymIntArrayRef dilation, const c10::SymInt& groups, PaddingMode = PaddingMode::zeros);

at::Tensor conv2d_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_size,
                              c10::SymIntArrayRef weight_stride, c10::SymIntArrayRef stride,
                              c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, const c10::SymInt& groups,
                              PaddingMode = PaddingMode::zeros);

// A product over channels, image [N, C, H, W] with weight [K, C, 1, 1], by oneDNN where torch has it, whatever the number
// of threads. Not differentiable.
at::Tensor onednn_product(const at::Tensor& image, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// The gradients by the input and by the weight in one call, which brings grad_output into ATen's layout once. Padding is
// (h, w).
std::tuple<at::Tensor, at::Tensor> conv2d_both_grads(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, c10::SymIntArrayRef stride,
                                                     c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                     const c10::SymInt& groups);

at::Tensor separable_conv2d(const separable::Call&);

// A column and a row filter as two depthwise convolutions.
at::Tensor spatial_separable_conv2d(const at::Tensor& input, const at::Tensor& column, const at::Tensor& row,
                                    c10::SymIntArrayRef padding);

// The image with its padding, a copy; and the gradient by the image of one by the padded image (`image` for its size and
// layout alone). Padding is (h, w) or (top, bottom, left, right); the mode is not zeros.
at::Tensor pad(const at::Tensor& image, c10::SymIntArrayRef padding, PaddingMode);
at::Tensor fold(const at::Tensor& grad_padded, const at::Tensor& image, c10::SymIntArrayRef padding, PaddingMode);

// The activation alone, differentiable.
at::Tensor activate(const at::Tensor&, Activation);
// The same in the memory of a result that nobody else has seen, where no derivative is recorded.
at::Tensor activate_in_place(at::Tensor, Activation);

}  // namespace sepconv::aten
