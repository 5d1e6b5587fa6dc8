#include "plan.h"

namespace sepconv::cpu {
namespace {

constexpr Plan planes(const char* reason) { return {Kernel::planes, "cpu_planes", reason}; }
constexpr Plan depthwise_nhwc(const char* reason) { return {Kernel::depthwise_nhwc, "cpu_depthwise_nhwc", reason}; }
constexpr Plan pointwise(const char* reason) { return {Kernel::pointwise, "cpu_pointwise", reason}; }
constexpr Plan matmul(const char* reason) { return {Kernel::matmul, "cpu_matmul", reason}; }
constexpr Plan aten(const char* reason) { return {Kernel::aten, "aten", reason}; }

// Up to here a batch of one-pixel images is faster in registers than through a matrix library.
constexpr int64_t kFewPixels = 32;

bool is_few_pixels(const ConvShape& s) {
  const auto dense = [](int64_t channels, int64_t stride) { return channels == 1 || stride == 1; };
  return s.is_pointwise() && s.H == 1 && s.W == 1 && s.P == 1 && s.Q == 1 && s.N <= kFewPixels && dense(s.C, s.x.c) &&
         dense(s.C, s.w.c) && dense(s.K, s.y.c);
}

// A matrix product over whole images needs both of them dense, and in the same order.
bool is_matrix_product(const ConvShape& s) {
  const Layout x = input_layout(s), y = output_layout(s);
  return s.is_pointwise() && s.stride_h == 1 && s.stride_w == 1 && s.H == s.P && s.W == s.Q && x == y &&
         x != Layout::strided;
}

}  // namespace

Plan plan(Map, const ConvShape& s, DType, bool strict) {
  if (is_few_pixels(s)) return pointwise("1x1 on a few images of one pixel: sums in registers");
  if (is_matrix_product(s)) return matmul("1x1, one group, stride 1: a matrix product over pixels");
  if (s.is_depthwise() && s.K == s.C) {
    if (s.x.c == 1 && s.y.c == 1 && input_layout(s) == Layout::nhwc && output_layout(s) == Layout::nhwc) {
      return depthwise_nhwc("depthwise on channels_last images: vectors of channels");
    }
    return planes("depthwise on planes: vectors of pixels");
  }
  if (s.is_depthwise()) return planes("depthwise with a multiplier: vectors of pixels");
  if (!strict && s.groups == 1) return aten("a dense convolution: oneDNN's matrix kernels are faster");
  return planes("groups of several channels: vectors of pixels");
}

}  // namespace sepconv::cpu
