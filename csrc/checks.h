// Tensors -> ConvShape: the only place where arguments are validated.
//
// Every function here throws what torch throws for the same mistake (a RuntimeError, by TORCH_CHECK) before anything is
// allocated or written; the message names the argument and both values.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>

#include "activation.h"
#include "conv_shape.h"
#include "padding_mode.h"
#include "separable_shape.h"

namespace sepconv {

// stride and dilation are (h, w); padding is (h, w), or (top, bottom, left, right) where the two sides differ.
struct ConvArgs {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  PaddingMode padding_mode = PaddingMode::zeros;
};

// The geometry of a forward call. The output's strides are chosen here: channels_last where the input or the weight
// suggests it (torch's rule), else contiguous.
ConvShape check_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const ConvArgs&);

// The geometry of the two gradients. The result takes the strides asked for where they are dense; where they are not
// (a sliced or expanded tensor), it is channels_last if they order the dimensions so, else contiguous.
ConvShape check_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size,
                           at::IntArrayRef input_stride, const ConvArgs&);
ConvShape check_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size,
                            at::IntArrayRef weight_stride, const ConvArgs&);

// The geometry of a depthwise convolution and the pointwise one that follows it. The intermediate's and the output's
// strides are chosen as two forward calls would choose them.
SeparableShape check_separable(const at::Tensor& input, const at::Tensor& depthwise_weight,
                               const std::optional<at::Tensor>& depthwise_bias, const at::Tensor& pointwise_weight,
                               const std::optional<at::Tensor>& pointwise_bias, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation);

// The ranks of a 1-D call, which is made of the 2-D one: what else may be wrong, the 2-D checks find.
void check_sequence(const at::Tensor& input, const at::Tensor& weight);

// A spatially separable call as the depthwise shape that it computes; `w` of the shape is not set. padding as above.
ConvShape check_spatial_separable(const at::Tensor& input, const at::Tensor& column, const at::Tensor& row,
                                  at::IntArrayRef padding);

// Uninitialised memory for the result that a check described.
at::Tensor empty_output(const ConvShape&, const at::Tensor& like);
at::Tensor empty_grad_input(const ConvShape&, const at::Tensor& like);
at::Tensor empty_grad_weight(const ConvShape&, const at::Tensor& like);

// What ATen returned where its strides are the promised ones, but for those of dimensions of size 1, which are set;
// else a copy into allocate(), which has them.
template <typename Allocate>
at::Tensor with_strides(const Strides& promised, const at::Tensor& computed, const Allocate& allocate) {
  const std::array<int64_t, 4> strides{promised.n, promised.c, promised.h, promised.w};
  if (computed.strides() == at::IntArrayRef(strides)) return computed;
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (computed.size(dim) > 1 && computed.stride(dim) != strides[dim]) return allocate().copy_(computed);
  }
  return computed.as_strided_(computed.sizes(), strides);
}

Activation parse_activation(std::string_view name);
PaddingMode parse_padding_mode(std::string_view name);

// True for the four types that kernels are written for; everything else (complex, integers, quantised) goes to ATen.
bool has_kernel_dtype(const at::Tensor&);
DType dtype_of(const at::Tensor&);

}  // namespace sepconv
