// How depthwise_toeplitz*.cu cut their work, as pure functions of the shape.
#pragma once

#include <algorithm>

#include "core/conv_shape.h"

namespace sepconv::cuda {

struct ToeplitzCut {
  int vec = 1;     // columns that a thread stores at once
  int rows = 1;    // of a place, of what is written (grad_weight: of grad_y)
  int images = 1;  // of a place
  int splits = 1;  // parts that the places go in

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("rows", cut.rows);
    field("images", cut.images);
    field("splits", cut.splits);
  }
};

// The two copies of a short row in shared memory, in elements. Words of both that a warp reads at once, seven of each,
// have different banks.
constexpr int toeplitz_copy_length(int steps) { return 16 * steps + 8; }
constexpr int toeplitz_copy_gap(int steps) { return steps == 3 ? 24 : steps == 4 ? 8 : 0; }
constexpr int toeplitz_row_elements(int steps) { return 2 * toeplitz_copy_length(steps) + toeplitz_copy_gap(steps); }

// ---- depthwise_toeplitz.cu
// Steps of 16 columns that the window of 8 neighbouring outputs takes; those that there are kernels for.
inline int toeplitz_steps(int64_t S) {
  const int64_t steps = (S + 7 + 15) / 16;
  return static_cast<int>(steps == 4 ? 5 : steps);
}
inline constexpr int64_t kToeplitzTaps = 73;  // along a row

// Tiles of 8 output columns that a warp works on: what leaves the fewest columns over, and then the most.
inline int toeplitz_tiles(int64_t Q) {
  int best = 1;
  for (const int tiles : {2, 4, 7}) {
    const auto covered = [Q](int64_t columns) { return (Q + columns - 1) / columns * columns; };
    if (covered(8 * tiles) <= covered(8 * best)) best = tiles;
  }
  return best;
}

// grad_weight: steps of 16 columns of x that meet a tile of columns of grad_y, likewise.
constexpr int toeplitz_grad_columns(int steps) { return 16 * steps - 8; }
inline int toeplitz_grad_steps(int64_t Q) {
  int best = 1;
  for (const int steps : {2, 3, 4}) {
    const auto work = [Q](int n) {
      const int64_t columns = toeplitz_grad_columns(n);
      return (Q + columns - 1) / columns * n;
    };
    if (work(steps) <= work(best)) best = steps;
  }
  return best;
}
// grad_weight: 16 x 16 taps a block, else 32 x 32.
constexpr bool toeplitz_few_taps(int64_t R, int64_t S) { return R <= 16 && S <= 16; }
inline int64_t toeplitz_sections(int64_t R, int64_t S) {
  return toeplitz_few_taps(R, S) ? 1 : (R + 31) / 32 * ((S + 31) / 32);
}

}  // namespace sepconv::cuda
