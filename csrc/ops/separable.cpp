#include "ops/separable.h"

#include <ATen/ATen.h>

#include <array>

#include "ops/aten_route.h"
#include "ops/ops.h"

namespace sepconv::separable {

using at::Tensor;
using c10::SymInt;

namespace {

// The two stages, by the op table or by what has its signature.
template <typename Convolution>
Tensor depthwise(const Call& c, Activation activation, const Convolution& conv2d) {
  const SymInt channels = c.input.dim() >= 3 ? c.input.sym_size(-3) : SymInt(1);  // else the call complains of the rank
  return conv2d(c.input, c.depthwise_weight, c.depthwise_bias, c.stride, c.padding, c.dilation, channels,
                name_of(activation), "zeros");
}

template <typename Convolution>
Tensor pointwise(const Call& c, const Tensor& activated, Activation activation, const Convolution& conv2d) {
  const std::array<SymInt, 2> one{1, 1}, zero{0, 0};
  return conv2d(activated, c.pointwise_weight, c.pointwise_bias, one, zero, one, 1, name_of(activation), "zeros");
}

}  // namespace

Tensor depthwise(const Call& c) { return depthwise(c, kept_activation(c.depthwise_activation), ops::conv2d); }

Tensor activated(const Call& c, const Tensor& kept) {
  return derivative_from_output(c.depthwise_activation) ? kept : aten::activate(kept, c.depthwise_activation);
}

Tensor pointwise(const Call& c, const Tensor& activated, Activation activation) {
  return pointwise(c, activated, activation, ops::conv2d);
}

Tensor composite(const Call& c) {
  return pointwise(c, depthwise(c, c.depthwise_activation, ops::conv2d), c.pointwise_activation);
}

std::tuple<Tensor, Tensor> composite_training(const Call& c, bool output, bool intermediate) {
  const Tensor kept = depthwise(c), none = at::empty({0}, c.input.options());
  return {output ? pointwise(c, activated(c, kept), c.pointwise_activation) : none, intermediate ? kept : none};
}

Tensor by_aten(const Tensor& input, const Tensor& depthwise_weight, ops::Bias depthwise_bias,
               const Tensor& pointwise_weight, ops::Bias pointwise_bias, c10::SymIntArrayRef stride,
               c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, std::string_view depthwise_activation,
               std::string_view pointwise_activation, bool /*save_intermediate*/) {
  const Call c = call_of(input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding,
                         dilation, depthwise_activation, pointwise_activation);
  const Tensor intermediate = depthwise(c, c.depthwise_activation, aten::conv2d);
  return pointwise(c, intermediate, c.pointwise_activation, aten::conv2d);
}

}  // namespace sepconv::separable
