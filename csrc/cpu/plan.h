// Which CPU kernel runs a call, and why: a pure function of the call. No torch, no processor queries.
#pragma once

#include "../conv_shape.h"
#include "../separable_shape.h"

namespace sepconv::cpu {

// aten is torch's own choice of a convolution; onednn its oneDNN convolution, called by name.
enum class Kernel : int {
  planes,
  small_planes,
  blocked,
  depthwise_nhwc,
  pointwise,
  matmul,
  aten,
  onednn,
  separable,
  composite
};

struct Plan {
  Kernel kernel;
  const char* name;    // as counted and explained
  const char* reason;  // a literal
  bool is_torchs() const { return kernel == Kernel::aten || kernel == Kernel::onednn; }
};

// With `strict`, ATen is taken for nothing: every shape has a kernel here. `threads`: torch's, which its own choice of a
// product depends on.
Plan plan(Map, const ConvShape&, DType, bool strict, int threads);

// The fourth op: its fused kernel, or the composite of two calls that have plans of their own. `strict` forces the kernel.
Plan plan_separable(const SeparableShape&, DType, bool strict);

}  // namespace sepconv::cpu
