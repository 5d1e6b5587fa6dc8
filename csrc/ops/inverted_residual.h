// The op inverted_residual, 1x1 -> depthwise -> [squeeze-and-excitation] -> 1x1 [+ input], made of conv2d: for devices
// and calls without a fused kernel, and for the derivatives.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>

#include "core/block_shape.h"
#include "core/epilogue.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace sepconv::inverted_residual {

// A call's tensors and arguments, gathered. It refers to them: it does not outlive the function that got them.
struct Call {
  const at::Tensor& input;
  const std::optional<at::Tensor>&expand_weight, &expand_bias;
  const at::Tensor& depthwise_weight;
  const std::optional<at::Tensor>& depthwise_bias;
  const at::Tensor& project_weight;
  const std::optional<at::Tensor>&project_bias, &squeeze_weight, &squeeze_bias, &excite_weight, &excite_bias;
  c10::SymIntArrayRef stride, padding, dilation;
  std::string_view expand_activation, depthwise_activation, squeeze_activation, gate, project_activation;
  bool residual;
};

// A function of a Call as a function with the op's own arguments.
template <at::Tensor (*function)(const Call&)>
inline constexpr auto as_op = Gathering<SignatureOf<ops::inverted_residual>>::call<Call, 20, function>;

// The call in plain numbers, for the plan.
BlockShape block_shape(const Call&, const CheckedInvertedResidual&);

// By the ops of the table; differentiable when called above the autograd key.
at::Tensor composite(const Call&);

// By ATen's own functions, differentiable.
at::Tensor by_aten(const Call&);

}  // namespace sepconv::inverted_residual
