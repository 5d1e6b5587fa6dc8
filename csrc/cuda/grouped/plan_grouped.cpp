// Groups of several channels: tensor cores in channels_last, and the kernel that takes any. The limits are predictions
// (benchmarks/notes/grouped.md).
#include <algorithm>

#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

constexpr int64_t kBlocksByRegisters = 2;

int most_tiles(Map map, const ConvShape& s) { return map == Map::forward && s.stride_h == 2 ? 2 : 4; }

// Tiles of columns of equal width; rows enough that every warp has a tile, where shared memory allows.
GroupedMmaCut grouped_mma_cut(Map map, const ConvShape& s, const Device& device) {
  GroupedMmaCut cut;
  const GroupedMmaTile whole = grouped_mma_tile(map, s, cut);
  const int64_t across = ceil_div<int64_t>(whole.across, 16), groups = ceil_div<int64_t>(across, most_tiles(map, s));
  cut.tiles = static_cast<int>(ceil_div(across, groups));
  const auto fits = [&] { return grouped_mma_tile(map, s, cut).bytes <= kMostShared; };
  if (cut.tiles < 3 && whole.down > 1) {
    cut.pairs = 2;
    if (!fits()) cut.pairs = 1;
  }
  const int64_t slabs = ceil_div<int64_t>(s.C, 64), tiles = ceil_div<int64_t>(whole.across, 16 * cut.tiles);
  const int64_t resident =
      std::clamp<int64_t>(device.tuning().blocks(grouped_mma_tile(map, s, cut).bytes), 1, kBlocksByRegisters);
  const int64_t most = std::max<int64_t>(resident * device.multiprocessors / slabs, 1);
  const int64_t steps = ceil_div<int64_t>(whole.down, cut.pairs);
  cut.strips = static_cast<int>(grouped_mma_strips(steps, s.N * tiles, most));
  const int64_t items = s.N * tiles * cut.strips;
  cut.blocks = static_cast<int>(ceil_div(items, ceil_div(items, most)));
  return cut;
}

}  // namespace

bool grouped_nhwc_mma_can_run(const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  const int64_t group = s.channels_per_group();
  const bool shape = s.groups > 1 && s.K == s.C && (group == 4 || group == 8 || group == 16) && s.R == 3 && s.S == 3 &&
                     s.dilation_h == 1 && s.dilation_w == 1 && s.stride_h == s.stride_w &&
                     (s.stride_h == 1 || s.stride_h == 2);
  return shape && is_half(dtype) && device.compute_capability >= 80 && whole_vectors(s, 8, dtype, alignment) &&
         narrow_images(s) && s.N * std::max(s.P * s.Q, s.H * s.W) < kNarrowLimit;
}

Plan plan_grouped_nhwc_mma(Map map, const ConvShape& s, const Device& device) {
  Plan p{Kernel::grouped_nhwc_mma, "cuda_grouped_nhwc_mma",
         "groups of 4 to 16 channels of a half type in channels_last: tensor cores, rows read once", NoCut{}, 0};
  if (map == Map::grad_weight) {
    const SplitsCut cut{grouped_mma_splits(s)};
    p.cut = cut, p.workspace_bytes = cut.splits * s.weight_elements() * int64_t{sizeof(float)};
  } else {
    p.cut = grouped_mma_cut(map, s, device);
  }
  return p;
}

Plan plan_grouped(Map map, const ConvShape& s, DType dtype, const char* reason) {
  Plan p{Kernel::grouped, "cuda_grouped", reason, SplitsCut{}, 0};
  if (map == Map::grad_weight) {
    const SplitsCut cut{grouped_grad_weight_splits(s)};
    p.cut = cut, p.workspace_bytes = cut.splits * s.weight_elements() * acc_size(dtype);
  } else {
    p.workspace_bytes = grouped_workspace_bytes(s, dtype, map == Map::grad_input);
  }
  return p;
}

}  // namespace sepconv::cuda
