#include "cuda/plan.h"

#include <algorithm>

#include "cuda/plan_parts.h"

namespace sepconv::cuda {

namespace {

// Channels a group from which torch's tensor-core kernels are predicted to be faster in channels_last, where grouped.cu
// reads half types two bytes at a time.
constexpr int64_t kWideGroupLast = 4;

// The best kernel for tensors where they are.
Plan plan_in_place(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment, bool strict,
                   const Finish& finish) {
  if (s.N == 0) {  // nothing is launched, and the question is answered for one image
    ConvShape one = s;
    one.N = 1;
    return plan_in_place(map, one, dtype, device, alignment, strict, finish);
  }
  if (pointwise_can_run(map, s)) return plan_pointwise(map, s, dtype, device, alignment, strict, finish);
  if (s.is_depthwise()) return plan_depthwise(map, s, dtype, device, alignment);
  if (!strict && s.groups == 1) {
    return aten("a dense convolution: cuDNN's tensor-core kernels are predicted to be faster (not measured)");
  }
  const bool tensor_cores = is_half(dtype) || (dtype == DType::float32 && device.tf32);
  const auto channels = static_cast<double>(s.channels_per_group());
  if (!strict && tensor_cores && channels >= device.tuning().wide_group) {
    return aten(
        "a half type or TF32, and many channels a group: cuDNN's tensor-core kernels are predicted to be faster (not "
        "measured)");
  }
  if (grouped_nhwc_mma_can_run(s, dtype, device, alignment)) return plan_grouped_nhwc_mma(map, s, device);
  if (!strict && is_half(dtype) && s.channels_per_group() >= kWideGroupLast && call_layout(map, s) == Layout::nhwc) {
    return aten(
        "a half type and 4 or more channels a group in channels_last: cuDNN's tensor-core kernels are predicted to be "
        "faster (not measured)");
  }
  return plan_grouped(map, s, dtype, s.groups == 1 ? "one group" : "groups of several channels");
}

bool is_general(const Plan& p) {
  return p.kernel == Kernel::depthwise_direct || p.kernel == Kernel::depthwise_grad_weight;
}

}  // namespace

// Neighbouring threads take neighbouring channels or columns, so where neither are dense a copy comes first. With gaps
// between rows, or between filters, a copy is made where it gives the call a kernel of its own in the place of a
// general one (predicted, not measured: a copy is a read and a write, and the general kernels read every element once a
// tap).
Plan plan(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment, bool strict,
          const Finish& finish) {
  if (!device.has_code) return aten("this build has no code for the GPU: TORCH_CUDA_ARCH_LIST names what it is for");
  const Layout layout = call_layout(map, s);
  const ImageShape x = input_image(s), y = output_image(s);
  const auto with = [&](const Copies& copies) {
    Plan p = plan_in_place(map, with_copies(s, copies), dtype, device, alignment, strict, finish);
    if (p.kernel != Kernel::aten) p.copies = copies;  // torch copies for itself
    return p;
  };
  Copies scattered{layout, !is_dense_along(layout, x), !is_dense_along(layout, y)};
  scattered.all_images = true;
  const Plan chosen = with(scattered);
  if (layout != Layout::nchw || !is_general(chosen)) return chosen;
  Copies gaps = scattered;
  gaps.x |= !has_dense_rows(x), gaps.y |= !has_dense_rows(y);
  gaps.weight = map != Map::grad_weight && !has_dense_filters(s);
  const Plan dense = with(gaps);
  return is_general(dense) ? chosen : dense;
}

Plan plan_separable(const SeparableShape& shape, DType dtype, const Device& device, bool strict) {
  const ConvShape &d = shape.depthwise, &p = shape.pointwise;
  const auto composite = [](const char* reason) { return Plan{Kernel::composite, "composite", reason, {}, 0}; };
  if (!device.has_code) return composite("this build has no code for the GPU: two calls of torch's");
  if (!narrow_images(d) || !narrow_images(p) || d.N * d.P * d.Q >= kNarrowLimit / 64) {
    return composite("an image of 2^31 elements or more");
  }
  if (d.R * d.S > kSeparableTaps)
    return composite("more than 64 taps: the depthwise stage alone is bound by arithmetic");
  const bool mma = is_half(dtype) && device.compute_capability >= 80;
  int64_t widest = dtype == DType::float64 ? 64 : 128;
  if (mma) widest = 256;
  const int64_t tiles = ceil_div(p.K, widest);
  if (!strict) {  // predicted, not measured: benchmarks/notes
    if (tiles > 1) return composite("more output channels than a block holds: the depthwise stage would be repeated");
    const double wanted = device.tuning().separable_pixels * device.multiprocessors;
    if (static_cast<double>(d.N * d.P * d.Q) < wanted) return composite("too few pixels to fill the GPU");
    if (d.stride_h * d.stride_w < 4 || output_layout(p) != Layout::nhwc) {
      return composite("two calls: each chunk of channels would wait for nine loads, one after the other");
    }
    if (dtype == DType::float32 && device.tf32) {
      return composite("two calls: torch's product may use TF32, which the fused kernel never does");
    }
  }
  int64_t columns = widest;
  while (columns > 64 && p.K <= columns / 2) columns /= 2;
  Plan chosen{mma ? Kernel::separable_mma : Kernel::separable, mma ? "cuda_separable_mma" : "cuda_separable",
              "the intermediate stays in shared memory", SeparableCut{static_cast<int>(columns)}, 0};
  chosen.copies = separable_copies(d, output_layout(p));
  return chosen;
}

Explanation explain(Map map, const Plan& p) {
  std::string tile;
  const auto add = [&tile](const std::string& text) { tile += (tile.empty() ? "" : ", ") + text; };
  std::visit(
      [&](const auto& cut) {
        cut.each(cut, [&](const char* name, auto value) {
          if constexpr (std::is_same_v<decltype(value), bool>) {
            if (value) add("64-bit indices");
          } else if (value != 1) {
            add(std::string(name) + " " + std::to_string(value));
          }
        });
      },
      p.cut);
  return {p.name,           with_copies(p.reason, map, p.copies), p.kernel == Kernel::aten, tile, p.workspace_bytes,
          p.adds_residual()};
}

}  // namespace sepconv::cuda
