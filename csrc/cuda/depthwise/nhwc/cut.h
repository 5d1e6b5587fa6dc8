// How the channels_last depthwise kernels cut their work, as pure functions of the shape.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/conv_shape.h"
#include "cuda/depthwise/cut.h"

namespace sepconv::cuda {

// depthwise_nhwc.cu
struct NhwcCut {
  int vec = 1;   // channels of a thread
  int rows = 1;  // that a thread walks down

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("rows", cut.rows);
  }
};

// depthwise_nhwc_mma.cu
struct NhwcMmaCut {
  int rows = 1;    // output rows of a place
  int splits = 1;  // blocks that share the places of the same channels

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("rows", cut.rows);
    field("splits", cut.splits);
  }
};

// depthwise_nhwc_tma.cu
struct NhwcTmaCut {
  int pairs = 1;  // of channels in a warp: 16 or 32
  int rows = 1;   // output rows of a strip

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("pairs", cut.pairs);
    field("rows", cut.rows);
  }
};

// ---- depthwise_nhwc.cu: blocks of kNhwcThreads threads, each with up to kNhwcLanes channel vectors.
inline constexpr int kNhwcThreads = 128, kNhwcLanes = 32;
// Output columns a thread works on: of planes of 7, 14, 28, 56 and 112 columns seven leave none over.
constexpr int nhwc_columns(int stride) { return stride == 1 ? 7 : 4; }
// Channel vectors of a block: all there are, in equal parts, or 16, whichever leaves fewer threads without work.
inline int64_t nhwc_lanes(int64_t vectors) {
  const auto blocks = [vectors](int64_t lanes) { return (vectors + lanes - 1) / lanes; };
  const int64_t half = kNhwcLanes / 2, even = (vectors + blocks(kNhwcLanes) - 1) / blocks(kNhwcLanes);
  return kNhwcThreads / half * blocks(even) > kNhwcThreads / even * blocks(half) ? half : even;
}

// ---- depthwise_nhwc_mma.cu and depthwise_grad_weight_nhwc_mma.cu: a block has a few groups of channels, with a warp
// for each. A place is a tile of columns of one image (the output), or the narrow rows of several images side by side.
inline constexpr int kMmaColumns = 32;  // that a place has, in pairs
struct MmaBlock {
  int groups, slices;       // of a block; blocks for all channels
  int pairs, column_tiles;  // of columns in a tile of an image; tiles of a row
  int images;               // of a place
  int64_t image_groups;

  int width() const { return 2 * pairs + 6; }  // columns of the input for an image: pairs meet eight
};
inline MmaBlock mma_block(int64_t N, int64_t columns, int64_t groups, int64_t most_groups) {
  constexpr int64_t kPairs = kMmaColumns / 2, kWidth = 2 * kMmaColumns;  // a thread copies two columns of the input
  const int64_t slices = ceil_div(groups, most_groups), all_pairs = std::max<int64_t>(ceil_div(columns, 2), 1);
  const int64_t column_tiles = ceil_div(all_pairs, kPairs), pairs = ceil_div(all_pairs, column_tiles);
  const int64_t most = column_tiles > 1 ? 1 : std::min(kPairs / pairs, kWidth / (2 * pairs + 6));
  const int64_t images = std::clamp<int64_t>(N, 1, most);
  return {static_cast<int>(ceil_div(groups, slices)),
          static_cast<int>(slices),
          static_cast<int>(pairs),
          static_cast<int>(column_tiles),
          static_cast<int>(images),
          ceil_div(std::max<int64_t>(N, 1), images)};
}
// Rows of the filter that there are kernels for, which are also those of a batch.
constexpr int mma_rows(int64_t R) { return R <= 5 ? 5 : 7; }

// Groups of eight channels. Rows of sums in shared memory, in floats: even columns, then odd ones, and of each all
// channels. The fours by which columns and their halves lie apart put what a warp writes, and what it reads, on
// different banks.
inline constexpr int kNhwcMmaGroups = 4;
inline constexpr int kNhwcMmaSumPitch = kNhwcMmaGroups * 8 + 4;
inline constexpr int kNhwcMmaSumHalf = kMmaColumns / 2 * kNhwcMmaSumPitch + 4;
struct NhwcMmaBlock : MmaBlock {
  int rows;     // mma_rows
  int swizzle;  // pieces of 16 bytes that a column takes in shared memory, as a power of two

  // Of an image beside others two columns more, where they fit: at_column() then finds other banks for its pairs.
  int width() const {
    const int wide = 2 * pairs + 8;
    return images > 1 && images * wide <= 2 * kMmaColumns ? wide : 2 * pairs + 6;
  }
  // Half a row has an odd number of columns, or of 64 bytes: even and odd columns are copied to different banks.
  int half_columns() const {
    const int step = 8 >> swizzle, columns = images * width() / 2;
    return columns + ((step / 2 - columns) & (step - 1));
  }
  int64_t row_bytes() const { return int64_t{2 * half_columns() * 16} << swizzle; }
  int64_t bytes() const { return rows * (2 * row_bytes() + 2 * kNhwcMmaSumHalf * 4); }
};
inline NhwcMmaBlock nhwc_mma_block(Map map, const ConvShape& s) {
  const MmaBlock cut = mma_block(s.N, map == Map::forward ? s.Q : s.W, s.C / 8, kNhwcMmaGroups);
  return {cut, mma_rows(s.R), cut.groups > 2 ? 2 : cut.groups - 1};
}
// depthwise_nhwc_tma.cu: blocks that a multiprocessor holds, by their registers.
constexpr int nhwc_tma_blocks(int64_t kernel) { return kernel == 5 ? 4 : 3; }

// grad_weight: groups of four channels.
inline constexpr int kGradWeightMmaGroups = 8;
inline MmaBlock grad_weight_mma_block(const ConvShape& s) { return mma_block(s.N, s.Q, s.C / 4, kGradWeightMmaGroups); }

// channels_last: a warp takes kGradWeightColumns columns of 32 channels, a block up to this many warps. The sums of 7x7
// leave registers for 12 warps a multiprocessor, three blocks of four.
constexpr int grad_weight_slots(int64_t kernel) { return kernel == 7 ? 4 : 8; }
struct GradWeightNhwc {
  int channels, chunks;  // of a chunk; chunks
  int lanes;             // of 32, for the channels of one image; those of others take the rest
  int slots, images;     // warps for a tile of a row; images one after the other
  int tiles;             // of a row
  int64_t places;        // tiles of rows, of groups of images
};
inline GradWeightNhwc grad_weight_nhwc_block(const ConvShape& s) {
  const int64_t chunks = ceil_div(s.K, 32),
                channels = ceil_div(ceil_div(s.K, chunks), 8) * 8;  // whole pieces of 16 bytes
  const int64_t lanes = channels <= 16 && s.N * channels >= 32 ? channels : 32;
  const int64_t slots = ceil_div(s.Q, kGradWeightColumns), tiles = ceil_div(slots, grad_weight_slots(s.R));
  const int64_t slots_a_tile = ceil_div(slots, tiles), most = grad_weight_slots(s.R) / slots_a_tile * (32 / lanes);
  const int64_t groups = ceil_div(s.N, most), images = ceil_div(ceil_div(s.N, groups), 32 / lanes);
  return {static_cast<int>(channels), static_cast<int>(chunks), static_cast<int>(lanes), static_cast<int>(slots_a_tile),
          static_cast<int>(images),   static_cast<int>(tiles),  groups * tiles};
}

}  // namespace sepconv::cuda
