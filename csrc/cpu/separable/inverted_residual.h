// The door of inverted residual blocks: float32, NHWC, packed weights; raw memory in, raw memory out. Results do
// not depend on the number of threads; in a task of another kernel, all runs in line.
//
//   e = activation(bias + expand x)                      1x1; absent where the block is a depthwise separable one
//   d = activation(bias + depthwise e)                   or one in groups: a ResNeXt's block
//   g = gate(bias + excite activation(bias + squeeze mean(d)))   of each image; or absent
//   y = activation(bias + project(g d) + residual)       1x1
//
// e and d stay in the second-level cache, but for d of a block with a gate.
#pragma once

#include "core/epilogue.h"
#include "cpu/depthwise/depthwise_rows.h"

namespace sepconv::cpu {

// x, the residual and y may be some channels of wider images: `pixel` is the distance between their pixels.
//
// Channels: C of x, E of e and d, K of y; without an expansion E is C. M of the squeezed means, or 0.
struct InvertedResidualShape {
  int64_t N = 0, C = 0, E = 0, K = 0, M = 0;
  DepthwiseShape depthwise;  // of e [N, H, W, E] and d [N, P, Q, E]
};

enum class Gate : int { sigmoid, hardsigmoid };

struct InvertedResidualMemory {
  const float* x = nullptr;  // [N, H, W, C]
  int64_t x_pixel = 0;
  const float* expand = nullptr;  // product_pack() of [E, C], or null: no expansion
  Epilogue expand_epilogue;
  const float* depthwise = nullptr;  // depthwise_pack()
  Epilogue depthwise_epilogue;
  const float* squeeze = nullptr;  // product_pack() of [M, E]
  Epilogue squeeze_epilogue;
  const float* excite = nullptr;  // product_pack() of [E, M]
  const float* excite_bias = nullptr;
  Gate gate = Gate::sigmoid;
  const float* project = nullptr;  // product_pack() of [K, E]
  Epilogue project_epilogue;
  const float* residual = nullptr;  // like y, or null; added before the activation
  int64_t residual_pixel = 0;
  float* y = nullptr;  // [N, P, Q, K]; no operand
  int64_t y_pixel = 0;
};

void inverted_residual_forward(const InvertedResidualShape&, const InvertedResidualMemory&);

}  // namespace sepconv::cpu
