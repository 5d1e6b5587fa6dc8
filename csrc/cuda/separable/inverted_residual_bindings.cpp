// The op inverted_residual on CUDA (ops/inverted_residual.h): one kernel where the plan has one, else calls of conv2d.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/plan.h"
#include "cuda/runtime.h"
#include "ops/checks.h"
#include "ops/inverted_residual.h"
#include "ops/runtime.h"

namespace sepconv::cuda {
namespace {

using at::Tensor;

Tensor fused(const inverted_residual::Call& c) {
  const BlockShape shape = inverted_residual::block_shape(c, check_inverted_residual(c));
  const ConvShape& d = shape.depthwise;
  const Tensor& x = c.input;
  if (!has_kernel_dtype(x)) return inverted_residual::composite(c);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto dense = [](const std::optional<Tensor>& t) { return t && t->defined() ? t->contiguous() : Tensor(); };
  const Tensor expand = dense(c.expand_weight), depthwise = dense(c.depthwise_weight),
               project = dense(c.project_weight);
  const Tensor biases[] = {dense(c.expand_bias), dense(c.depthwise_bias), dense(c.project_bias)};
  const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const int64_t alignment = common_alignment(
      {data(x), data(expand), data(depthwise), data(project), data(biases[0]), data(biases[1]), data(biases[2])});
  const Plan plan = plan_block(shape, dtype_of(x), device_facts(x.get_device()), alignment, strict());
  if (plan.is_composite()) return inverted_residual::composite(c);
  const Tensor output = at::empty({d.N, shape.K, d.P, d.Q}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (output.numel() == 0) return output;
  const BlockMemory memory{data(x),
                           data(expand),
                           {data(biases[0]), parse_activation(c.expand_activation)},
                           data(depthwise),
                           {data(biases[1]), parse_activation(c.depthwise_activation)},
                           data(project),
                           {data(biases[2]), parse_activation(c.project_activation)},
                           output.mutable_data_ptr()};
  count_kernel(plan.name);
  raise_if(run_block(plan, shape, dtype_of(x), memory, c10::cuda::getCurrentCUDAStream()), plan.name);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CUDA, m) { m.impl("inverted_residual", inverted_residual::as_op<fused>); }

}  // namespace sepconv::cuda
