// Which CPU kernel runs a call, and why: a pure function of the call. No torch, no processor queries.
#pragma once

#include "core/activation.h"
#include "core/conv_shape.h"
#include "core/operand_layout.h"
#include "core/padding_mode.h"
#include "core/separable_shape.h"

namespace sepconv::cpu {

// <family>_<layout>_<method>, as the files of the kernels. pointwise_product is a matrix product here, of float32;
// pointwise_matmul is ATen's on views, which bindings.cpp makes. aten is torch's own choice of a convolution, and
// aten_float32 the same on tensors of half types made float32.
enum class Kernel : int {
  depthwise_nchw_3x3,
  depthwise_nchw_blocked,
  depthwise_nhwc,
  pointwise,
  pointwise_product,
  pointwise_matmul,
  grouped_planes,
  aten,
  aten_float32,
  separable,
  composite
};

struct Plan {
  Kernel kernel;
  const char* name;    // as counted and explained
  const char* reason;  // a literal
  Copies copies = {};  // what the kernel does not take as it lies: run() gets the shape with_copies()
  bool is_aten() const { return kernel == Kernel::aten; }
  bool is_torchs() const { return is_aten() || kernel == Kernel::aten_float32; }
  bool is_composite() const { return kernel == Kernel::composite; }
};

// With `strict`, ATen is taken for nothing: every shape has a kernel here. `threads`: torch's, which its own choice of
// a product depends on.
Plan plan(Map, const ConvShape&, DType, bool strict, int threads);

// The fourth op: its fused kernel, or the composite of two calls that have plans of their own. `strict` forces the
// kernel.
Plan plan_separable(const SeparableShape&, DType, bool strict);

// run.cpp: runs the kernel that the plan names. The operands are (x, w), (grad_y, w) or (grad_y, x) for the three maps;
// the epilogue counts for the forward map only. Kernels that are not ours (matmul, torch's) throw std::logic_error.
void run(const Plan&, Map, const ConvShape&, DType, const void* first, const void* second, const Epilogue&, void* out);
// The same for plan_separable; Kernel::composite is not run here.
void run_separable(const Plan&, const SeparableShape&, DType, const SeparableMemory&);

// What depends on the padding, after run(), or instead of it where that is all (border_extent() of padding_mode.h).
void run_borders(Map, const ConvShape&, PaddingMode, DType, const void* first, const void* second, const Epilogue&,
                 void* out);

}  // namespace sepconv::cpu
