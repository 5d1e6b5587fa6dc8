// What the derivative formulas of autograd.cpp and autograd_separable.cpp share.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/epilogue.h"
#include "ops/ops.h"

namespace sepconv {

// The size and strides of a tensor that a gradient will have to match; kept apart from the tensor, which may not be
// saved.
struct SavedGeometry {
  std::vector<c10::SymInt> size, stride;

  static SavedGeometry load(torch::autograd::AutogradContext*, const std::string& name);
  static void store(torch::autograd::AutogradContext*, const std::string& name, const at::Tensor&);
  static void store(torch::autograd::AutogradContext*, const std::string& name, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride);
};

// The gradients by a convolution's input and by its weight, each undefined where it is not wanted. Where both are, and
// no derivative of theirs, they are one op.
struct SavedOperand {
  const at::Tensor& tensor;
  SavedGeometry geometry;
};
std::tuple<at::Tensor, at::Tensor> gradients(bool by_input, bool by_weight, const at::Tensor& grad_output,
                                             const SavedOperand& input, const SavedOperand& weight, const ops::Args&);

// An optional tensor as a tensor, which may be undefined.
const at::Tensor& tensor_or_none(const std::optional<at::Tensor>&);

inline at::Tensor saved_if(bool needed, const at::Tensor& t) { return needed ? t : at::Tensor(); }

// The gradient before the activation, from the gradient after it and the activation's own output; or, where
// derivative_from_output() of activation.h says no, its input.
at::Tensor activation_backward(const at::Tensor& grad, const at::Tensor& output_or_input, Activation);

// The sum of a gradient over all but its channels, which `dims` spatial dimensions follow: the gradient of the bias.
at::Tensor sum_to_channels(const at::Tensor& grad, size_t dims);

// Why a call on these tensors must be made of ATen's own differentiable functions; null where our kernels can take it.
// The first of them is an image, or a sequence, of so many spatial dimensions.
const char* needs_aten(size_t dims, std::initializer_list<const at::Tensor*> tensors);

// True if a derivative by one of these tensors will be asked for.
bool differentiates(std::initializer_list<const at::Tensor*> tensors);

}  // namespace sepconv
