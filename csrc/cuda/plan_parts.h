// What the parts of the plan share: plan.cpp has the families, plan_depthwise.cpp the depthwise one.
#pragma once

#include <algorithm>
#include <optional>

#include "core/arithmetic.h"
#include "cuda/plan.h"

namespace sepconv::cuda {

// Offsets inside one image (or one position of the padded image) fit in 31 bits.
inline bool narrow_images(const ConvShape& s) {
  const auto extent = [](int64_t c, int64_t h, int64_t w, const Strides& t) {
    return (c - 1) * t.c + (h - 1) * t.h + (w - 1) * t.w + 1;
  };
  const int64_t span_h = s.H + 2 * s.pad_h + s.P * s.stride_h + s.R * s.dilation_h;
  const int64_t span_w = s.W + 2 * s.pad_w + s.Q * s.stride_w + s.S * s.dilation_w;
  return std::max({extent(s.C, s.H, s.W, s.x), extent(s.K, s.P, s.Q, s.y), span_h, span_w}) < kNarrowLimit - 4096;
}

// The image that the map writes.
struct Written {
  int64_t channels, rows, columns;
};
inline Written written(Map map, const ConvShape& s) {
  return map == Map::forward ? Written{s.K, s.P, s.Q} : Written{s.C, s.H, s.W};
}

// Strips of equal height, none taller than `most`.
inline int even_rows(int64_t rows, int64_t most) {
  return static_cast<int>(rows < 1 ? 1 : ceil_div(rows, ceil_div(rows, most)));
}

// A dimension of size 1 has no say in what is dense or aligned.
inline bool dense_channels(const ConvShape& s) { return s.C > 1 && s.x.c == 1 && s.y.c == 1; }
inline bool dense_columns(const ConvShape& s) { return (s.W == 1 || s.x.w == 1) && (s.Q == 1 || s.y.w == 1); }

// Every pixel of both images begins at a multiple of `vec` elements, and channels come in whole vectors.
inline bool whole_vectors(const ConvShape& s, int64_t vec, DType dtype, int64_t alignment) {
  const auto multiple = [vec](int64_t size, int64_t stride) { return size <= 1 || stride % vec == 0; };
  return s.K == s.C && dense_channels(s) && s.C % vec == 0 && alignment % (vec * element_size(dtype)) == 0 &&
         multiple(s.N, s.x.n) && multiple(s.H, s.x.h) && multiple(s.W, s.x.w) && multiple(s.N, s.y.n) &&
         multiple(s.P, s.y.h) && multiple(s.Q, s.y.w);
}

// One block holds 16-byte pieces of several images, which it reaches by 31-bit offsets.
inline bool near_images(const ConvShape& s, int64_t images) { return images * std::max(s.x.n, s.y.n) < kNarrowLimit; }

Plan plan_depthwise(Map, const ConvShape&, DType, const Device&, int64_t alignment);
// A register window over rows without gaps, 3x3, 5x5 or 7x7.
bool depthwise_nchw_can_run(Map, const ConvShape&, DType);
// Each kernel that can run a depthwise call, with its own cut.
std::vector<Plan> depthwise_plans(Map, const ConvShape&, DType, const Device&, int64_t alignment);
// forward and grad_input on tensor cores, for images of whole vectors of eight channels: whether they can run, and how.
bool nhwc_mma_can_run(const ConvShape&, DType, const Device&);
Plan plan_depthwise_nhwc_mma(Map, const ConvShape&, const Device&);
// Images of rows (NCHW) in half types, stride 1, on tensor cores. False: not where plain kernels are predicted to be as
// fast.
bool plan_depthwise_tensor_cores(Plan&, Map, const ConvShape&, DType, const Device&, int64_t alignment);
std::vector<Plan> depthwise_tensor_core_plans(Map, const ConvShape&, DType, const Device&, int64_t alignment);
// The part of what depthwise_nhwc.cu can run that the copy engine serves, where that is predicted to be faster.
std::optional<Plan> plan_depthwise_nhwc_tma(Map, const ConvShape&, DType, const Device&, int64_t alignment);
// Large kernels of stride 1 in plain arithmetic: whether they can run, and how.
bool large_can_run(Map, const ConvShape&, const Device&);
Plan plan_depthwise_large(Map, const ConvShape&, DType, const Device&);
constexpr Plan aten(const char* reason) { return {Kernel::aten, "aten", reason, {}, 0}; }
// 1x1 of one group: whether the products can run, and which. With `strict`, torch's are left out.
bool pointwise_can_run(Map, const ConvShape&);
Plan plan_pointwise(Map, const ConvShape&, DType, const Device&, int64_t alignment, bool strict, const Finish&);
// Groups in channels_last on tensor cores: whether they can run, and how.
bool grouped_nhwc_mma_can_run(const ConvShape&, DType, const Device&, int64_t alignment);
Plan plan_grouped_nhwc_mma(Map, const ConvShape&, const Device&);
// The kernel that runs any groups: what is left over.
Plan plan_grouped(Map, const ConvShape&, DType, const char* reason);

}  // namespace sepconv::cuda
