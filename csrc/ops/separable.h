// The fourth op, depthwise -> [bias, activation] -> pointwise -> [bias, activation], made of the first one: for devices
// and shapes without a fused kernel, and for the derivatives.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "core/epilogue.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace sepconv::separable {

// An activation, by its name where an op was given that.
struct NamedActivation {
  Activation activation;
  NamedActivation(Activation a) : activation(a) {}
  NamedActivation(std::string_view name) : activation(parse_activation(name)) {}
  operator Activation() const { return activation; }
};

// A call's tensors and arguments, gathered, in the order of the op's signature. It refers to them: it does not outlive
// the function that got them.
struct Call {
  const at::Tensor &input, &depthwise_weight;
  ops::Bias depthwise_bias;
  const at::Tensor& pointwise_weight;
  ops::Bias pointwise_bias;
  c10::SymIntArrayRef stride, padding, dilation;
  NamedActivation depthwise_activation, pointwise_activation;

  Call with_input(const at::Tensor& image) const {
    return {image,  depthwise_weight, depthwise_bias, pointwise_weight,     pointwise_bias,
            stride, padding,          dilation,       depthwise_activation, pointwise_activation};
  }
};

// A function of a Call as a function with the op's own arguments. What the op is told beside the call comes after it:
// save_intermediate; or for training whether the output and the intermediate are wanted.
template <at::Tensor (*function)(const Call&, bool save_intermediate)>
inline constexpr auto as_op = Gathering<SignatureOf<ops::separable_conv2d>>::call<Call, 10, function>;
template <std::tuple<at::Tensor, at::Tensor> (*function)(const Call&, bool output, bool intermediate)>
inline constexpr auto as_training_op = Gathering<SignatureOf<ops::separable_conv2d_training>>::call<Call, 10, function>;

CheckedSeparable check(const Call&);

// The ops, through the dispatcher.
at::Tensor by_dispatcher(const Call&, bool save_intermediate);
std::tuple<at::Tensor, at::Tensor> training_by_dispatcher(const Call&, bool output, bool intermediate);

// The activation that the intermediate is kept behind: none where the derivative needs the value before.
Activation kept_activation(Activation);

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
at::Tensor by_aten(const Call&, bool save_intermediate = false);

}  // namespace sepconv::separable
