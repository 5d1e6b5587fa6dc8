// The frame of an image as strips: the tables of borders.cpp.
//
// Forward and grad_input are one gather, in which an output meets taps that each read one position of the other image:
//   forward      output o, tap t    reads x at source(o * stride + t * dilation - pad)
//   grad_input   pixel i, tap t     reads grad_y at (i' + pad - t * dilation) / stride, where whole, for i' = i and for
//   every
//                                   position in the padding at which pixel i stands
// Along each axis the list of (position, tap) is the same, but for a shift, for all positions far from the ends; only
// the few near the ends have lists of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/padding_mode.h"

namespace sepconv::cpu {

// A tap of the filter and the position that it reads.
struct ReadTap {
  int64_t position, tap;
};

// The lists of one axis. Positions from `first` to `last` - 1 are regular: those `period` apart share a list, and the
// position read moves by `step` from one to the next.
struct GatherAxis {
  int64_t size = 0;  // positions written
  Ends frame;
  int64_t first = 0, last = 0, period = 1, step = 1;
  std::vector<std::vector<ReadTap>> before, regular, after;

  static GatherAxis forward(const PaddedAxis& axis);
  static GatherAxis grad_input(const PaddedAxis& axis);

  const std::vector<ReadTap>& list(int64_t i) const {
    if (i < first) return before[i];
    return i < last ? regular[(i - first) % period] : after[i - last];
  }
};

// `count` positions in a row or a column of the image that is written, `out_step` apart in memory: what tap j of
// position i reads lies at taps[j].position + i * in_step, and its weight at taps[j].tap of the dense [R, S] filter.
struct Strip {
  int64_t out, count, in_step, out_step;
  std::vector<ReadTap> taps;
};

// `count` products of grad_y and x, each at a distance from the one before.
struct ProductRun {
  int64_t y, x, count, y_step, x_step;
};

// The products of tap (r, s) whose pixel lies in the padding, of one image and channel; offsets in elements.
std::vector<ProductRun> padding_products(const PaddedAxes&, int64_t r, int64_t s, const Strides& x, const Strides& y);

// All strips of the frame, each position once; or those that are left when `sides` has the columns of its frame, from
// top to bottom. Offsets in elements, for these strides of the image read and that written.
std::vector<Strip> frame_strips(const GatherAxis& rows, const GatherAxis& columns, int64_t taps_a_row,
                                const Strides& in, const Strides& out, bool sides);

// The sides of a frame, where rows have stride 1, as sums down columns: the columns that they read are copied, each
// with its padding, so that a vector holds neighbouring rows.
struct Sides {
  struct Tap {
    int64_t copy, offset, tap;  // sum i reads number offset + i of that copy
  };
  struct Side {
    int64_t out;  // the column written, in elements
    std::vector<Tap> taps;
  };
  struct Image {
    int64_t row, sum;  // a sum that is added to that of a row
  };
  std::vector<int64_t> columns;  // that are copied, in elements
  std::vector<int64_t> rows;     // of a copy, in elements; -1 is a zero
  int64_t sums = 0;              // down a column
  int64_t written = 0, own = 0;  // row i of `written` is sum own + i
  std::vector<Image> images;     // sums in the padding
  std::vector<Side> sides;

  static Sides forward(const PaddedAxes&, const GatherAxis& columns, const Strides& in, const Strides& out);
  static Sides grad_input(const PaddedAxes&, const GatherAxis& columns, const Strides& in, const Strides& out);

 private:
  // Row 0 of the filter reads `first` numbers below the sum, and each further row `step` more.
  void add_sides(const PaddedAxes&, const GatherAxis& columns, int64_t first, int64_t step, const Strides& in,
                 const Strides& out);
};

}  // namespace sepconv::cpu
