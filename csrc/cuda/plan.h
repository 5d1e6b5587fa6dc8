// Which CUDA kernel runs a call, how it is cut, and why: a pure function of the call's shape and a few facts of the
// device. No torch, no CUDA calls, no allocation: it is tested without a GPU, and costs a call well under a
// microsecond.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/block_shape.h"
#include "core/conv_shape.h"
#include "core/explain.h"
#include "core/operand_layout.h"
#include "cuda/cut.h"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace sepconv::cuda {

// Those before `aten` have doors in run.cpp.
enum class Kernel : int {
  depthwise_nhwc,
  depthwise_nhwc_mma,
  depthwise_nhwc_tma,
  depthwise_nchw,
  depthwise_nchw_mma,
  depthwise_direct,
  depthwise_grad_weight,
  depthwise_grad_weight_nhwc,
  depthwise_grad_weight_nhwc_mma,
  depthwise_grad_weight_nchw,
  depthwise_toeplitz,
  depthwise_large,
  pointwise,
  pointwise_mma,
  pointwise_nhwc_mma,
  grouped,
  grouped_nhwc_mma,
  aten,
  pointwise_matmul,  // torch's product on views, which bindings.cpp makes
  // separable_conv2d
  separable,
  separable_mma,
  composite,
  inverted_residual,
  // causal_conv1d
  causal_nlc,
  causal_ncl,
  causal_direct
};

struct Device {
  int multiprocessors = 0;
  int compute_capability = 0;     // 90 for 9.0
  bool copies_boxes = false;      // has_depthwise_nhwc_tma()
  bool has_code = true;           // architectures.h
  bool tf32 = false;              // torch's own convolutions may round float32 operands to TF32
  const Tuning* tuned = nullptr;  // in the place of the table's row

  const Tuning& tuning() const { return tuned != nullptr ? *tuned : tuning_for(compute_capability); }
};

struct Plan {
  Kernel kernel = Kernel::aten;
  const char* name = "aten";  // as counted and explained; a literal
  const char* reason = "";    // a literal
  Cut cut;
  int64_t workspace_bytes = 0;  // 16-byte aligned scratch memory that the launch needs
  Copies copies = {};           // what the kernel does not take as it lies: run() gets the shape with_copies()
  bool is_aten() const { return kernel == Kernel::aten; }
  bool is_torchs() const { return is_aten(); }
  bool is_composite() const { return kernel == Kernel::composite; }
  bool adds_residual() const { return kernel == Kernel::pointwise_nhwc_mma && !copies.any(); }
};

// `alignment`: bytes, a power of two that divides the address of every tensor of the call (16 is as good as more).
// With `strict`, ATen is taken only for what no kernel here can run. The activation and a residual count where torch's
// product would leave them to passes of their own.
Plan plan(Map, const ConvShape&, DType, const Device&, int64_t alignment, bool strict, const Finish& finish = {});

// The fourth op: a fused kernel, or the composite of two calls that have plans of their own. With `strict`, the fused
// kernel wherever it can run.
Plan plan_separable(const SeparableShape&, DType, const Device&, bool strict);

// An inverted residual block: one kernel, or the composite of calls that have plans of their own. With `strict`, the
// kernel wherever it can run.
Plan plan_block(const BlockShape&, DType, const Device&, int64_t alignment, bool strict);

// A causal call with states or packed: a kernel, or other ops in its place (composite).
Plan plan_causal(const CausalShape&, DType, const Device&, int64_t alignment);

Explanation explain(Map, const Plan&);

// ---- plan_overrule.cpp: another kernel or cut than the plan's, to try what it would take. Private: a kernel may be
// named that cannot run the call.

// The numbers of a cut by name; throws std::invalid_argument for a name that there is not. With the kernel's plain name
// ("depthwise_nhwc"), what is not named is 1; without, it is the plan's.
using CutNumbers = std::map<std::string, int64_t>;
Plan overruled(Plan, Map, const ConvShape&, DType, const std::string& kernel, const CutNumbers&);

// The plan's choice, the same kernel with the other cuts that make sense, and each other kernel that can run a
// depthwise call, as it would be planned.
std::vector<Plan> alternatives(Map, const ConvShape&, DType, const Device&, int64_t alignment);

// run.cpp: launches what the plan says. Kernel::aten is not launched here: cudaErrorNotSupported.
cudaError_t run(const Plan&, Map, const Launch&);
// The same for plan_separable; Kernel::composite is not launched here.
cudaError_t run_separable(const Plan&, const SeparableShape&, DType, const SeparableMemory&, cudaStream_t);

// The same for plan_block and plan_causal.
cudaError_t run_block(const Plan&, const BlockShape&, DType, const BlockMemory&, cudaStream_t);
cudaError_t run_causal(const Plan&, const CausalShape&, DType, const CausalMemory&, cudaStream_t);

// What depends on the padding, after run(), or instead of it where that is all (border_extent() of padding_mode.h).
cudaError_t run_borders(Map, const Launch&, PaddingMode);

}  // namespace sepconv::cuda
