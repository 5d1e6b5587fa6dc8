#include "ops/inverted_residual.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/hardsigmoid.h>
#include <torch/library.h>

#include <array>

#include "ops/aten_route.h"
#include "ops/autograd.h"
#include "ops/residual.h"
#include "ops/runtime.h"

namespace sepconv::inverted_residual {

using at::Tensor;
using c10::SymInt;

namespace {

// The stages by the op table, or by what has its signatures.
template <typename Convolution, typename WithResidual>
Tensor block(const Call& c, const Convolution& conv2d, const WithResidual& conv2d_residual) {
  const std::array<SymInt, 2> one{1, 1}, zero{0, 0};
  const auto product = [&](const Tensor& x, const Tensor& w, ops::Bias bias, std::string_view activation) {
    return conv2d(x, w, bias, one, zero, one, 1, activation, "zeros");
  };
  const Tensor& expand = tensor_or_none(c.expand_weight);
  const Tensor e = expand.defined() ? product(c.input, expand, c.expand_bias, c.expand_activation) : c.input;
  const SymInt channels = e.dim() >= 3 ? e.sym_size(-3) : SymInt(1);  // else the call complains of the rank
  Tensor d = conv2d(e, c.depthwise_weight, c.depthwise_bias, c.stride, c.padding, c.dilation, channels,
                    c.depthwise_activation, "zeros");
  if (tensor_or_none(c.squeeze_weight).defined()) {
    const bool hard = is_hard_gate(c.gate);
    const Tensor squeezed =
        product(d.mean({-2, -1}, /*keepdim=*/true), *c.squeeze_weight, c.squeeze_bias, c.squeeze_activation);
    const Tensor excited = product(squeezed, *c.excite_weight, c.excite_bias, hard ? "identity" : "sigmoid");
    d = d.mul(hard ? at::hardsigmoid(excited) : excited);
  }
  if (!c.residual) return product(d, c.project_weight, c.project_bias, c.project_activation);
  return conv2d_residual(d, c.project_weight, c.project_bias, c.input, one, zero, one, 1, c.project_activation);
}

Tensor by_dispatcher(const Call& c) {
  return ops::inverted_residual(c.input, c.expand_weight, c.expand_bias, c.depthwise_weight, c.depthwise_bias,
                                c.project_weight, c.project_bias, c.squeeze_weight, c.squeeze_bias, c.excite_weight,
                                c.excite_bias, c.stride, c.padding, c.dilation, c.expand_activation,
                                c.depthwise_activation, c.squeeze_activation, c.gate, c.project_activation, c.residual);
}

// Where a derivative is wanted, the call is made of calls that have one.
Tensor autograd(const Call& c) {
  const auto tensors = {&c.input,
                        &tensor_or_none(c.expand_weight),
                        &tensor_or_none(c.expand_bias),
                        &c.depthwise_weight,
                        &tensor_or_none(c.depthwise_bias),
                        &c.project_weight,
                        &tensor_or_none(c.project_bias),
                        &tensor_or_none(c.squeeze_weight),
                        &tensor_or_none(c.squeeze_bias),
                        &tensor_or_none(c.excite_weight),
                        &tensor_or_none(c.excite_bias)};
  if (const char* reason = needs_aten(2, tensors)) {
    count_aten(reason);
    return by_aten(c);
  }
  if (!differentiates(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return by_dispatcher(c);
  }
  check_inverted_residual(c);
  return composite(c);
}

}  // namespace

BlockShape block_shape(const Call& c, const CheckedInvertedResidual& checked) {
  BlockShape shape{checked.depthwise, checked.C,    checked.K, tensor_or_none(c.expand_weight).defined(),
                   c.residual,        checked.M > 0};
  ConvShape& d = shape.depthwise;
  d.x = d.y = {};
  const Tensor& x = c.input;
  if (x.dim() == 4 && x.suggest_memory_format() == at::MemoryFormat::ChannelsLast) {
    d.x = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    d.y = {d.P * d.Q * shape.K, 1, d.Q * shape.K, shape.K};
  }
  return shape;
}

Tensor composite(const Call& c) { return block(c, ops::conv2d, ops::conv2d_residual); }

Tensor by_aten(const Call& c) { return block(c, aten::conv2d, residual::by_aten); }

}  // namespace sepconv::inverted_residual

TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) {
  m.impl("inverted_residual", sepconv::inverted_residual::as_op<sepconv::inverted_residual::autograd>);
}
