// The way of a call from the dispatcher to the kernel, written once for every device:
//
//   check      tensors and arguments become a ConvShape (checks.h)
//   once       an expanded batch is computed as the one image that it is
//   overlap    where the call reaches far beyond the image, a smaller one takes its place (overlap.h)
//   plan       the device says which kernel runs, and why (its plan.h)
//   by ATen    where the plan says so, torch's own convolution (aten_route.h), brought to the promised strides
//   copy       what the plan's kernel does not take as it lies is exchanged for a dense copy (operand_layout.h)
//   allocate   the result, with the strides that the check promised
//   run        the kernel, through the device's door
//   borders    what depends on the padding where that is not zeros
//   copy       a result that the kernel could not write where the check promised it
//
// A device is a policy: a struct of types and static functions. Each bindings.cpp defines one and registers it:
//
//   Guard                        makes the device of a tensor the current one while it lives
//   kBorders                     the name of the border kernel, as counted
//   copy_image(to, from)         copies between memory orders, an image as [N, C, H, W]
//   kAddsResidual                whether a kernel can add a residual: plan(Call).adds_residual() then says it
//   kKeepsIntermediate           whether the fused separable kernel can write what lies between its stages
//   plan(Call)                   the plan of one of the three maps: name, reason, is_aten(), is_torchs()
//   aten(plan, Call)             the call of torch's that the plan names
//   fresh(Result, like)          the result's memory, which is about to be written as a whole
//   run(plan, Call, out)         the kernel that the plan names
//   run_borders(Call, out)       the border kernel
//   plan_separable, run_separable, spatial_kernel, run_spatial: the same for the fused ops
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "core/activation.h"
#include "core/overlap.h"
#include "ops/aten_route.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/convolve_overlap.h"
#include "ops/expanded_batch.h"
#include "ops/residual.h"
#include "ops/runtime.h"
#include "ops/separable.h"
#include "ops/spatial_passes.h"

