// The CPU dispatch key: check, plan, allocate, run.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../aten_route.h"
#include "../checks.h"
#include "../explain.h"
#include "../runtime.h"
#include "../separable.h"
#include "../spatial_passes.h"
#include "huge_pages.h"
#include "kernels.h"
#include "plan.h"

namespace sepconv::cpu {

void parallel_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  at::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}

int num_threads() { return at::get_num_threads(); }

Explanation explain(Map map, const ConvShape& shape, DType dtype) {
  const Plan chosen = plan(map, shape, dtype, strict(), num_threads());
  return {chosen.name, chosen.reason, chosen.is_torchs(), "", 0};
}

Explanation explain(const SeparableShape& shape, DType dtype) {
  const Plan chosen = plan_separable(shape, dtype, strict());
  return {chosen.name, chosen.reason, false, "", 0};
}

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr const char* kBordersName = "cpu_borders";

// Memory that a kernel is about to write as a whole.
Tensor on_huge_pages(Tensor result) {
  advise_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

// A pointwise convolution as ATen's matrix products, on views: [N*H*W, C] for channels_last, N times [C, H*W] else.
namespace matmul {

// Images of one pixel lie both ways: one product over the batch then beats one an image.
bool by_planes(const ConvShape& s) { return input_layout(s) == Layout::nchw && s.H * s.W > 1; }

Tensor pixels(const Tensor& image) { return image.permute({0, 2, 3, 1}).reshape({-1, image.size(1)}); }
Tensor planes(const Tensor& image) { return image.reshape({image.size(0), image.size(1), -1}); }
Tensor matrix(const Tensor& weight) { return weight.reshape({weight.size(0), weight.size(1)}); }

// [C, K, 1, 1] of a weight [K, C, 1, 1].
Tensor turned(const Tensor& weight) {
  return matrix(weight).t().contiguous().view({weight.size(1), weight.size(0), 1, 1});
}

// The bias is the product's addend, so that a half type is rounded once.
void forward(const ConvShape& shape, const Tensor& input, const Tensor& weight, const Tensor& bias, Tensor& output) {
  const Tensor w = matrix(weight);
  if (by_planes(shape)) {
    Tensor y = planes(output);
    const Tensor ws = w.unsqueeze(0).expand({shape.N, -1, -1});
    if (bias.defined()) {
      at::baddbmm_out(y, bias.view({1, -1, 1}), ws, planes(input));
    } else {
      at::bmm_out(y, ws, planes(input));
    }
  } else {
    Tensor y = pixels(output);
    if (bias.defined()) {
      at::addmm_out(y, bias, pixels(input), w.t());
    } else {
      at::mm_out(y, pixels(input), w.t());
    }
  }
}

void grad_input(const ConvShape& shape, const Tensor& grad_output, const Tensor& weight, Tensor& grad_input) {
  const Tensor w = matrix(weight);
  if (by_planes(shape)) {
    Tensor gx = planes(grad_input);
    at::bmm_out(gx, w.t().unsqueeze(0).expand({shape.N, -1, -1}), planes(grad_output));
  } else {
    Tensor gx = pixels(grad_input);
    at::mm_out(gx, pixels(grad_output), w);
  }
}

void grad_weight(const ConvShape& shape, const Tensor& grad_output, const Tensor& input, Tensor& grad_weight) {
  // In half types one product sums over the whole batch, for which planes are copied: a sum of rounded products would be
  // less exact than torch's.
  if (by_planes(shape) && grad_output.element_size() > 2) {
    const Tensor per_image = at::bmm(planes(grad_output), planes(input).transpose(1, 2));
    grad_weight.copy_(per_image.sum(0).view(grad_weight.sizes()));
  } else {
    grad_weight.copy_(at::mm(pixels(grad_output).t(), pixels(input)).view(grad_weight.sizes()));
  }
}

}  // namespace matmul

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view activation_name,
              std::string_view padding_mode) {
  const Activation activation = parse_activation(activation_name);
  const PaddingMode mode = parse_padding_mode(padding_mode);
  if (!has_kernel_dtype(input)) {  // seen here in inference mode only, which passes autograd's own test by
    count_aten("no kernel for this dtype");
    return aten::conv2d(input, weight, bias, aten::sym(stride), aten::sym(padding), aten::sym(dilation), groups,
                        activation, mode);
  }
  const ConvShape shape = check_forward(input, weight, bias, {stride, padding, dilation, groups, mode});
  const DType dtype = dtype_of(input);
  const Plan chosen = plan(Map::forward, shape, dtype, strict(), num_threads());
  if (chosen.is_torchs()) {
    count_aten(chosen.reason);
    const Tensor computed = chosen.kernel == Kernel::onednn
                                ? aten::activate_in_place(aten::onednn_product(input, weight, bias), activation)
                                : aten::conv2d(input, weight, bias, aten::sym(stride), aten::sym(padding),
                                               aten::sym(dilation), groups, activation, mode);
    return with_strides(shape.y, computed, [&] { return empty_output(shape, input); });
  }
  Tensor output = on_huge_pages(empty_output(shape, input));
  if (output.numel() == 0) return output;
  const Tensor dense_bias = bias && bias->defined() ? bias->contiguous() : Tensor();
  const Epilogue epilogue{dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr, activation};
  const void *x = input.const_data_ptr(), *w = weight.const_data_ptr();
  void* y = output.mutable_data_ptr();
  const BorderExtent border = border_extent(Map::forward, shape, mode);
  if (border != BorderExtent::all) {
    count_kernel(chosen.name);
    switch (chosen.kernel) {
      case Kernel::planes: planes_forward(shape, dtype, x, w, epilogue, y); break;
      case Kernel::small_planes: small_planes_forward(shape, dtype, x, w, epilogue, y); break;
      case Kernel::blocked: blocked_forward(shape, dtype, x, w, epilogue, y); break;
      case Kernel::depthwise_nhwc: depthwise_nhwc_forward(shape, dtype, x, w, epilogue, y); break;
      case Kernel::pointwise: pointwise_forward(shape, dtype, x, w, epilogue, y); break;
      default: matmul::forward(shape, input, weight, dense_bias, output); aten::activate_in_place(output, activation);
    }
  }
  if (border != BorderExtent::none) {
    count_kernel(kBordersName);
    borders_forward(shape, mode, dtype, x, w, epilogue, y);
  }
  return output;
}

