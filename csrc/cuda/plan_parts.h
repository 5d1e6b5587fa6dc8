// What the parts of the plan share: plan.cpp has the families, plan_depthwise.cpp the depthwise one.
#pragma once

#include <algorithm>

#include "plan.h"

namespace sepconv::cuda {

inline constexpr int64_t kNarrow = int64_t{1} << 31;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline int64_t acc_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }
inline bool is_half(DType dtype) { return dtype == DType::float16 || dtype == DType::bfloat16; }

// Offsets inside one image (or one position of the padded image) fit in 31 bits.
inline bool narrow_images(const ConvShape& s) {
  const auto extent = [](int64_t c, int64_t h, int64_t w, const Strides& t) {
    return (c - 1) * t.c + (h - 1) * t.h + (w - 1) * t.w + 1;
  };
  const int64_t span_h = s.H + 2 * s.pad_h + s.P * s.stride_h + s.R * s.dilation_h;
  const int64_t span_w = s.W + 2 * s.pad_w + s.Q * s.stride_w + s.S * s.dilation_w;
  return std::max({extent(s.C, s.H, s.W, s.x), extent(s.K, s.P, s.Q, s.y), span_h, span_w}) < kNarrow - 4096;
}

Plan plan_depthwise(Map, const ConvShape&, DType, const Device&, int64_t alignment);
// forward and grad_input on tensor cores, for images of whole vectors of eight channels: whether they can run, and how.
bool nhwc_mma_can_run(const ConvShape&, DType, const Device&);
Plan plan_depthwise_nhwc_mma(Map, const ConvShape&, const Device&);
// Large kernels of stride 1 in plain arithmetic: whether they can run, and how.
bool large_can_run(Map, const ConvShape&, const Device&);
Plan plan_depthwise_large(Map, const ConvShape&, DType, const Device&);
// The kernel that runs any groups: what is left over.
Plan plan_grouped(Map, const ConvShape&, DType, const char* reason);

}  // namespace sepconv::cuda
