// An inverted residual block in plain numbers: what a plan is asked about, and a fused kernel told
// (ops/inverted_residual.h).
//
//   e = activation_e(bias_e + w_e x)                   [N, E, H, W], or x itself where nothing is expanded
//   d = activation_d(bias_d + depthwise(e, w_d))       [N, E, P, Q]
//   y = activation_p(bias_p + w_p d [+ x])             [N, K, P, Q]
//
// No torch header is seen here: kernels include this file and nothing of torch.
#pragma once

#include "core/conv_shape.h"
#include "core/epilogue.h"

namespace sepconv {

struct BlockShape {
  // Of e and d, C = K = groups = E; its x and y are the strides of the block's input and output, and zero where the
  // input is no image in channels_last.
  ConvShape depthwise;
  int64_t C = 0, K = 0;
  bool expands = false, residual = false;
  bool gated = false;  // d is multiplied by the gate of squeeze-and-excitation, which BlockMemory knows nothing of
};

// Weights are dense: [E, C], [E, R, S] and [K, E].
struct BlockMemory {
  const void* x;
  const void* expand_weight;  // null: x is e
  Epilogue expand;
  const void* depthwise_weight;
  Epilogue depthwise;
  const void* project_weight;
  Epilogue project;
  void* y;
};

}  // namespace sepconv
