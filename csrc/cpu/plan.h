// Which CPU kernel runs a call, and why: a pure function of the call. No torch, no processor queries.
#pragma once

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/operand_layout.h"
#include "core/padding_mode.h"
#include "core/separable_shape.h"

namespace sepconv::cpu {

// <family>_<layout>_<method>, as the files of the kernels. pointwise_product is a matrix product here, of float32;
// pointwise_matmul is ATen's on views, which bindings.cpp makes. aten is torch's own choice of a convolution.
// in_float32 is the call of half types on tensors made float32, which has a plan of its own.
enum class Kernel : int {
  depthwise_nchw_3x3,
  depthwise_nchw_blocked,
  depthwise_nhwc,
  pointwise,
  pointwise_product,
  pointwise_matmul,
  grouped_nhwc,
  grouped_planes,
  aten,
  in_float32,
  separable,
  composite
};

struct Plan {
  Kernel kernel;
  const char* name;    // as counted and explained
  const char* reason;  // a literal
  Copies copies = {};  // what the kernel does not take as it lies: run() gets the shape with_copies()
  bool is_aten() const { return kernel == Kernel::aten; }
  bool is_torchs() const { return is_aten() || kernel == Kernel::in_float32; }  // bindings.cpp calls it
  bool is_composite() const { return kernel == Kernel::composite; }
};

// What the choice has to know of torch in this process. Its own choice of a product depends on its threads. And on a
// processor for which oneDNN has no kernels of a half type, torch multiplies that type in loops of its own.
struct Torch {
  int threads;
  bool bfloat16, float16;  // oneDNN has kernels
  bool has_kernels(DType dtype) const {
    return dtype == DType::float32 || (dtype == DType::bfloat16 && bfloat16) || (dtype == DType::float16 && float16);
  }
};

// With `strict`, ATen is taken for nothing: every shape has a kernel here.
Plan plan(Map, const ConvShape&, DType, bool strict, const Torch&);

// The fourth op: its fused kernel, or the composite of two calls that have plans of their own. `strict` forces the
// kernel.
Plan plan_separable(const SeparableShape&, DType, bool strict, const Torch&);

// bindings.cpp: the half types that oneDNN has kernels for, as torch says; and another answer, for tests and pages.
struct HalfKernels {
  bool bfloat16, float16;
};
HalfKernels half_kernels();
void set_half_kernels(HalfKernels);

// run.cpp: runs the kernel that the plan names. The operands are (x, w), (grad_y, w) or (grad_y, x) for the three maps;
// the epilogue counts for the forward map only. Kernels that are not ours (matmul, torch's) throw std::logic_error.
void run(const Plan&, Map, const ConvShape&, DType, const void* first, const void* second, const Epilogue&, void* out);
// The same for plan_separable; Kernel::composite is not run here.
void run_separable(const Plan&, const SeparableShape&, DType, const SeparableMemory&);

// What depends on the padding, after run(), or instead of it where that is all (border_extent() of padding_mode.h).
void run_borders(Map, const ConvShape&, PaddingMode, DType, const void* first, const void* second, const Epilogue&,
                 void* out);

}  // namespace sepconv::cpu
