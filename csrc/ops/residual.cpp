#include "ops/residual.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "core/activation.h"
#include "ops/aten_route.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/runtime.h"

namespace sepconv::residual {

using at::Tensor;
using c10::SymInt;

namespace {

// In the memory of the convolution's result where nobody asks for its derivative.
Tensor finish(const Tensor& output, const Tensor& residual, std::string_view activation) {
  const bool own = !output.requires_grad() && !residual.requires_grad() && !at::isTensorSubclassLike(output) &&
                   !at::isTensorSubclassLike(residual);
  const Tensor sum = own ? output.add_(residual) : output.add(residual);
  return own ? aten::activate_in_place(sum, parse_activation(activation))
             : aten::activate(sum, parse_activation(activation));
}

// Where a derivative is wanted, the call is made of calls that have one.
Tensor autograd(const Tensor& input, const Tensor& weight, ops::Bias bias, const Tensor& residual, ops::Ints stride,
                ops::Ints padding, ops::Ints dilation, SymInt groups, std::string_view activation) {
  const auto tensors = {&input, &weight, &tensor_or_none(bias), &residual};
  if (needs_aten(stride.size(), tensors) != nullptr || differentiates(tensors)) {
    return composite(input, weight, bias, residual, stride, padding, dilation, std::move(groups), activation);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_residual(input, weight, bias, residual, stride, padding, dilation, std::move(groups), activation);
}

}  // namespace

Tensor composite(const Tensor& input, const Tensor& weight, ops::Bias bias, const Tensor& residual, ops::Ints stride,
                 ops::Ints padding, ops::Ints dilation, SymInt groups, std::string_view activation) {
  return finish(ops::conv2d(input, weight, bias, stride, padding, dilation, std::move(groups), "identity", "zeros"),
                residual, activation);
}

Tensor by_aten(const Tensor& input, const Tensor& weight, ops::Bias bias, const Tensor& residual, ops::Ints stride,
               ops::Ints padding, ops::Ints dilation, SymInt groups, std::string_view activation) {
  return finish(aten::conv2d(input, weight, bias, stride, padding, dilation, std::move(groups), "identity", "zeros"),
                residual, activation);
}

}  // namespace sepconv::residual

TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) { m.impl("conv2d_residual", sepconv::residual::autograd); }
