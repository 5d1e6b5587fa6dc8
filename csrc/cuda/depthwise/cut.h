// How the depthwise kernels of any layout cut their work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arithmetic.h"

namespace sepconv::cuda {

// depthwise_direct.cu
struct DirectCut {
  int vec = 1;        // channels that a thread moves at once
  bool wide = false;  // 64-bit indices

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("wide", cut.wide);
  }
};

// depthwise_grad_weight.cu
struct GradWeightCut {
  int vec = 1;     // channels of a thread
  int rows = 1;    // that a thread walks down
  int lanes = 1;   // channel vectors of a block
  int splits = 1;  // partial sums

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("rows", cut.rows);
    field("lanes", cut.lanes);
    field("splits", cut.splits);
  }
};

// depthwise_grad_weight_nhwc.cu, _nhwc_mma.cu and _nchw.cu: rows of grad_y of all places, one after the other.
struct GradWeightRowsCut {
  int vec = 1;     // above 1: copies of whole 16-byte pieces
  int rows = 1;    // of a split
  int splits = 1;  // partial sums

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("rows", cut.rows);
    field("splits", cut.splits);
  }
};

// ---- depthwise_grad_weight_nhwc.cu and depthwise_grad_weight_nchw.cu: a thread works on this many neighbouring
// columns of grad_y. The usual planes of 7, 14, 28, 56, 112 columns are whole multiples.
inline constexpr int kGradWeightColumns = 7;

// How the rows of grad_y of all places, one after the other, are cut: `rows` in a split, so that about `blocks` blocks
// run, no fewer than four rows each (the first of them wait for memory), and whole images where that makes little
// difference. A sum so short that a second kernel would take longer stays whole.
struct GradWeightRows {
  int rows, splits;
};
inline GradWeightRows grad_weight_rows(int64_t chunks, int64_t places, int64_t P, int64_t blocks) {
  constexpr int64_t kWhole = 16, kLeast = 4;
  const int64_t total = std::max<int64_t>(places * P, 1);
  int64_t rows = std::max(ceil_div(total, std::max<int64_t>(blocks / chunks, 1)), kLeast);
  if (total <= kWhole) rows = total;
  if (const int64_t whole = ceil_div(rows, P) * P; 8 * whole <= 9 * rows) rows = whole;
  return {static_cast<int>(rows), static_cast<int>(ceil_div(total, rows))};
}

}  // namespace sepconv::cuda
