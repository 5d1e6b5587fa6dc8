// One call of one of the three maps: its operands, checked, and what a plan may ask to be done to them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <array>
#include <optional>

#include "core/epilogue.h"
#include "core/operand_layout.h"
#include "ops/aten_route.h"
#include "ops/checks.h"

namespace sepconv {

// One call of one of the three maps, checked. It refers to the op's arguments, and lives no longer than they do.
struct Call {
  using Operand = c10::MaybeOwned<at::Tensor>;
  static Operand borrowed(const at::Tensor& t) { return Operand::borrowed(t); }

  Map map;
  Operand first, second;  // (x, w), (grad_y, w) or (grad_y, x)
  ConvArgs args;
  ConvShape shape;
  Result result;
  at::IntArrayRef size{}, stride{};  // grad_input and grad_weight: what the result was asked to look like
  std::optional<at::Tensor> bias{};  // forward: dense
  Activation activation = kNoActivation;
  std::optional<at::Tensor> residual{};  // forward: lies as the result does

  DType dtype() const { return dtype_of(*first); }
  const void* first_data() const { return first->const_data_ptr(); }
  const void* second_data() const { return second->const_data_ptr(); }
  Epilogue epilogue() const {
    return {bias ? bias->const_data_ptr() : nullptr, activation, residual ? residual->const_data_ptr() : nullptr};
  }
  Finish finish() const { return {activation, residual.has_value()}; }
};

inline Call forward_call(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const ConvArgs& args, Activation activation) {
  Checked checked = check_forward(input, weight, bias, args);
  Call call{Map::forward, Call::borrowed(input), Call::borrowed(weight),
            args,         checked.shape,         std::move(checked.result)};
  if (bias && bias->defined()) call.bias = bias->contiguous();
  call.activation = activation;
  return call;
}

// grad_input: `other` is the weight. grad_weight: it is the input.
inline Call gradient_call(Map map, const at::Tensor& grad_output, const at::Tensor& other, at::IntArrayRef size,
                          at::IntArrayRef stride, const ConvArgs& args) {
  const auto check = map == Map::grad_input ? check_grad_input : check_grad_weight;
  Checked checked = check(grad_output, other, size, stride, args);
  return {
      map,   Call::borrowed(grad_output), Call::borrowed(other), args, checked.shape, std::move(checked.result), size,
      stride};
}

// The call by torch's own convolution, on the tensors as they came.
inline at::Tensor by_aten(const Call& c) {
  const auto stride = aten::sym(c.args.stride), padding = aten::sym(c.args.padding),
             dilation = aten::sym(c.args.dilation), size = aten::sym(c.size), strides = aten::sym(c.stride);
  const int64_t groups = c.args.groups;
  const char *mode = name_of(c.args.padding_mode), *activation = name_of(c.activation);
  switch (c.map) {
    case Map::forward:
      return aten::conv2d(*c.first, *c.second, c.bias, stride, padding, dilation, groups, activation, mode);
    case Map::grad_input:
      return aten::conv2d_grad_input(*c.first, *c.second, size, strides, stride, padding, dilation, groups, mode);
    case Map::grad_weight:
      return aten::conv2d_grad_weight(*c.first, *c.second, size, strides, stride, padding, dilation, groups, mode);
  }
  return {};
}

// The result of a call that has nothing to compute, for which no plan is made.
inline std::optional<at::Tensor> without_work(const Call& c) {
  const bool written_nowhere = c.map != Map::forward && c.shape.input_elements() == 0;
  if (c.shape.output_elements() != 0 && !written_nowhere) return std::nullopt;
  at::Tensor result = c.result.empty(*c.first);
  return c.map == Map::grad_weight ? result.zero_() : result;
}

inline ImageShape image_shape(const at::Tensor& image) {  // [N, C, H, W]
  const at::IntArrayRef size = image.sizes(), stride = image.strides();
  return {size[0], size[1], size[2], size[3], {stride[0], stride[1], stride[2], stride[3]}};
}

// How a device copies an image to one of the same size and dtype.
using CopyImage = void (*)(const at::Tensor& to, const at::Tensor& from);

// The image, sequence or weight in dense memory of that layout, as copied_strides() has it.
inline at::Tensor dense_copy(CopyImage copy_image, const at::Tensor& t, Layout layout, bool sequence, bool all_images) {
  const at::Tensor image = as_image(t, sequence);
  const Strides s = copied_strides(image_shape(image), layout, all_images);
  const std::array<int64_t, 4> strides{s.n, s.c, s.h, s.w};
  at::Tensor once = image;
  for (int dim = 0; dim < 4; ++dim) {
    if (strides[dim] == 0) once = once.narrow(dim, 0, 1);
  }
  const at::Tensor copy = at::empty_strided(once.sizes(), strides, t.options());
  copy_image(copy, once);
  const at::Tensor all = copy.expand(image.sizes());
  return t.dim() == 4 ? all : all.view(t.sizes());
}

// The call as the kernel is to see it, with the copies that its plan asks for.
inline Call with_copies(const Call& c, const Copies& copies, CopyImage copy_image) {
  const bool sequence = c.args.for_sequences();
  const auto operand = [&](const at::Tensor& t, bool copied, Layout layout, bool all_images) {
    return copied ? Call::Operand::owned(dense_copy(copy_image, t, layout, sequence, all_images)) : Call::borrowed(t);
  };
  const bool gradient_first = c.map != Map::forward, weight_second = c.map != Map::grad_weight;
  const ConvShape shape = with_copies(c.shape, copies);
  const Strides& written = c.map == Map::forward ? shape.y : c.map == Map::grad_input ? shape.x : shape.w;
  return {c.map,
          operand(*c.first, gradient_first ? copies.y : copies.x, copies.layout, copies.all_images),
          weight_second ? operand(*c.second, copies.weight, Layout::nchw, true)
                        : operand(*c.second, copies.x, copies.layout, copies.all_images),
          c.args,
          shape,
          c.result.laid_out(written, sequence),
          c.size,
          c.stride,
          c.bias,
          c.activation};
}

}  // namespace sepconv
