// A depthwise convolution and the 1x1 convolution that follows it, in plain numbers: what a fused kernel is told.
//
//   h = activation_d(bias_d + depthwise(x, w_d))     [N, C * T, P, Q], the intermediate
//   y = activation_p(bias_p + w_p h)                 [N, K, P, Q]
//
// No torch header is seen here: kernels include this file and nothing of torch.
#pragma once

#include "core/conv_shape.h"
#include "core/epilogue.h"

namespace sepconv {

// Two convolutions that fit together: depthwise.y are the strides that the intermediate would have in memory, and
// pointwise.x are the same. The pointwise one is 1x1, one group, stride 1, without padding.
struct SeparableShape {
  ConvShape depthwise;  // x and w_d; groups == C, K == C * T
  ConvShape pointwise;  // w_p and y; C == depthwise.K, H == P == depthwise.P, W == Q == depthwise.Q
};

// What a fused kernel reads and writes, beside the shape.
struct SeparableMemory {
  const void* x;
  const void* depthwise_weight;
  Epilogue depthwise;  // bias [C * T], activation
  const void* pointwise_weight;
  Epilogue pointwise;  // bias [K], activation
  void* y;             // or null: the intermediate alone is wanted
  // Where the backward pass wants the intermediate (else null): after the activation, or before it where the
  // activation's derivative needs that (derivative_from_output() of activation.h). Strides: depthwise.y.
  void* intermediate;
};

}  // namespace sepconv
