// The CPU dispatch key: what convolve.h has to know of this device.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided_cpu_dispatch.h>
#include <torch/library.h>

#include <atomic>
#include <string_view>

#include "core/explain.h"
#include "cpu/kernels.h"
#include "cpu/layout/transposed_copy.h"
#include "cpu/plan.h"
#include "cpu/simd/huge_pages.h"
#include "cpu/team.h"
#include "ops/aten_route.h"
#include "ops/convolve.h"
#include "ops/matmul.h"
#include "ops/runtime.h"

namespace sepconv::cpu {

void parallel_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (Team* const team = led_team()) return run_tasks(*team, tasks, body, context);
  at::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}

int num_threads() {
  if (const Team* const team = led_team()) return team_size(*team);
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

namespace {

// False where torch has no such question.
bool says(const char* question) {
  const auto op = c10::Dispatcher::singleton().findSchema({question, ""});
  if (!op) return false;
  torch::jit::Stack answer;
  op->callBoxed(&answer);
  return answer.at(0).toBool();
}

std::atomic<HalfKernels>& known_half_kernels() {
  static std::atomic<HalfKernels> known{
      HalfKernels{says("mkldnn::_is_mkldnn_bf16_supported"), says("mkldnn::_is_mkldnn_fp16_supported")}};
  return known;
}

Torch torch_here() {
  const HalfKernels half = half_kernels();
  return {num_threads(), half.bfloat16, half.float16};
}

}  // namespace

HalfKernels half_kernels() { return known_half_kernels().load(std::memory_order_relaxed); }
void set_half_kernels(HalfKernels half) { known_half_kernels().store(half, std::memory_order_relaxed); }

Explanation explain(Map map, const ConvShape& shape, DType dtype) {
  const Plan chosen = plan(map, shape, dtype, strict(), torch_here());
  const bool by_torch = std::string_view(chosen.name) == "aten";
  return {chosen.name, with_copies(chosen.reason, map, chosen.copies), by_torch, "", 0};
}

Explanation explain(const SeparableShape& shape, DType dtype) {
  const Plan chosen = plan_separable(shape, dtype, strict(), torch_here());
  return {chosen.name, with_copies(chosen.reason, Map::forward, chosen.copies), false, "", 0};
}

namespace {

using at::Tensor;

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static constexpr const char* kBorders = "cpu_borders";
  static constexpr bool kKeepsIntermediate = true, kAddsResidual = false;

  static Plan plan(const Call& c) { return cpu::plan(c.map, c.shape, c.dtype(), strict(), torch_here()); }

  static Tensor aten(const Plan& plan, const Call& c) {
    return plan.kernel == Kernel::in_float32 ? in_float32(c, plan.copies.layout) : by_aten(c);
  }

  // A call of half types as one of float32 with a plan of its own, rounded once. Images become dense on the way: else
  // the wide ones would be copied again.
  static Tensor in_float32(const Call& c, Layout layout) {
    const auto format = layout == Layout::nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const auto widened = [&](const Tensor& t) {
      Tensor image = as_image(t, c.args.for_sequences()).to(at::kFloat, false, false, format);
      return Call::Operand::owned(t.dim() == 4 ? std::move(image) : image.view(t.sizes()));
    };
    const Call::Operand first = widened(*c.first), second = widened(*c.second);
    if (c.map == Map::forward) {
      const std::optional<Tensor> bias = c.bias ? std::optional(c.bias->to(at::kFloat)) : std::nullopt;
      return convolve<Cpu>(forward_call(*first, *second, bias, c.args, c.activation)).to(c.first->scalar_type());
    }
    return convolve<Cpu>(gradient_call(c.map, *first, *second, c.size, c.stride, c.args)).to(c.first->scalar_type());
  }

  // Without a second way through the dispatcher: nothing looks for it below an op of the CPU.
  static Tensor fresh(const Result& result, const Tensor& like) {
    const Tensor out = at::cpu::empty_strided(result.size, result.stride, like.options());
    advise_huge_pages(out.mutable_data_ptr(), out.nbytes());
    return out;
  }

  static void copy_image(const Tensor& to, const Tensor& from) {
    const ImageShape image = image_shape(from);
    const Strides strides = image_shape(to).strides;
    if (!is_transposed_copy(image, strides)) {
      to.copy_(from);
      return;
    }
    transposed_copy(image, dtype_of(from), from.const_data_ptr(), strides, to.mutable_data_ptr());
  }

  static void run(const Plan& plan, const Call& c, const Tensor& out) {
    if (plan.kernel == Kernel::pointwise_matmul) return matmul::run(c, out);
    cpu::run(plan, c.map, c.shape, c.dtype(), c.first_data(), c.second_data(), c.epilogue(), out.mutable_data_ptr());
  }

  static void run_borders(const Call& c, const Tensor& out) {
    cpu::run_borders(c.map, c.shape, c.args.padding_mode, c.dtype(), c.first_data(), c.second_data(), c.epilogue(),
                     out.mutable_data_ptr());
  }

  static Plan plan_separable(const SeparableShape& shape, const Tensor& input) {
    return cpu::plan_separable(shape, dtype_of(input), strict(), torch_here());
  }

  static void run_separable(const Plan& plan, const SeparableShape& shape, DType dtype, const SeparableMemory& memory) {
    cpu::run_separable(plan, shape, dtype, memory);
  }

  static const char* spatial_kernel(const ConvShape&, DType) { return "cpu_spatial_separable"; }

  static void run_spatial(const ConvShape& shape, DType dtype, const void* x, const SpatialFilters& filters, void* y) {
    spatial_separable_forward(shape, dtype, x, filters, y);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) { register_ops<Cpu>(m); }

}  // namespace sepconv::cpu
