// An inverted residual block without a gate in plain numbers: what a fused kernel is told (ops/inverted_residual.h).
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
  ConvShape depthwise;  // of e and d, C = K = groups = E; its x and y are the strides of the block's input and output
  int64_t C = 0, K = 0;
  bool expands = false, residual = false;
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
