// How the kernels of this folder cut their work.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/conv_shape.h"
#include "cuda/split_sum.h"

namespace sepconv::cuda {

// pointwise.cu and pointwise_mma.cu: a block sums a tile of 64 x 64 (or 128 x 64) weights.
inline int pointwise_grad_weight_splits(const ConvShape& s) {
  return grad_weight_splits(((s.K + 63) / 64) * ((s.C + 63) / 64), s.N * s.P * s.Q, 256);
}

// pointwise_nhwc_mma.cu
struct ProductCut {
  int outputs = 32;  // of a block: 32, 64, 96 or 128
  int blocks = 1;    // that share the tiles of pixels

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("outputs", cut.outputs);
    field("blocks", cut.blocks);
  }
};
inline constexpr int kProductPixels = 128, kProductStages = 3;  // of a tile; of 128 bytes a pixel
// Shared memory of a block: the stages, and the weights in slices of 64 channels.
inline int64_t product_bytes(int64_t depth, int64_t outputs) {
  return (kProductStages * kProductPixels + ceil_div<int64_t>(depth, 64) * outputs) * 128;
}

// pointwise_nhwc_mma_grad_weight.cu: tiles of weights, whose rows are the channels of the image that has more.
inline constexpr int kProductSumRows = 128, kProductSumPixels = 64;  // of a tile; of a stage
inline int64_t product_sum_columns(const ConvShape& s) {
  const int64_t fewer = std::min(s.C, s.K);
  return fewer <= 32 ? 32 : fewer <= 64 ? 64 : 128;
}
struct ProductSumTiles {
  int64_t down, across;
};
inline ProductSumTiles product_sum_tiles(const ConvShape& s) {
  return {ceil_div<int64_t>(std::max(s.C, s.K), kProductSumRows), ceil_div(std::min(s.C, s.K), product_sum_columns(s))};
}
// Two blocks for each multiprocessor of a large GPU, and parts of eight stages and more. From the shape alone, as in
// split_sum.h.
inline int product_sum_splits(const ConvShape& s) {
  const ProductSumTiles tiles = product_sum_tiles(s);
  const int64_t most = ceil_div<int64_t>(264, tiles.down * tiles.across);
  return static_cast<int>(std::clamp<int64_t>(s.N * s.P * s.Q / (8 * kProductSumPixels), 1, most));
}

}  // namespace sepconv::cuda
