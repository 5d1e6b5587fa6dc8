// The CUDA dispatch key: guard the device, check, plan, allocate, launch on the current stream, check the launch.
//
// Nothing here synchronises, copies between host and device, or keeps memory between calls, so CUDA graphs capture
// every call; scratch memory comes from the caching allocator and goes back to it when the call returns, in stream
// order.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <array>
#include <atomic>

#include "../aten_route.h"
#include "../checks.h"
#include "../explain.h"
#include "../runtime.h"
#include "../separable.h"
#include "../spatial_passes.h"
#include "plan.h"
#include "tiling.h"

namespace sepconv::cuda {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kBestAlignment = 16;  // bytes that one load can move

// Asked once for each of the first devices, as the answer may have to load a kernel.
bool copies_boxes(int index) {
  enum : int { unknown, yes, no };
  static std::array<std::atomic<int>, 64> answers{};
  std::atomic<int> none{unknown}, &answer = index < static_cast<int>(answers.size()) ? answers[index] : none;
  if (answer == unknown) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
    answer = has_depthwise_nhwc_tma() ? yes : no;
  }
  return answer == yes;
}

// The driver holds these: a question costs a few nanoseconds, and may be asked while a graph is captured.
Device device_facts(int index) {
  int multiprocessors = 0, major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  return {multiprocessors, major * 10 + minor, major >= 9 && copies_boxes(index)};
}

// The largest power of two, up to kBestAlignment, that divides every address. Results come from the caching allocator,
// which aligns better than that, so only the tensors that came with the call are asked.
int64_t common_alignment(std::initializer_list<const void*> addresses) {
  uintptr_t bits = kBestAlignment;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int64_t>(bits & -bits);
}

void raise_if(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the error is reported here: later calls should not meet it again
  TORCH_CHECK(false, "the CUDA kernel ", kernel, " could not be launched: ", cudaGetErrorString(error));
}

// Runs a plan that is not ATen's, and raises where the launch fails.
void launch(const Plan& chosen, Map map, const ConvShape& shape, DType dtype, const Tensor& first, const Tensor& second,
            const Epilogue& epilogue, const Tensor& out) {
  count_kernel(chosen.name);
  Tensor workspace;
  if (chosen.workspace_bytes > 0) workspace = at::empty({chosen.workspace_bytes}, out.options().dtype(at::kByte));
  raise_if(
      run(chosen, map, shape, dtype, first.const_data_ptr(), second.const_data_ptr(), epilogue, out.mutable_data_ptr(),
          workspace.defined() ? workspace.mutable_data_ptr() : nullptr, c10::cuda::getCurrentCUDAStream()),
      chosen.name);
}

// What depends on the padding where that is not zeros.
void borders(Map map, const ConvShape& shape, PaddingMode mode, DType dtype, const Tensor& first, const Tensor& second,
             const Epilogue& epilogue, const Tensor& out) {
  constexpr const char* kName = "cuda_borders";
  count_kernel(kName);
  raise_if(run_borders(map, shape, mode, dtype, first.const_data_ptr(), second.const_data_ptr(), epilogue,
                       out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()),
           kName);
}

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
  const c10::cuda::CUDAGuard guard(input.device());
  const DType dtype = dtype_of(input);
  const Tensor dense_bias = bias && bias->defined() ? bias->contiguous() : Tensor();
  const Epilogue epilogue{dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr, activation};
  const int64_t alignment = common_alignment({input.const_data_ptr(), weight.const_data_ptr(), epilogue.bias});
  const Plan chosen = plan(Map::forward, shape, dtype, device_facts(input.get_device()), alignment, strict());
  if (chosen.kernel == Kernel::aten) {
    count_aten(chosen.reason);
    const Tensor computed = aten::conv2d(input, weight, bias, aten::sym(stride), aten::sym(padding),
                                         aten::sym(dilation), groups, activation, mode);
    return with_strides(shape.y, computed, [&] { return empty_output(shape, input); });
  }
  Tensor output = empty_output(shape, input);
  if (output.numel() == 0) return output;
  const BorderExtent border = border_extent(Map::forward, shape, mode);
  if (border != BorderExtent::all) launch(chosen, Map::forward, shape, dtype, input, weight, epilogue, output);
  if (border != BorderExtent::none) borders(Map::forward, shape, mode, dtype, input, weight, epilogue, output);
  return output;
}

Tensor conv2d_grad_input(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_size,
                         IntArrayRef input_stride, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         int64_t groups, std::string_view padding_mode) {
  const PaddingMode mode = parse_padding_mode(padding_mode);
  const ConvShape shape =
      check_grad_input(grad_output, weight, input_size, input_stride, {stride, padding, dilation, groups, mode});
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const DType dtype = dtype_of(grad_output);
  const int64_t alignment = common_alignment({grad_output.const_data_ptr(), weight.const_data_ptr()});
  const Plan chosen = plan(Map::grad_input, shape, dtype, device_facts(grad_output.get_device()), alignment, strict());
  if (chosen.kernel == Kernel::aten) {
    count_aten(chosen.reason);
    const Tensor computed =
        aten::conv2d_grad_input(grad_output, weight, aten::sym(input_size), aten::sym(input_stride), aten::sym(stride),
                                aten::sym(padding), aten::sym(dilation), groups, mode);
    return with_strides(shape.x, computed, [&] { return empty_grad_input(shape, grad_output); });
  }
  Tensor grad_input = empty_grad_input(shape, grad_output);
  if (grad_input.numel() == 0) return grad_input;
  const BorderExtent border = border_extent(Map::grad_input, shape, mode);
  if (border != BorderExtent::all) launch(chosen, Map::grad_input, shape, dtype, grad_output, weight, {}, grad_input);
  if (border != BorderExtent::none) borders(Map::grad_input, shape, mode, dtype, grad_output, weight, {}, grad_input);
  return grad_input;
}

