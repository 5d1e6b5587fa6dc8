// How a sum over pixels is split among blocks, for every grad_weight.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sepconv::cuda {

// ---- the first stage of grad_weight: how many parts the sum over the output pixels is cut into. Enough to fill a
// large GPU a few times over, and never so many that a part is shorter than what its threads cover in a few steps. The
// answer depends on the shape alone, so that the order of the additions, and with it every bit of the result, is the
// same on every device.
inline constexpr int64_t kGradWeightBlocks = 1024;

inline int grad_weight_splits(int64_t blocks_a_split, int64_t pixels, int64_t least_pixels_a_split) {
  const int64_t wanted = (kGradWeightBlocks + blocks_a_split - 1) / std::max<int64_t>(blocks_a_split, 1);
  return static_cast<int>(std::clamp<int64_t>(pixels / least_pixels_a_split, 1, std::max<int64_t>(wanted, 1)));
}

// Kernels for which nothing else is chosen.
struct SplitsCut {
  int splits = 1;  // grad_weight: partial sums

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("splits", cut.splits);
  }
};

}  // namespace sepconv::cuda
