#include "separable.h"

#include <ATen/ATen.h>

#include <array>

#include "aten_route.h"
#include "ops.h"

namespace sepconv::separable {

using at::Tensor;
using c10::SymInt;

namespace {

const char* name(Activation a) { return kActivationNames[static_cast<int>(a)]; }

Tensor depthwise(const Call& c, Activation activation) {
  return ops::conv2d(c.input, c.depthwise_weight, c.depthwise_bias, c.stride, c.padding, c.dilation,
                     c.input.sym_size(1), name(activation));
}

}  // namespace

Tensor depthwise(const Call& c) { return depthwise(c, kept_activation(c.depthwise_activation)); }

Tensor activated(const Call& c, const Tensor& kept) {
  return derivative_from_output(c.depthwise_activation) ? kept : aten::activate(kept, c.depthwise_activation);
}

Tensor pointwise(const Call& c, const Tensor& activated, Activation activation) {
  const std::array<SymInt, 2> one{1, 1}, zero{0, 0};
  return ops::conv2d(activated, c.pointwise_weight, c.pointwise_bias, one, zero, one, 1, name(activation));
}

Tensor composite(const Call& c) { return pointwise(c, depthwise(c, c.depthwise_activation), c.pointwise_activation); }

std::tuple<Tensor, Tensor> composite_training(const Call& c, bool output, bool intermediate) {
  const Tensor kept = depthwise(c), none = at::empty({0}, c.input.options());
  return {output ? pointwise(c, activated(c, kept), c.pointwise_activation) : none, intermediate ? kept : none};
}

}  // namespace sepconv::separable
