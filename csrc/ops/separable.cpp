#include "ops/separable.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>

#include "core/activation.h"
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

Activation kept_activation(Activation a) { return derivative_from_output(a) ? a : Activation::identity; }

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

CheckedSeparable check(const Call& c) {
  return check_separable(c.input, c.depthwise_weight, c.depthwise_bias, c.pointwise_weight, c.pointwise_bias,
                         C10_AS_INTARRAYREF_SLOW(c.stride), C10_AS_INTARRAYREF_SLOW(c.padding),
                         C10_AS_INTARRAYREF_SLOW(c.dilation));
}

Tensor by_dispatcher(const Call& c, bool save_intermediate) {
  return ops::separable_conv2d(c.input, c.depthwise_weight, c.depthwise_bias, c.pointwise_weight, c.pointwise_bias,
                               c.stride, c.padding, c.dilation, name_of(c.depthwise_activation),
                               name_of(c.pointwise_activation), save_intermediate);
}

std::tuple<Tensor, Tensor> training_by_dispatcher(const Call& c, bool output, bool intermediate) {
  return ops::separable_conv2d_training(
      c.input, c.depthwise_weight, c.depthwise_bias, c.pointwise_weight, c.pointwise_bias, c.stride, c.padding,
      c.dilation, name_of(c.depthwise_activation), name_of(c.pointwise_activation), output, intermediate);
}

Tensor by_aten(const Call& c, bool /*save_intermediate*/) {
  const Tensor intermediate = depthwise(c, c.depthwise_activation, aten::conv2d);
  return pointwise(c, intermediate, c.pointwise_activation, aten::conv2d);
}

}  // namespace sepconv::separable