Tensor conv2d_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_size,
                          IntArrayRef weight_stride, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          int64_t groups, std::string_view padding_mode) {
  const PaddingMode mode = parse_padding_mode(padding_mode);
  const ConvShape shape =
      check_grad_weight(grad_output, input, weight_size, weight_stride, {stride, padding, dilation, groups, mode});
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const DType dtype = dtype_of(grad_output);
  if (grad_output.numel() == 0 || input.numel() == 0) return empty_grad_weight(shape, grad_output).zero_();
  const int64_t alignment = common_alignment({grad_output.const_data_ptr(), input.const_data_ptr()});
  const Plan chosen = plan(Map::grad_weight, shape, dtype, device_facts(grad_output.get_device()), alignment, strict());
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
  launch(chosen, Map::grad_weight, shape, dtype, grad_output, input, Epilogue{}, grad_weight);
  if (border != BorderExtent::none) borders(Map::grad_weight, shape, mode, dtype, grad_output, input, {}, grad_weight);
  return grad_weight;
}

// The output by a fused kernel; nothing where the plan has none.
std::optional<Tensor> separable_fused(const SeparableShape& shape, const separable::Call& call) {
  const c10::cuda::CUDAGuard guard(call.input.device());
  const DType dtype = dtype_of(call.input);
  const Plan chosen = plan_separable(shape, dtype, device_facts(call.input.get_device()), strict());
  if (chosen.kernel == Kernel::composite) return std::nullopt;
  const Tensor output = empty_output(shape.pointwise, call.input);
  if (output.numel() == 0) return output;
  const auto dense = [](const std::optional<Tensor>& t) { return t && t->defined() ? t->contiguous() : Tensor(); };
  const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const Tensor depthwise_bias = dense(call.depthwise_bias), pointwise_bias = dense(call.pointwise_bias);
  count_kernel(chosen.name);
  raise_if(run_separable(chosen, shape, dtype,
                         {call.input.const_data_ptr(),
                          call.depthwise_weight.const_data_ptr(),
                          {data(depthwise_bias), call.depthwise_activation},
                          call.pointwise_weight.const_data_ptr(),
                          {data(pointwise_bias), call.pointwise_activation},
                          output.mutable_data_ptr(),
                          nullptr},
                         c10::cuda::getCurrentCUDAStream()),
           chosen.name);
  return output;
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
  const auto fused = separable_fused(shape, call);
  return fused ? *fused : separable::composite(call);
}

std::tuple<Tensor, Tensor> separable_conv2d_training(
    const Tensor& input, const Tensor& depthwise_weight, const std::optional<Tensor>& depthwise_bias,
    const Tensor& pointwise_weight, const std::optional<Tensor>& pointwise_bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, std::string_view depthwise_activation,
    std::string_view pointwise_activation, bool output, bool intermediate) {
  const separable::Call call =
      separable::call_of(input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding,
                         dilation, depthwise_activation, pointwise_activation);
  check_separable(input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, stride, padding, dilation);
  // Kept or computed again, the output has the same bits: both are made of two calls, as the fused kernel keeps nothing.
  return separable::composite_training(call, output, intermediate);
}

// One kernel where the filters fit its tile, else two depthwise convolutions.
Tensor spatial_separable_conv2d(const Tensor& input, const Tensor& column, const Tensor& row, IntArrayRef padding) {
  if (!has_kernel_dtype(input)) {  // in inference mode only, as in conv2d
    count_aten("no kernel for this dtype");
    return aten::spatial_separable_conv2d(input, column, row, aten::sym(padding));
  }
  const ConvShape shape = check_spatial_separable(input, column, row, padding);
  const c10::cuda::CUDAGuard guard(input.device());
  const DType dtype = dtype_of(input);
  if (spatial_tile(shape, dtype).columns == 0)
    return SpatialPasses(shape.C, column, row, aten::sym(padding)).run(input);
  Tensor output = empty_output(shape, input);
  if (output.numel() == 0) return output;
  count_kernel("cuda_spatial_separable");
  const SpatialTensors filters(column, row);
  raise_if(launch_spatial_separable(shape, dtype, input.const_data_ptr(), filters.raw(), output.mutable_data_ptr(),
                                    c10::cuda::getCurrentCUDAStream()),
           "cuda_spatial_separable");
  return output;
}

}  // namespace

Explanation explain(Map map, const ConvShape& shape, DType dtype, int device) {
  return explain(plan(map, shape, dtype, device_facts(device), kBestAlignment, strict()));
}

Explanation explain(const SeparableShape& shape, DType dtype, int device) {
  return explain(plan_separable(shape, dtype, device_facts(device), strict()));
}

Explanation explain(Map map, const ConvShape& shape, DType dtype, int multiprocessors, int compute_capability) {
  return explain(plan(map, shape, dtype, {multiprocessors, compute_capability}, kBestAlignment, strict()));
}

}  // namespace sepconv::cuda

TORCH_LIBRARY_IMPL(sepconv_ext, CUDA, m) {
  m.impl("conv2d", sepconv::cuda::conv2d);
  m.impl("conv2d_grad_input", sepconv::cuda::conv2d_grad_input);
  m.impl("conv2d_grad_weight", sepconv::cuda::conv2d_grad_weight);
  m.impl("spatial_separable_conv2d", sepconv::cuda::spatial_separable_conv2d);
  m.impl("separable_conv2d", sepconv::cuda::separable_conv2d);
  m.impl("separable_conv2d_training", sepconv::cuda::separable_conv2d_training);
}
