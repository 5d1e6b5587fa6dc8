// The op inverted_residual on the CPU (ops/inverted_residual.h): the kernel of inverted_residual.h for float32 images
// whose channels are dense, else calls of conv2d.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/explain.h"
#include "cpu/pointwise/product.h"
#include "cpu/separable/inverted_residual.h"
#include "cpu/simd/huge_pages.h"
#include "cpu/simd/thread_scratch.h"
#include "ops/checks.h"
#include "ops/inverted_residual.h"
#include "ops/runtime.h"

namespace sepconv::cpu {
namespace {

using at::Tensor;

const Tensor& tensor_or_none(const std::optional<Tensor>& t) {
  static const Tensor none;
  return t ? *t : none;
}

// Weights in the layouts of the kernel, one after another in a thread's memory.
class Packed {
 public:
  explicit Packed(int64_t floats) : scratch_(ScratchUse::weights), next_(scratch_.take(floats)) {}

  const float* product(const Tensor& w) {
    if (!w.defined()) return nullptr;
    float* const to = take(product_packed_floats(w.size(0), w.size(1)));
    product_pack(w.size(0), w.size(1), w.const_data_ptr<float>(), w.stride(0), w.stride(1), to);
    return to;
  }
  const float* depthwise(const Tensor& w) {
    float* const to = take(depthwise_packed_floats(w.size(0), w.size(2), w.size(3)));
    depthwise_pack(w.size(0), w.size(2), w.size(3), w.const_data_ptr<float>(),
                   {w.stride(0), w.stride(1), w.stride(2), w.stride(3)}, to);
    return to;
  }

 private:
  float* take(int64_t floats) { return next_ += floats, next_ - floats; }

  ThreadScratch scratch_;
  float* next_;
};

// Null where the kernel runs the block.
const char* why_not(const BlockShape& s, DType dtype) {
  if (dtype != DType::float32) return "calls of conv2d: the fused kernel is for float32 alone";
  const ConvShape& d = s.depthwise;
  const auto dense = [](int64_t size, int64_t stride, int64_t expected) { return size <= 1 || stride == expected; };
  if (d.x.c != 1 || !dense(d.W, d.x.w, s.C) || !dense(d.H, d.x.h, d.W * s.C) || !dense(d.N, d.x.n, d.H * d.W * s.C)) {
    return "calls of conv2d: the fused kernel is for dense images in channels_last";
  }
  return nullptr;
}

Tensor fused(const inverted_residual::Call& c) {
  const CheckedInvertedResidual checked = check_inverted_residual(c);
  if (!has_kernel_dtype(c.input) || why_not(inverted_residual::block_shape(c, checked), dtype_of(c.input))) {
    return inverted_residual::composite(c);
  }
  const ConvShape& d = checked.depthwise;
  const int64_t C = checked.C, E = d.C, K = checked.K, M = checked.M;
  const Tensor output = at::empty({d.N, K, d.P, d.Q}, c.input.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (output.numel() == 0) return output;
  advise_huge_pages(output.mutable_data_ptr(), output.nbytes());

  InvertedResidualShape shape{d.N, C, E, K, M, {}};
  shape.depthwise = {d.H,        d.W,     d.P,     d.Q,          d.R,          d.S, d.stride_h,
                     d.stride_w, d.pad_h, d.pad_w, d.dilation_h, d.dilation_w, 1};
  const auto dense = [](const std::optional<Tensor>& t) { return t && t->defined() ? t->contiguous() : Tensor(); };
  const Tensor biases[] = {dense(c.expand_bias), dense(c.depthwise_bias), dense(c.squeeze_bias), dense(c.excite_bias),
                           dense(c.project_bias)};
  const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  Packed packed(product_packed_floats(E, C) + depthwise_packed_floats(E, d.R, d.S) + product_packed_floats(M, E) +
                product_packed_floats(E, M) + product_packed_floats(K, E));
  InvertedResidualMemory memory;
  memory.x = data(c.input), memory.x_pixel = memory.residual_pixel = C;
  memory.expand = packed.product(tensor_or_none(c.expand_weight));
  memory.expand_epilogue = {data(biases[0]), parse_activation(c.expand_activation)};
  memory.depthwise = packed.depthwise(c.depthwise_weight);
  memory.depthwise_epilogue = {data(biases[1]), parse_activation(c.depthwise_activation)};
  memory.squeeze = packed.product(tensor_or_none(c.squeeze_weight));
  memory.squeeze_epilogue = {data(biases[2]), parse_activation(c.squeeze_activation)};
  memory.excite = packed.product(tensor_or_none(c.excite_weight));
  memory.excite_bias = data(biases[3]);
  memory.gate = is_hard_gate(c.gate) ? Gate::hardsigmoid : Gate::sigmoid;
  memory.project = packed.product(c.project_weight);
  memory.project_epilogue = {data(biases[4]), parse_activation(c.project_activation)};
  memory.residual = c.residual ? data(c.input) : nullptr;
  memory.y = output.mutable_data_ptr<float>(), memory.y_pixel = K;
  count_kernel("cpu_inverted_residual");
  inverted_residual_forward(shape, memory);
  return output;
}

}  // namespace

Explanation explain(const BlockShape& shape, DType dtype) {
  if (const char* reason = why_not(shape, dtype)) return {"composite", reason, false, "", 0};
  return {"cpu_inverted_residual", "what lies between the convolutions stays in the cache", false, "", 0};
}

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) { m.impl("inverted_residual", inverted_residual::as_op<fused>); }

}  // namespace sepconv::cpu
