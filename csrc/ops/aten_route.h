// The same three maps by torch's own convolution: for what no kernel here covers, and where ATen is measured faster.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>

#include "core/epilogue.h"
#include "core/padding_mode.h"
#include "ops/ops.h"

namespace sepconv::aten {

// Plain numbers as the symbolic ones that the functions below take.
inline c10::SymIntArrayRef sym(at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); }

// The ops themselves (their signatures), differentiable, and open to every transform of torch (forward-mode AD, vmap):
// built of ATen's own functions.
SignatureOf<ops::conv2d> conv2d;
SignatureOf<ops::conv2d_grad_input> conv2d_grad_input;
SignatureOf<ops::conv2d_grad_weight> conv2d_grad_weight;
SignatureOf<ops::spatial_separable_conv2d> spatial_separable_conv2d;

// The gradients by the input and by the weight in one call, which brings grad_output into ATen's layout once. Padding
// has one entry a dimension.
std::tuple<at::Tensor, at::Tensor> conv2d_both_grads(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, const ops::Args&);

// The image with its padding, a copy, which is padded in its last `dims` dimensions; the mode is not zeros.
at::Tensor pad(const at::Tensor& image, c10::SymIntArrayRef padding, size_t dims, PaddingMode);

// The activation alone, differentiable.
at::Tensor activate(const at::Tensor&, Activation);
// The same in the memory of a result that nobody else has seen, where no derivative is recorded.
at::Tensor activate_in_place(at::Tensor, Activation);

}  // namespace sepconv::aten
