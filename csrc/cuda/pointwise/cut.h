// How pointwise.cu and pointwise_mma.cu cut their work.
#pragma once

#include "core/conv_shape.h"
#include "cuda/split_sum.h"

namespace sepconv::cuda {

// pointwise.cu and pointwise_mma.cu: a block sums a tile of 64 x 64 (or 128 x 64) weights.
inline int pointwise_grad_weight_splits(const ConvShape& s) {
  return grad_weight_splits(((s.K + 63) / 64) * ((s.C + 63) / 64), s.N * s.P * s.Q, 256);
}

}  // namespace sepconv::cuda