Tensor conv2d_grad_input(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_size,
                         IntArrayRef input_stride, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         int64_t groups, std::string_view padding_mode) {
  const PaddingMode mode = parse_padding_mode(padding_mode);
  const ConvShape shape =
      check_grad_input(grad_output, weight, input_size, input_stride, {stride, padding, dilation, groups, mode});
  const DType dtype = dtype_of(grad_output);
  const Plan chosen = plan(Map::grad_input, shape, dtype, strict(), num_threads());
  if (chosen.is_torchs()) {
    count_aten(chosen.reason);
    const Tensor computed =
        chosen.kernel == Kernel::onednn
            ? aten::onednn_product(grad_output, matmul::turned(weight), std::nullopt)
            : aten::conv2d_grad_input(grad_output, weight, aten::sym(input_size), aten::sym(input_stride),
                                      aten::sym(stride), aten::sym(padding), aten::sym(dilation), groups, mode);
    return with_strides(shape.x, computed, [&] { return empty_grad_input(shape, grad_output); });
  }
  Tensor grad_input = on_huge_pages(empty_grad_input(shape, grad_output));
  if (grad_input.numel() == 0) return grad_input;
  const void *gy = grad_output.const_data_ptr(), *w = weight.const_data_ptr();
  void* gx = grad_input.mutable_data_ptr();
  const BorderExtent border = border_extent(Map::grad_input, shape, mode);
  if (border != BorderExtent::all) {
    count_kernel(chosen.name);
    switch (chosen.kernel) {
      case Kernel::planes: planes_grad_input(shape, dtype, gy, w, gx); break;
      case Kernel::small_planes: small_planes_grad_input(shape, dtype, gy, w, gx); break;
      case Kernel::blocked: blocked_grad_input(shape, dtype, gy, w, gx); break;
      case Kernel::depthwise_nhwc: depthwise_nhwc_grad_input(shape, dtype, gy, w, gx); break;
      case Kernel::pointwise: pointwise_grad_input(shape, dtype, gy, w, gx); break;
      default: matmul::grad_input(shape, grad_output, weight, grad_input);
    }
  }
  if (border != BorderExtent::none) {
    count_kernel(kBordersName);
    borders_grad_input(shape, mode, dtype, gy, w, gx);
  }
  return grad_input;
}

