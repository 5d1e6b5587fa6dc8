// How separable.cu and separable_mma.cu cut their work.
#pragma once

#include <cstdint>

namespace sepconv::cuda {

// ---- separable.cu and separable_mma.cu: a chunk of filters stands in shared memory, 8 KB of it in float.
inline constexpr int64_t kSeparableTaps = 64;

struct SeparableCut {
  int columns = 1;  // output channels of a block

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("columns", cut.columns);
  }
};

}  // namespace sepconv::cuda