namespace sepconv {

template <typename Device>
at::Tensor convolve(const Call& call);

// The kernels' part of a call.
template <typename Device, typename Plan>
at::Tensor run_kernels(const Call& call, const Plan& plan, BorderExtent border) {
  const at::Tensor out = Device::fresh(call.result, *call.first);
  if (border != BorderExtent::all) {
    count_kernel(plan.name);
    Device::run(plan, call, out);
  }
  if (border != BorderExtent::none) {
    count_kernel(Device::kBorders);
    Device::run_borders(call, out);
  }
  return out;
}

// What was computed, with the strides that the check promised.
template <typename Device>
at::Tensor as_promised(const Call& call, const at::Tensor& computed) {
  if (const at::Tensor same = call.result.with_strides(computed); same.defined()) return same;
  const bool sequence = call.args.for_sequences();
  at::Tensor result = call.result.empty(computed);
  Device::copy_image(as_image(result, sequence), as_image(computed, sequence));
  return result;
}

// Everything that follows the plan.
template <typename Device, typename Plan>
at::Tensor convolve_as_planned(const Call& call, const Plan& plan) {
  if (plan.is_torchs()) {
    if (plan.is_aten()) count_aten(plan.reason);  // else what is called counts
    if (!plan.copies.any()) return as_promised<Device>(call, Device::aten(plan, call));
    return as_promised<Device>(call, Device::aten(plan, with_copies(call, plan.copies, Device::copy_image)));
  }
  const PaddingMode mode = call.args.padding_mode;
  const BorderExtent border = border_extent(call.map, call.shape, mode);
  if (border != BorderExtent::none && call.map == Map::grad_weight && call.first->element_size() == 2) {
    // What two kernels add to a half type would be rounded twice: here alone the input is padded by a copy.
    const at::Tensor padded = aten::pad(*call.second, aten::sym(call.args.padding), call.args.stride.size(), mode);
    const at::DimVector none(call.args.stride.size(), 0);
    const ConvArgs args{call.args.stride, none, call.args.dilation, call.args.groups};
    return convolve<Device>(gradient_call(call.map, *call.first, padded, call.size, call.stride, args));
  }
  if (!plan.copies.any()) return run_kernels<Device>(call, plan, border);
  return as_promised<Device>(call,
                             run_kernels<Device>(with_copies(call, plan.copies, Device::copy_image), plan, border));
}

// An expanded batch is one image: it is computed once, and its output copied.
template <typename Device, typename Compute>
at::Tensor compute_once(const at::Tensor& batch, const Result& result, bool sequence, const Compute& compute) {
  const at::Tensor out = result.empty(batch), first = out.narrow(0, 0, 1);
  Device::copy_image(as_image(first, sequence), as_image(compute(first_image(batch)), sequence));
  out.narrow(0, 1, out.size(0) - 1).copy_(first);
  return out;
}

// A checked call.
template <typename Device>
at::Tensor convolve(const Call& call) {
  const typename Device::Guard guard(*call.first);
  if (const auto result = without_work(call)) return *result;
  if (is_one_image(call.map, call.shape)) {
    return compute_once<Device>(*call.first, call.result, call.args.for_sequences(), [&](const at::Tensor& image) {
      return convolve<Device>(forward_call(image, *call.second, call.bias, call.args, call.activation));
    });
  }
  if (const auto overlap = Overlap::worth_taking(call.shape, call.args.padding_mode)) {
    return convolve_overlap<Device>(call, *overlap);
  }
  return convolve_as_planned<Device>(call, Device::plan(call));
}

template <typename Device>
at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                  std::string_view activation, std::string_view padding_mode) {
  if (const char* reason = no_kernel_for(input, stride.size())) {  // autograd asks too, but not in inference mode
    count_aten(reason);
    return aten::conv2d(input, weight, bias, aten::sym(stride), aten::sym(padding), aten::sym(dilation), groups,
                        activation, padding_mode);
  }
  const ConvArgs args{stride, padding, dilation, groups, parse_padding_mode(padding_mode)};
  return convolve<Device>(forward_call(input, weight, bias, args, parse_activation(activation)));
}

// With a residual: in one, where the plan's kernel adds what lies as its result does.
template <typename Device>
at::Tensor conv2d_residual(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups, std::string_view activation) {
  if (no_kernel_for(input, stride.size()) == nullptr) {
    const ConvArgs args{stride, padding, dilation, groups, PaddingMode::zeros};
    Call call = forward_call(input, weight, bias, args, parse_activation(activation));
    check_residual(residual, call.result, input);
    if constexpr (Device::kAddsResidual) {
      const typename Device::Guard guard(input);
      call.residual = residual;
      const bool beside = residual.strides() == at::IntArrayRef(call.result.stride);
      if (beside && !without_work(call) && !is_one_image(Map::forward, call.shape)) {
        const auto plan = Device::plan(call);
        if (plan.adds_residual()) return run_kernels<Device>(call, plan, BorderExtent::none);
      }
    }
  }
  return residual::composite(input, weight, bias, residual, aten::sym(stride), aten::sym(padding), aten::sym(dilation),
                             groups, activation);
}

template <typename Device, Map map>
at::Tensor gradient(const at::Tensor& grad_output, const at::Tensor& other, at::IntArrayRef size,
                    at::IntArrayRef size_stride, at::IntArrayRef stride, at::IntArrayRef padding,
                    at::IntArrayRef dilation, int64_t groups, std::string_view padding_mode) {
  const ConvArgs args{stride, padding, dilation, groups, parse_padding_mode(padding_mode)};
  return convolve<Device>(gradient_call(map, grad_output, other, size, size_stride, args));
}

