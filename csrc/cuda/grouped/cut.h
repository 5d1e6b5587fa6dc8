// How grouped.cu and grouped_grad_weight.cu cut their work, as pure functions of the shape.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/conv_shape.h"
#include "cuda/split_sum.h"

namespace sepconv::cuda {

// ---- grouped.cu: a thread computes this many output channels of one group; one channel a group (depthwise) leaves
// nothing to share between channels. The argument is that of the tensor that is written: y in forward, x in grad_input.
inline constexpr int kGroupedChannels = 4;
inline int grouped_channel_tile(int64_t channels_per_group) { return channels_per_group == 1 ? 1 : kGroupedChannels; }

// Elements of the weight after packing: [R, S, channels read, groups, channels written, padded to whole tiles].
inline int64_t grouped_packed_elements(const ConvShape& s, bool grad_input) {
  const int64_t read = grad_input ? s.outputs_per_group() : s.channels_per_group();
  const int64_t written = grad_input ? s.channels_per_group() : s.outputs_per_group();
  const int64_t tile = grouped_channel_tile(written);
  return s.groups * s.R * s.S * read * ((written + tile - 1) / tile * tile);
}

// Workspace of launch_grouped_forward and launch_grouped_grad_input: the packed weight in the accumulation type.
inline int64_t grouped_workspace_bytes(const ConvShape& s, DType dtype, bool grad_input) {
  return grouped_packed_elements(s, grad_input) * (dtype == DType::float64 ? 8 : 4);
}

// True where every index that the kernels of grouped.cu and grouped_grad_weight.cu form fits in 31 bits.
inline bool grouped_is_narrow(const ConvShape& s) {
  const auto reach = [](int64_t n, int64_t c, int64_t h, int64_t w, const Strides& t) {
    return (n - 1) * t.n + (c - 1) * t.c + (h - 1) * t.h + (w - 1) * t.w;
  };
  // Whole tiles of channels and columns are fewer than 4 times what is in them.
  const int64_t largest =
      std::max({reach(s.N, s.C, s.H, s.W, s.x), reach(s.N, s.K, s.P, s.Q, s.y),
                reach(s.K, s.channels_per_group(), s.R, s.S, s.w), 4 * s.input_elements(), 4 * s.output_elements(),
                4 * s.weight_elements(), s.H + s.pad_h + s.P * s.stride_h + s.R * s.dilation_h,
                s.W + s.pad_w + s.Q * s.stride_w + s.S * s.dilation_w});
  return largest < (int64_t{1} << 31) - 4096;
}

// A thread of grouped_grad_weight sums over a tile of tile x tile (output, input) channels of one group and one tap.
inline constexpr int kGroupedGradWeightTile = 4;
inline int grouped_grad_weight_tile(const ConvShape& s) {
  return s.channels_per_group() == 1 && s.outputs_per_group() == 1 ? 1 : kGroupedGradWeightTile;
}
inline int64_t grouped_grad_weight_tiles(const ConvShape& s) {
  const int64_t tile = grouped_grad_weight_tile(s);
  return s.R * s.S * s.groups * ((s.outputs_per_group() + tile - 1) / tile) *
         ((s.channels_per_group() + tile - 1) / tile);
}
// Neighbouring threads take neighbouring channels (32 tiles a block) where y is channels_last, else neighbouring pixels
// (1).
inline bool grouped_grad_weight_lanes_are_channels(const ConvShape& s) { return output_layout(s) == Layout::nhwc; }
inline int grouped_grad_weight_splits(const ConvShape& s) {
  const bool channels = grouped_grad_weight_lanes_are_channels(s);
  const int64_t tiles = grouped_grad_weight_tiles(s);
  return grad_weight_splits(channels ? (tiles + 31) / 32 : tiles, s.N * s.P * s.Q, channels ? 64 : 1024);
}

// ---- grouped_nhwc_mma.cu, grouped_nhwc_mma_stride2.cu
struct GroupedMmaCut {
  int pairs = 1;   // rows of positions of a step
  int tiles = 1;   // of 16 positions side by side
  int strips = 1;  // of an image
  int blocks = 1;  // that share the strips of 64 channels

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("pairs", cut.pairs);
    field("tiles", cut.tiles);
    field("strips", cut.strips);
    field("blocks", cut.blocks);
  }
};
inline constexpr int kGroupedMmaStages = 4;

