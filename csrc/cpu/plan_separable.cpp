// The choice for the fused pair: one kernel, or two calls.
#include "cpu/plan.h"

namespace sepconv::cpu {
namespace {

// separable.md. Two calls are faster on small planes, where the first is blocks of channels and the second oneDNN's.
constexpr int64_t kPairPixels = 20 * 20, kPairProducts = 30'000'000;
constexpr int64_t kNarrowingPixels = 28 * 28, kNarrowing = 8;
constexpr int64_t kPairBfloat16Channels = 128;

// Why the fourth op is made of two calls; null where the fused kernel was measured faster.
const char* two_calls_are_faster(const SeparableShape& s, DType dtype, const Torch& torch) {
  if (dtype == DType::float16 || !torch.has_kernels(dtype)) return nullptr;
  const ConvShape &d = s.depthwise, &p = s.pointwise;
  const bool strided = d.stride_h > 1 || d.stride_w > 1, dilated = d.dilation_h > 1 || d.dilation_w > 1;
  const bool measured = d.R == d.S && (d.R == 3 || d.R == 5) && !dilated && d.K == d.C;
  if (!measured) {
    return "another kernel than 3x3 or 5x5, a dilation or a multiplier: the fused depthwise stage is not made for it";
  }
  const bool channels_last = output_layout(p) == Layout::nhwc;
  if (dtype == DType::bfloat16 && (channels_last || strided || d.C > kPairBfloat16Channels)) {
    return "bfloat16: oneDNN multiplies without widening";
  }
  if (channels_last) return nullptr;
  const int64_t pixels = d.P * d.Q, products = p.output_elements() * d.C;
  const bool small = pixels <= kPairPixels && (d.R == 5 || products >= kPairProducts);
  const bool narrowing = pixels <= kNarrowingPixels && d.C >= kNarrowing * p.K;
  if (!small && !narrowing) return nullptr;
  return "small planes: blocks of channels and oneDNN's product, one after the other, are faster";
}

}  // namespace

Plan plan_separable(const SeparableShape& s, DType dtype, bool strict, const Torch& torch) {
  const char* reason = strict ? nullptr : two_calls_are_faster(s, dtype, torch);
  if (reason != nullptr) return {Kernel::composite, "composite", reason};
  return {Kernel::separable, "cpu_separable", "the intermediate stays in cache",
          separable_copies(s.depthwise, output_layout(s.pointwise))};
}

}  // namespace sepconv::cpu
