#include "plan.h"

namespace sepconv::cpu {
namespace {

constexpr Plan planes(const char* reason) { return {Kernel::planes, "cpu_planes", reason}; }
constexpr Plan depthwise_nhwc(const char* reason) { return {Kernel::depthwise_nhwc, "cpu_depthwise_nhwc", reason}; }
constexpr Plan pointwise(const char* reason) { return {Kernel::pointwise, "cpu_pointwise", reason}; }
constexpr Plan matmul(const char* reason) { return {Kernel::matmul, "cpu_matmul", reason}; }
constexpr Plan aten(const char* reason) { return {Kernel::aten, "aten", reason}; }

// A matrix product over whole images needs both of them dense, and in the same order.
bool is_matrix_product(const ConvShape& s) {
  const Layout x = input_layout(s), y = output_layout(s);
  return s.is_pointwise() && s.stride_h == 1 && s.stride_w == 1 && s.H == s.P && s.W == s.Q && x == y &&
         x != Layout::strided;
}

// Up to these sizes a product is faster in registers than through a matrix library: images of one pixel (where the
// library's blocking finds nothing to block), and products that take less time than a library's call.
constexpr int64_t kFewPixels = 32;
constexpr int64_t kFewProducts = 16 * 1024;

bool is_small_product(const ConvShape& s) {
  const auto dense = [](int64_t channels, int64_t stride) { return channels == 1 || stride == 1; };
  if (!s.is_pointwise() || !dense(s.C, s.w.c)) return false;
  if (s.H == 1 && s.W == 1) return s.P == 1 && s.Q == 1 && s.N <= kFewPixels && dense(s.C, s.x.c) && dense(s.K, s.y.c);
  return is_matrix_product(s) && s.input_elements() * s.K <= kFewProducts;
}

}  // namespace

Plan plan(Map map, const ConvShape& s, DType, bool strict) {
  if (is_small_product(s)) return pointwise("1x1 on few pixels: sums in registers");
  if (is_matrix_product(s)) {
    if (!strict && map == Map::forward) return aten("1x1: oneDNN's product is as fast, and adds the bias on its way");
    if (!strict && map == Map::grad_weight && input_layout(s) == Layout::nchw) {
      return aten("1x1 on planes: oneDNN sums over the batch in one product");
    }
    return matmul("1x1, one group, stride 1: a matrix product over pixels");
  }
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
