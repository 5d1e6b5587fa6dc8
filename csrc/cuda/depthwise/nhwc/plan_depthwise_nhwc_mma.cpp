// The plan of depthwise forward and grad_input, channels_last, on tensor cores (depthwise_nhwc_mma.cu).
#include <limits>

#include "cuda/plan_parts.h"

namespace sepconv::cuda {

// Not 3x3: that is bound by memory in plain arithmetic too.
bool nhwc_mma_can_run(const ConvShape& s, DType dtype, const Device& device) {
  constexpr int64_t kTaps = 7;
  return is_half(dtype) && device.compute_capability >= 80 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.R <= kTaps && s.S <= kTaps && (s.R != 3 || s.S != 3) &&
         s.N * std::max(s.P * s.Q, s.H * s.W) < kNarrowLimit;
}

// Each block has a stream of every `splits`-th place: a time of its batches of rows, and of what it does before the
// first. A multiprocessor works off the blocks that it holds as fast as fewer, and more than that one after the other.
// There are as many blocks as the GPU holds at once, or where that comes out uneven, a block for each of few places.
// Images are cut into strips where that leaves fewer multiprocessors without work.
Plan plan_depthwise_nhwc_mma(Map map, const ConvShape& s, const Device& device) {
  const Tuning& tuned = device.tuning();
  NhwcMmaCut cut;
  const NhwcMmaBlock block = nhwc_mma_block(map, s);
  const int64_t rows = std::max<int64_t>(map == Map::forward ? s.P : s.H, 1);
  const int64_t busy = std::max<int64_t>(
      std::min(static_cast<int64_t>(tuned.nhwc_mma_busy) / block.groups, tuned.blocks(block.bytes())), 1);
  const int64_t most = std::max<int64_t>(busy * device.multiprocessors / block.slices, 1);
  constexpr int64_t kFew = 3;  // places of a block
  double least = std::numeric_limits<double>::max();
  int64_t turns = 0;  // with many of them it no longer matters how they come out
  for (int64_t strips = 1, last = 0; strips != last && turns < 8;) {
    const int64_t strip = ceil_div(rows, strips), shared = strip < rows ? s.R - 1 : s.R / 2;
    const int64_t places = block.image_groups * block.column_tiles * ceil_div(rows, strip);
    turns = ceil_div(places, most);
    for (const int64_t each : {turns, turns > kFew ? turns : 1}) {
      const int64_t parts = ceil_div(places, each);
      const int64_t load = std::max(ceil_div(parts * block.slices, device.multiprocessors), busy);
      const auto batches = static_cast<double>(ceil_div(each * (strip + shared) + s.R - 1 - shared, block.rows));
      const double time = static_cast<double>(load) * (tuned.nhwc_mma_begin + batches);
      if (time < least) least = time, cut = {static_cast<int>(strip), static_cast<int>(parts)};
    }
    last = strips;
    strips = std::min(strips + std::max<int64_t>(strips / 3, 1), rows);
  }
  return {
      Kernel::depthwise_nhwc_mma, "cuda_depthwise_nhwc_mma",
      "depthwise up to 7x7 in a half type, stride 1, whole vectors of channels: kernel rows as diagonals, on tensor "
      "cores",
      cut, 0};
}

}  // namespace sepconv::cuda
