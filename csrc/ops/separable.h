// The fourth op, depthwise -> [bias, activation] -> pointwise -> [bias, activation], made of the first one: for devices
// and shapes without a fused kernel, and for the derivatives.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "core/activation.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace sepconv::separable {

// A call's tensors and arguments, gathered. It refers to them: it does not outlive the function that got them.
struct Call {
  const at::Tensor &input, &depthwise_weight;
  const std::optional<at::Tensor>& depthwise_bias;
  const at::Tensor& pointwise_weight;
  const std::optional<at::Tensor>& pointwise_bias;
  c10::SymIntArrayRef stride, padding, dilation;
  Activation depthwise_activation, pointwise_activation;
};

// The same from the op's own arguments.
inline Call call_of(const at::Tensor& input, const at::Tensor& depthwise_weight, ops::Bias depthwise_bias,
                    const at::Tensor& pointwise_weight, ops::Bias pointwise_bias, c10::SymIntArrayRef stride,
                    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, std::string_view depthwise_activation,
                    std::string_view pointwise_activation) {
  return {input,
          depthwise_weight,
          depthwise_bias,
          pointwise_weight,
          pointwise_bias,
          stride,
          padding,
          dilation,
          parse_activation(depthwise_activation),
          parse_activation(pointwise_activation)};
}

// The activation that the intermediate is kept behind: none where the derivative needs the value before.
constexpr Activation kept_activation(Activation a) { return derivative_from_output(a) ? a : Activation::identity; }

// The stages, each one conv2d of the op table; differentiable when called above the autograd key. depthwise() gives the
// intermediate as it is kept: behind kept_activation(); activated() the pointwise stage's input from it.
at::Tensor depthwise(const Call&);
at::Tensor activated(const Call&, const at::Tensor& kept);
at::Tensor pointwise(const Call&, const at::Tensor& activated, Activation);

// The op separable_conv2d. The intermediate is written to memory and freed.
at::Tensor composite(const Call&);

// The op separable_conv2d_training.
std::tuple<at::Tensor, at::Tensor> composite_training(const Call&, bool output, bool intermediate);

// The op separable_conv2d by ATen's own functions, differentiable.
SignatureOf<ops::separable_conv2d> by_aten;

}  // namespace sepconv::separable