// One call of ATen's where the plans send both maps there: it brings grad_output into oneDNN's layout once.
template <typename Device>
std::tuple<at::Tensor, at::Tensor> conv2d_both_grads(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, at::IntArrayRef stride,
                                                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                                     std::string_view padding_mode) {
  const ConvArgs args{stride, padding, dilation, groups, parse_padding_mode(padding_mode)};
  const Call by_input = gradient_call(Map::grad_input, grad_output, weight, input.sizes(), input.strides(), args);
  const Call by_weight = gradient_call(Map::grad_weight, grad_output, input, weight.sizes(), weight.strides(), args);
  const typename Device::Guard guard(grad_output);
  if (const auto grad_input = without_work(by_input)) return {*grad_input, convolve<Device>(by_weight)};
  if (Overlap::worth_taking(by_input.shape, args.padding_mode)) {
    at::Tensor grad_input = convolve<Device>(by_input);
    return {std::move(grad_input), convolve<Device>(by_weight)};
  }
  const auto input_plan = Device::plan(by_input), weight_plan = Device::plan(by_weight);
  const bool symmetric_zeros = args.padding_mode == PaddingMode::zeros && padding.size() == stride.size();
  if (symmetric_zeros && input_plan.is_aten() && weight_plan.is_aten()) {
    count_aten(input_plan.reason), count_aten(weight_plan.reason);
    const ops::Args plain{aten::sym(stride), aten::sym(padding), aten::sym(dilation), groups};
    const auto [grad_input, grad_weight] = aten::conv2d_both_grads(grad_output, input, weight, plain);
    return {as_promised<Device>(by_input, grad_input), as_promised<Device>(by_weight, grad_weight)};
  }
  const Copies &first = input_plan.copies, &second = weight_plan.copies;
  if (first.y && second.y && first.layout == second.layout) {  // both read one copy
    const at::Tensor copy = dense_copy(Device::copy_image, grad_output, first.layout, args.for_sequences(),
                                       first.all_images || second.all_images);
    return conv2d_both_grads<Device>(copy, input, weight, stride, padding, dilation, groups, padding_mode);
  }
  at::Tensor grad_input = convolve_as_planned<Device>(by_input, input_plan);
  return {std::move(grad_input), convolve_as_planned<Device>(by_weight, weight_plan)};
}

// Whether the depthwise stage, called alone, would be made smaller.
inline bool reaches_far(const SeparableShape& shape) {
  return Overlap::worth_taking(shape.depthwise, PaddingMode::zeros).has_value();
}

// (output, intermediate) by the fused kernel of a plan, each empty where it is not wanted.
template <typename Device, typename Plan>
std::tuple<at::Tensor, at::Tensor> separable_fused(const Plan& plan, const CheckedSeparable& checked,
                                                   const separable::Call& call, bool output, bool intermediate) {
  const SeparableShape& shape = checked.shape;
  const auto dense = [](const std::optional<at::Tensor>& t) {
    return t && t->defined() ? t->contiguous() : at::Tensor();
  };
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const at::Tensor none = at::empty({0}, call.input.options());
  const at::Tensor y = output ? Device::fresh(checked.output, call.input) : none;
  const at::Tensor h = intermediate ? Device::fresh(checked.intermediate, call.input) : none;
  const at::Tensor depthwise_bias = dense(call.depthwise_bias), pointwise_bias = dense(call.pointwise_bias);
  if (shape.depthwise.N == 0) return {y, h};
  count_kernel(plan.name);
  const at::Tensor x =
      plan.copies.x ? dense_copy(Device::copy_image, call.input, plan.copies.layout, false, false) : call.input;
  const SeparableShape taken{with_copies(shape.depthwise, plan.copies), shape.pointwise};
  Device::run_separable(plan, taken, dtype_of(call.input),
                        {x.const_data_ptr(),
                         call.depthwise_weight.const_data_ptr(),
                         {data(depthwise_bias), call.depthwise_activation},
                         call.pointwise_weight.const_data_ptr(),
                         {data(pointwise_bias), call.pointwise_activation},
                         output ? y.mutable_data_ptr() : nullptr,
                         intermediate ? h.mutable_data_ptr() : nullptr});
  return {y, h};
}