Tensor conv2d_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_size,
                          IntArrayRef weight_stride, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          int64_t groups, std::string_view padding_mode) {
  const PaddingMode mode = parse_padding_mode(padding_mode);
  const ConvShape shape =
      check_grad_weight(grad_output, input, weight_size, weight_stride, {stride, padding, dilation, groups, mode});
  const DType dtype = dtype_of(grad_output);
  const Plan chosen = plan(Map::grad_weight, shape, dtype, strict(), num_threads());
  if (grad_output.numel() == 0) return empty_grad_weight(shape, grad_output).zero_();
  if (chosen.kernel == Kernel::aten) {
    count_aten(chosen.reason);
    const Tensor computed =
        aten::conv2d_grad_weight(grad_output, input, aten::sym(weight_size), aten::sym(weight_stride),
                                 aten::sym(stride), aten::sym(padding), aten::sym(dilation), groups, mode);
    return with_strides(shape.w, computed, [&] { return empty_grad_weight(shape, grad_output); });
  }
  const BorderExtent border = border_extent(Map::grad_weight, shape, mode);
  if (border != BorderExtent::none && grad_output.element_size() == 2) {
    // What two kernels add to a half type would be rounded twice: here alone the input is padded by a copy.
    const Tensor padded = aten::pad(input, aten::sym(padding), mode);
    return conv2d_grad_weight(grad_output, padded, weight_size, weight_stride, stride, {0, 0}, dilation, groups,
                              "zeros");
  }
  Tensor grad_weight = empty_grad_weight(shape, grad_output);
  count_kernel(chosen.name);
  const void *gy = grad_output.const_data_ptr(), *x = input.const_data_ptr();
  void* gw = grad_weight.mutable_data_ptr();
  switch (chosen.kernel) {
    case Kernel::planes: planes_grad_weight(shape, dtype, gy, x, gw); break;
    case Kernel::blocked: blocked_grad_weight(shape, dtype, gy, x, gw); break;
    case Kernel::depthwise_nhwc: depthwise_nhwc_grad_weight(shape, dtype, gy, x, gw); break;
    case Kernel::pointwise: pointwise_grad_weight(shape, dtype, gy, x, gw); break;
    default: matmul::grad_weight(shape, grad_output, input, grad_weight);
  }
  if (border != BorderExtent::none) {
    count_kernel(kBordersName);
    borders_grad_weight(shape, mode, dtype, gy, x, gw);
  }
  return grad_weight;
}

// One call of ATen's where the plans send both maps there: it brings grad_output into oneDNN's layout once.
std::tuple<Tensor, Tensor> conv2d_both_grads(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                             int64_t groups, std::string_view padding_mode) {
  const ConvArgs args{stride, padding, dilation, groups, parse_padding_mode(padding_mode)};
  if (args.padding_mode == PaddingMode::zeros && padding.size() == 2 && grad_output.numel() != 0) {
    const ConvShape by_input = check_grad_input(grad_output, weight, input.sizes(), input.strides(), args),
                    by_weight = check_grad_weight(grad_output, input, weight.sizes(), weight.strides(), args);
    const Plan first = plan(Map::grad_input, by_input, dtype_of(grad_output), strict(), num_threads()),
               second = plan(Map::grad_weight, by_weight, dtype_of(grad_output), strict(), num_threads());
    if (first.kernel == Kernel::aten && second.kernel == Kernel::aten) {
      count_aten(first.reason), count_aten(second.reason);
      const auto [gx, gw] = aten::conv2d_both_grads(grad_output, input, weight, aten::sym(stride), aten::sym(padding),
                                                    aten::sym(dilation), groups);
      return {with_strides(by_input.x, gx, [&] { return empty_grad_input(by_input, grad_output); }),
              with_strides(by_weight.w, gw, [&] { return empty_grad_weight(by_weight, grad_output); })};
    }
  }
  return {conv2d_grad_input(grad_output, weight, input.sizes(), input.strides(), stride, padding, dilation, groups,
                            padding_mode),
          conv2d_grad_weight(grad_output, input, weight.sizes(), weight.strides(), stride, padding, dilation, groups,
                             padding_mode)};
}

