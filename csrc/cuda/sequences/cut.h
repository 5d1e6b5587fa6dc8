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
  bool runs = false;  // else the numbers are too large for the kernel
  int64_t held = 0;   // inputs that a channel keeps; more than kUpdateHeld of them stay where they are
  int64_t blocks = 0;
};

inline CausalUpdateCut causal_update_cut(const CausalUpdateShape& s, bool ring) {
  CausalUpdateCut cut;
  cut.blocks = s.N * ceil_div(s.C, kCausalThreads);
  cut.runs = std::max({cut.blocks, s.N, s.C, s.T, s.S + s.reach(), s.length + s.T, s.T * s.x.l, s.T * s.y.l,
                       s.length * s.state.l, s.S * s.w_s}) < kCausalLimit;
  const int64_t inputs = ring ? s.reach() : s.length;
  cut.held = s.dilation == 1 ? inputs : kUpdateHeld + 1;
  return cut;
}

// ---- the forward kernels: taps that have registers of their own, channels or outputs of a thread
inline constexpr int kCausalTaps = 4, kCausalChannels = 4;

struct CausalCut {
  int vec = 1;   // causal_ncl.cu: positions that are moved together, 1 or 16 bytes of them
  int rows = 1;  // causal_nlc.cu: positions of a thread; with the kCausalTaps - 1 before them whole kCausalTaps

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("rows", cut.rows);
  }
};

// Positions that lie a dilation apart are a phase; a strip has `rows` of one.
struct CausalWalk {
  int64_t phases, strips, threads;
};
inline CausalWalk causal_walk(const CausalShape& s, int64_t vec, int64_t rows) {
  const int64_t phases = std::min(s.dilation, s.L), strips = ceil_div(ceil_div(s.L, phases), rows);
  return {phases, strips, s.N * (s.C / vec) * phases * strips};
}

inline bool causal_channels_dense(const CausalShape& s) { return s.C > 1 && s.x.c == 1 && s.y.c == 1; }

}  // namespace sepconv::cuda
