// How spatial_separable.cu cuts its work.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/conv_shape.h"

namespace sepconv::cuda {

// ---- spatial_separable.cu: a block computes this many rows, and this many columns and channels, through a tile of
// shared memory that every GPU has without being asked.
inline constexpr int kSpatialRows = 8;
inline constexpr int64_t kSpatialSharedBytes = 48 << 10;

struct SpatialTile {
  int columns = 0, channels = 0;  // 0 columns: the filters or the image are too large for the kernel
  int64_t smem_bytes = 0;
};

inline int64_t spatial_blocks(const ConvShape& s, const SpatialTile& tile) {
  return s.N * ceil_div(s.C, tile.channels) * ceil_div(s.P, kSpatialRows) * ceil_div(s.Q, tile.columns);
}

// As many columns as make lines of 512 elements; fewer, and then fewer channels, where the halo of a long filter needs
// the memory.
inline SpatialTile spatial_tile(const ConvShape& s, DType dtype) {
  constexpr int64_t kLine = 512, kLeastColumns = 8, kLimit = (int64_t{1} << 31) - 4096;
  const auto bytes = [&](int64_t columns, int64_t channels) {
    return kSpatialRows * (columns + s.S - 1) * channels * (dtype == DType::float64 ? 8 : 4);
  };
  if (std::max({s.C, s.H + s.P + s.R + s.pad_h, s.W + s.Q + s.S + s.pad_w}) >= kLimit) return {};
  const bool channels_dense = s.C > 1 && s.x.c == 1 && s.y.c == 1;
  for (int64_t channels = channels_dense ? std::min<int64_t>(s.C, 32) : 1; channels >= 1; channels /= 2) {
    const int64_t line = std::min(s.Q, std::max(kLine / channels, kLeastColumns));
    for (int64_t columns = line; columns >= std::min(line, kLeastColumns); columns = columns > 1 ? columns / 2 : 0) {
      const SpatialTile tile{static_cast<int>(columns), static_cast<int>(channels), bytes(columns, channels)};
      if (tile.smem_bytes <= kSpatialSharedBytes && spatial_blocks(s, tile) < kLimit) return tile;
    }
  }
  return {};
}

}  // namespace sepconv::cuda