// (output, intermediate), each empty where it is not wanted.
std::tuple<Tensor, Tensor> separable_fused(const SeparableShape& shape, const separable::Call& call, bool output,
                                           bool intermediate) {
  const auto dense = [](const std::optional<Tensor>& t) { return t && t->defined() ? t->contiguous() : Tensor(); };
  const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const Tensor none = at::empty({0}, call.input.options());
  const Tensor y = output ? on_huge_pages(empty_output(shape.pointwise, call.input)) : none;
  const Tensor h = intermediate ? on_huge_pages(empty_output(shape.depthwise, call.input)) : none;
  const Tensor bias_d = dense(call.depthwise_bias), bias_p = dense(call.pointwise_bias);
  if (shape.depthwise.N == 0) return {y, h};
  count_kernel("cpu_separable");
  separable_forward(shape, dtype_of(call.input),
                    {call.input.const_data_ptr(),
                     call.depthwise_weight.const_data_ptr(),
                     {data(bias_d), call.depthwise_activation},
                     call.pointwise_weight.const_data_ptr(),
                     {data(bias_p), call.pointwise_activation},
                     output ? y.mutable_data_ptr() : nullptr,
                     intermediate ? h.mutable_data_ptr() : nullptr});
  return {y, h};
}

Tensor separable_conv2d(const Tensor& input, const Tensor& depthwise_weight,
                        const std::optional<Tensor>& depthwise_bias, const Tensor& pointwise_weight,
                        const std::optional<Tensor>& pointwise_bias, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, std::string_view depthwise_activation,
                        std::string_view pointwise_activation, bool /*save_intermediate*/) {
  const separable::Call call =
      separable::call_of(input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding,
                         dilation, depthwise_activation, pointwise_activation);
  if (!has_kernel_dtype(input)) {  // seen here in inference mode only
    count_aten("no kernel for this dtype");
    return aten::separable_conv2d(call);
  }
  const SeparableShape shape = check_separable(input, depthwise_weight, depthwise_bias, pointwise_weight,
                                               pointwise_bias, stride, padding, dilation);
  if (plan_separable(shape, dtype_of(input), strict()).kernel != Kernel::separable) return separable::composite(call);
  return std::get<0>(separable_fused(shape, call, /*output=*/true, /*intermediate=*/false));
}

std::tuple<Tensor, Tensor> separable_conv2d_training(
    const Tensor& input, const Tensor& depthwise_weight, const std::optional<Tensor>& depthwise_bias,
    const Tensor& pointwise_weight, const std::optional<Tensor>& pointwise_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, std::string_view depthwise_activation,
    std::string_view pointwise_activation, bool output, bool intermediate) {
  const separable::Call call =
      separable::call_of(input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding,
                         dilation, depthwise_activation, pointwise_activation);
  const SeparableShape shape = check_separable(input, depthwise_weight, depthwise_bias, pointwise_weight,
                                               pointwise_bias, stride, padding, dilation);
  const DType dtype = dtype_of(input);
  // The kept value before the activation is rounded to the tensors' type; for the same output with and without it, a
  // half type would have to be rounded without it too.
  const bool rounded = dtype != DType::float32 && dtype != DType::float64;
  if ((rounded && !derivative_from_output(call.depthwise_activation)) ||
      plan_separable(shape, dtype, strict()).kernel != Kernel::separable) {
    return separable::composite_training(call, output, intermediate);
  }
  return separable_fused(shape, call, output, intermediate);
}

Tensor spatial_separable_conv2d(const Tensor& input, const Tensor& column, const Tensor& row, IntArrayRef padding) {
  if (!has_kernel_dtype(input)) {  // in inference mode only, as in conv2d
    count_aten("no kernel for this dtype");
    return aten::spatial_separable_conv2d(input, column, row, aten::sym(padding));
  }
  const ConvShape shape = check_spatial_separable(input, column, row, padding);
  Tensor output = on_huge_pages(empty_output(shape, input));
  if (output.numel() == 0) return output;
  count_kernel("cpu_spatial_separable");
  const SpatialTensors filters(column, row);
  spatial_separable_forward(shape, dtype_of(input), input.const_data_ptr(), filters.raw(), output.mutable_data_ptr());
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d_grad_input", conv2d_grad_input);
  m.impl("conv2d_grad_weight", conv2d_grad_weight);
  m.impl("conv2d_both_grads", conv2d_both_grads);
  m.impl("separable_conv2d", separable_conv2d);
  m.impl("separable_conv2d_training", separable_conv2d_training);
  m.impl("spatial_separable_conv2d", spatial_separable_conv2d);
}

}  // namespace sepconv::cpu
