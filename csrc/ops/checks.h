// Tensors -> ConvShape: the only place where arguments are validated.
//
// Every function here throws what torch throws for the same mistake (a RuntimeError, by TORCH_CHECK) before anything is
// allocated or written; the message names the argument and both values.
#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/padding_mode.h"
#include "core/separable_shape.h"

namespace sepconv {

namespace inverted_residual {
struct Call;
}

// For images, stride and dilation are (h, w); padding is (h, w), or (top, bottom, left, right) where the two sides
// differ. For sequences they are (l); padding is (l) or (left, right). The entries of stride say which of the two a
// call is for.
struct ConvArgs {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  PaddingMode padding_mode = PaddingMode::zeros;

  bool for_sequences() const { return stride.size() == 1; }
};

// The tensor that a call returns, in the rank of its operands: a sequence has no height, an unbatched call no batch.
struct Result {
  at::DimVector size, stride;

  at::Tensor empty(const at::Tensor& like) const;  // uninitialised memory
  Result laid_out(const Strides&, bool sequence) const;
  // `computed` where its strides are these, but for those of dimensions of size 1, which are set; else undefined.
  at::Tensor with_strides(const at::Tensor& computed) const;
};

// What a check finds: the call as every kernel is told of it, where a sequence is an image of one row and what has no
// batch is a batch of one; and the result.
struct Checked {
  ConvShape shape;
  Result result;
};

// A forward call. Operands are [N, C, H, W] or [C, H, W] with a weight [K, C / groups, R, S], or [N, C, L] or [C, L]
// with [K, C / groups, S]. The output's strides are chosen here: channels_last where the input or the weight suggests
// it (torch's rule), else contiguous; a sequence in the memory order [N, L, C] is a channels_last row.
Checked check_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const ConvArgs&);

// What is added to that result: as large, any strides.
void check_residual(const at::Tensor& residual, const Result&, const at::Tensor& input);

// The two gradients. The result takes the strides asked for where they are dense; where they are not (a sliced or
// expanded tensor), it is channels_last if they order the dimensions so, else contiguous.
Checked check_grad_input(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size,
                         at::IntArrayRef input_stride, const ConvArgs&);
Checked check_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_size,
                          at::IntArrayRef weight_stride, const ConvArgs&);

// A depthwise convolution and the pointwise one that follows it, on images. The intermediate's and the output's strides
// are chosen as two forward calls would choose them.
struct CheckedSeparable {
  SeparableShape shape;
  Result intermediate, output;
};
CheckedSeparable check_separable(const at::Tensor& input, const at::Tensor& depthwise_weight,
                                 const std::optional<at::Tensor>& depthwise_bias, const at::Tensor& pointwise_weight,
                                 const std::optional<at::Tensor>& pointwise_bias, at::IntArrayRef stride,
                                 at::IntArrayRef padding, at::IntArrayRef dilation);

// A spatially separable call as the depthwise shape that it computes; `w` of the shape is not set.
Checked check_spatial_separable(const at::Tensor& input, const at::Tensor& column, const at::Tensor& row,
                                at::IntArrayRef padding);

// The block of ops/inverted_residual.h. `depthwise` is the shape of its depthwise convolution, without strides of
// tensors. Of sizes that are symbols nothing is checked here.
struct CheckedInvertedResidual {
  ConvShape depthwise;
  int64_t C = 0, K = 0, M = 0;  // channels of the input, of the output, and of the squeezed means (0: none)
};
CheckedInvertedResidual check_inverted_residual(const inverted_residual::Call&);

// A tensor of a call as an image [N, C, H, W], or a weight as [K, C / groups, R, S]: a view that adds the dimensions
// that it lacks.
at::Tensor as_image(const at::Tensor&, bool sequence);

Activation parse_activation(std::string_view name);
bool is_hard_gate(std::string_view name);  // of "sigmoid" and "hardsigmoid"
PaddingMode parse_padding_mode(std::string_view name);
const char* name_of(Activation);
constexpr const char* name_of(PaddingMode mode) { return kPaddingModeNames[static_cast<int>(mode)]; }

// True for the four types that kernels are written for; everything else (complex, integers, quantised) goes to ATen.
bool has_kernel_dtype(const at::Tensor&);
// Raises where a tensor's storage is smaller than its sizes need.
void check_storage(const char* name, const at::Tensor&);
// Why no kernel takes an input of so many spatial dimensions, while ATen may; null where one does.
const char* no_kernel_for(const at::Tensor& input, size_t dims);
DType dtype_of(const at::Tensor&);

}  // namespace sepconv