// What a block reads and writes. A position has one output, or two rows of one (stride 1), or the 2 x 2 that share an
// input (grad_input of stride 2); `shift` of those that the first position has lie before the image.
struct GroupedMmaTile {
  int64_t pad_h, pad_w, shift_h = 0, shift_w = 0;
  int64_t down, across;  // positions
  int64_t width, pitch;  // columns that are read, and pixels of a row in shared memory
  int64_t result_width;  // columns of results, of the one or two rows of a row of positions
  int64_t bytes;         // of shared memory
};
inline GroupedMmaTile grouped_mma_tile(Map map, const ConvShape& s, const GroupedMmaCut& cut) {
  GroupedMmaTile t{};
  const int64_t step = map == Map::forward ? s.stride_w : 1;
  const bool apart = map == Map::grad_input && s.stride_w == 2;
  if (apart) {
    t.pad_h = 1 - s.pad_h / 2, t.pad_w = 1 - s.pad_w / 2, t.shift_h = s.pad_h % 2, t.shift_w = s.pad_w % 2;
    t.down = ceil_div<int64_t>(s.H + t.shift_h, 2), t.across = ceil_div<int64_t>(s.W + t.shift_w, 2);
  } else if (map == Map::grad_input) {
    t.pad_h = 2 - s.pad_h, t.pad_w = 2 - s.pad_w, t.down = ceil_div<int64_t>(s.H, 2), t.across = s.W;
  } else {
    t.pad_h = s.pad_h, t.pad_w = s.pad_w, t.down = step == 1 ? ceil_div<int64_t>(s.P, 2) : s.P, t.across = s.Q;
  }
  t.width = (cut.tiles * 16 - 1) * step + (apart ? 2 : 3);
  t.pitch = ceil_div(t.width, 8 * step) * 8 * step;
  t.result_width = cut.tiles * int64_t{16} * (apart ? 2 : 1);
  const int64_t results = t.result_width * (apart || step == 1 ? 2 : 1);
  t.bytes = cut.pairs * (kGroupedMmaStages * (apart ? 1 : 2) * t.pitch + results) * 128;
  return t;
}

// How many strips `steps` steps of every image are cut into for `blocks` blocks: what the busiest block does is least.
// An item costs, beside its steps, the rows above it and the wait for them.
inline int64_t grouped_mma_strips(int64_t steps, int64_t columns, int64_t blocks) {
  constexpr double kItemBegins = 1.5;  // in steps
  constexpr int64_t kMostStrips = 64;  // a plan should not take long
  int64_t found = 1;
  double best = 0;
  for (int64_t strips = 1; strips <= std::min<int64_t>(steps, kMostStrips); ++strips) {
    const int64_t each = ceil_div(steps, strips);
    if (ceil_div(steps, each) != strips) continue;  // the last ones would be empty
    const double cost =
        static_cast<double>(ceil_div(columns * strips, blocks)) * (static_cast<double>(each) + kItemBegins);
    if (strips == 1 || cost < best) best = cost, found = strips;
  }
  return found;
}

// ---- grouped_nhwc_mma_grad_weight.cu, from the shape and the number of parts alone.
struct GroupedMmaSums {
  int64_t tiles, pairs, strips;  // as in GroupedMmaCut
  int64_t down;                  // rows of grad_y, in those that are multiplied at once
  int64_t width, pitch;          // of rows of x in shared memory
  int64_t bytes;                 // of shared memory
};
inline GroupedMmaSums grouped_mma_sums(const ConvShape& s, int64_t splits) {
  GroupedMmaSums t{};
  const int64_t rows = s.stride_h == 1 ? 2 : 1, across = ceil_div<int64_t>(s.Q, 16);
  t.tiles = ceil_div(across, ceil_div<int64_t>(across, 2));
  t.down = ceil_div(s.P, rows);
  t.pairs = t.tiles == 1 && s.stride_h == 1 && t.down > 1 ? 2 : 1;
  t.width = (t.tiles * 16 - 1) * s.stride_w + 3;
  t.pitch = ceil_div(t.width, 8 * s.stride_w) * 8 * s.stride_w;
  t.bytes = kGroupedMmaStages * t.pairs * (2 * t.pitch + rows * t.tiles * 16) * 128;
  t.strips = grouped_mma_strips(ceil_div(t.down, t.pairs), s.N * ceil_div<int64_t>(s.Q, t.tiles * 16), splits);
  return t;
}
// Two blocks for each multiprocessor of a large GPU, and parts of eight steps and more. From the shape alone, as in
// split_sum.h.
inline int grouped_mma_splits(const ConvShape& s) {
  const GroupedMmaSums t = grouped_mma_sums(s, 1);
  const int64_t steps = s.N * ceil_div<int64_t>(s.Q, t.tiles * 16) * ceil_div(t.down, t.pairs);
  const int64_t most = ceil_div<int64_t>(264, ceil_div<int64_t>(s.C, 64));
  return static_cast<int>(std::clamp<int64_t>(steps / 8, 1, most));
}

}  // namespace sepconv::cuda
