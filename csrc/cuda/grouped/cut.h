// How grouped.cu and grouped_grad_weight.cu cut their work, as pure functions of the shape.
#pragma once

#include <algorithm>

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

}  // namespace sepconv::cuda
