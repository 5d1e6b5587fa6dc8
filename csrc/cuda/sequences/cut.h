// How the causal kernels cut their work, as pure functions of the shape.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/causal_shape.h"

namespace sepconv::cuda {

inline constexpr int kCausalThreads = 128;
inline constexpr int64_t kCausalLimit = kNarrowLimit - 4096;  // of sizes and of blocks

// ---- causal_update.cu: a thread has one channel of one sequence. As many inputs as this it keeps in registers.
inline constexpr int kUpdateHeld = 8;

struct CausalUpdateCut {
  bool runs = false;          // else the numbers are too large for the kernel
  bool in_registers = false;  // else every tap is loaded when it is needed
  int64_t blocks = 0;
};

inline CausalUpdateCut causal_update_cut(const CausalUpdateShape& s, bool ring) {
  CausalUpdateCut cut;
  cut.blocks = s.N * ceil_div(s.C, kCausalThreads);
  cut.runs = std::max({cut.blocks, s.N, s.C, s.T, s.S + s.reach(), s.length, s.length + s.T}) < kCausalLimit;
  cut.in_registers = s.dilation == 1 && (ring ? s.reach() : s.length) <= kUpdateHeld;
  return cut;
}

}  // namespace sepconv::cuda