template <typename Device>
at::Tensor separable_conv2d(const separable::Call& call, bool save_intermediate) {
  if (const char* reason = no_kernel_for(call.input, 2)) {  // in inference mode only, as in conv2d
    count_aten(reason);
    return separable::by_aten(call);
  }
  const CheckedSeparable checked = separable::check(call);
  const typename Device::Guard guard(call.input);
  const auto plan = Device::plan_separable(checked.shape, call.input);
  if (plan.is_composite() || reaches_far(checked.shape)) return separable::composite(call);
  if (is_one_image(Map::forward, checked.shape.depthwise)) {
    return compute_once<Device>(call.input, checked.output, false, [&](const at::Tensor& image) {
      return separable_conv2d<Device>(call.with_input(image), save_intermediate);
    });
  }
  return std::get<0>(separable_fused<Device>(plan, checked, call, /*output=*/true, /*intermediate=*/false));
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> separable_conv2d_training(const separable::Call& call, bool output,
                                                             bool intermediate) {
  const CheckedSeparable checked = separable::check(call);
  const typename Device::Guard guard(call.input);
  // Kept or computed again, the intermediate has the same bits. So a kernel that cannot write it does not make the
  // output either. Nor does one that keeps it before the activation, rounded to a half type: without it nothing is
  // rounded there.
  const bool rounded = call.input.element_size() == 2 && !derivative_from_output(call.depthwise_activation);
  if (!Device::kKeepsIntermediate || rounded) return separable::composite_training(call, output, intermediate);
  const auto plan = Device::plan_separable(checked.shape, call.input);
  if (plan.is_composite() || reaches_far(checked.shape)) {
    return separable::composite_training(call, output, intermediate);
  }
  return separable_fused<Device>(plan, checked, call, output, intermediate);
}

// One kernel where the device has one for these filters, else two depthwise convolutions.
template <typename Device>
at::Tensor spatial_separable_conv2d(const at::Tensor& input, const at::Tensor& column, const at::Tensor& row,
                                    at::IntArrayRef padding) {
  if (const char* reason = no_kernel_for(input, 2)) {  // in inference mode only, as in conv2d
    count_aten(reason);
    return aten::spatial_separable_conv2d(input, column, row, aten::sym(padding));
  }
  const auto [shape, result] = check_spatial_separable(input, column, row, padding);
  const typename Device::Guard guard(input);
  if (is_one_image(Map::forward, shape)) {
    return compute_once<Device>(input, result, false, [&](const at::Tensor& image) {
      return spatial_separable_conv2d<Device>(image, column, row, padding);
    });
  }
  const DType dtype = dtype_of(input);
  const char* kernel = Device::spatial_kernel(shape, dtype);
  if (kernel == nullptr) return SpatialPasses(shape.C, column, row, aten::sym(padding)).run(input, ops::conv2d);
  const at::Tensor output = Device::fresh(result, input);
  if (output.numel() == 0) return output;
  count_kernel(kernel);
  const SpatialTensors filters(column, row);
  const Copies copies = spatial_copies(shape);
  const at::Tensor x = copies.x ? dense_copy(Device::copy_image, input, copies.layout, false, false) : input;
  Device::run_spatial(with_copies(shape, copies), dtype, x.const_data_ptr(), filters.raw(), output.mutable_data_ptr());
  return output;
}

// The whole op table for one dispatch key.
template <typename Device>
void register_ops(torch::Library& m) {
  m.impl("conv2d", conv2d<Device>);
  m.impl("conv2d_residual", conv2d_residual<Device>);
  m.impl("conv2d_grad_input", gradient<Device, Map::grad_input>);
  m.impl("conv2d_grad_weight", gradient<Device, Map::grad_weight>);
  m.impl("conv2d_both_grads", conv2d_both_grads<Device>);
  m.impl("separable_conv2d", separable::as_op<separable_conv2d<Device>>);
  m.impl("separable_conv2d_training", separable::as_training_op<separable_conv2d_training<Device>>);
  m.impl("spatial_separable_conv2d", spatial_separable_conv2d<Device>);
}

}  // namespace sepconv
