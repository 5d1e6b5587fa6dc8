// How small planes lie in scratch memory: for small_planes.cpp and small_planes_grad_weight.cpp.
#pragma once

#include "planes.h"

namespace sepconv::cpu {

// Planes in scratch memory. Padded position u of an axis is number u / stride of phase u % stride.
struct Frame {
  int64_t rows, columns, stride;  // of the image
  int64_t top, left;              // padding
  int64_t pitch;                  // from one column phase to the next
  int64_t row_step, row_phase;    // from one row to the next, from one row phase to the next
  int64_t shift;                  // numbers before the first one, so that rows are stored at aligned addresses
  int64_t size;

  // For reading `out_rows` x `out_columns` from any of the first `taps` positions of each phase on.
  Frame(int64_t image_rows, int64_t image_columns, int64_t step, int64_t pad_h, int64_t pad_w, int64_t taps_h,
        int64_t taps_w, int64_t out_rows, int64_t out_columns, int64_t lanes)
      : rows(image_rows), columns(image_columns), stride(step), top(pad_h), left(pad_w) {
    const int64_t begin = ceil_div(left, stride), stored = round_up(ceil_div(columns, stride), lanes);
    pitch = round_up(std::max(begin + stored, round_up(out_columns, lanes) + taps_w - 1), lanes);
    row_step = pitch * stride;
    row_phase = row_step * std::max(ceil_div(top + rows, stride), out_rows + taps_h - 1);
    shift = round_up(left / stride, lanes) - left / stride;
    size = row_phase * stride;
  }
  int64_t scratch(int64_t planes, int64_t lanes) const { return round_up(shift + planes * size + lanes, lanes); }
};

inline constexpr int64_t kScratch = 24 << 10;  // bytes of planes that are copied before any is computed
inline constexpr int64_t kMaxBatch = 8;        // planes, likewise
inline constexpr int64_t kMaxTasks = 64;

// Tasks of about 50 microseconds, by the shape alone.
inline int64_t small_planes_tasks(const ConvShape& s, int64_t units) {
  const int64_t products = s.output_elements() * s.R * s.S;
  return std::clamp<int64_t>(products >> 20, 1, std::min(units, kMaxTasks));
}

}  // namespace sepconv::cpu
