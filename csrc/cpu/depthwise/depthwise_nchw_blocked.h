// Planes in blocks of channels: for depthwise_nchw_blocked.cpp and depthwise_nchw_blocked_grad_weight.cpp.
//
// On planes of 7x7 or 10x10 a vector along a row is mostly padding, and a strided row has to be taken apart. So the
// planes of as many channels as a vector has lanes are turned, in registers, into a tile of pixels x channels, [row,
// column, lane], which stays in cache: there every tap of every pixel is a whole vector at an aligned address.
// (oneDNN's blocked layouts are the same idea, but are written to memory.)
#pragma once

#include "cpu/grouped/grouped_planes.h"

namespace sepconv::cpu {

// Along one axis, out positions first, first + out_step, ...: `count` of them. Number t reads the in positions in_first
// + t * in_step + i * tap_step for i in [0, taps), by the filter's taps index + i * index_step. As in grouped_planes.h,
// a forward map has one such class, and the gradient by the input of a strided one has one for each remainder; but a
// strided input has no phases here.
struct Reach {
  int64_t first, count, out_step;
  int64_t in_first, in_step;
  int64_t taps, tap_step;
  int64_t index, index_step;

  int64_t last_read() const { return in_first + (count - 1) * in_step + (taps - 1) * tap_step; }
};

inline std::vector<Reach> forward_reach(int64_t taps, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
  return {{0, out, 1, -pad, stride, taps, dilation, 0, 1}};
}

// Pixel u meets grad_y's (u + pad - r * dilation) / stride for the taps r for which that is exact. One of stride and
// dilation is 1.
inline std::vector<Reach> grad_input_reach(int64_t taps, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
  std::vector<Reach> classes;
  for (int64_t first = 0; first < std::min(stride, out); ++first) {
    const int64_t least = (first + pad) % stride, count = std::max<int64_t>(0, (taps - 1 - least + stride) / stride);
    const int64_t last = least + (count - 1) * stride;
    classes.push_back({first, (out - 1 - first) / stride + 1, stride, (first + pad - last * dilation) / stride, 1,
                       count, dilation, std::max<int64_t>(last, 0), -stride});
  }
  return classes;
}

// Rows of pixels in a tile, with columns of zeros around them.
struct BlockedTile {
  int64_t rows, columns;        // with those zeros
  std::vector<int32_t> places;  // of the pixels, in the order of a plane: vectors from the tile's begin

  BlockedTile(int64_t pixel_rows, int64_t pixel_columns, int64_t before, int64_t after)
      : rows(pixel_rows), columns(before + pixel_columns + after) {
    for (int64_t h = 0; h < rows; ++h) {
      for (int64_t w = 0; w < pixel_columns; ++w) places.push_back(static_cast<int32_t>(h * columns + before + w));
    }
  }
  int64_t size() const { return rows * columns; }
};

// Tasks of about 10 microseconds, in fours where there are several, so that threads get equal shares. No result depends
// on their number.
inline int64_t blocked_tasks(const ConvShape& s, int64_t units) {
  const int64_t tasks = s.output_elements() * (s.R * s.S + 9) >> 20;
  return std::min(units, tasks <= 1 ? 1 : std::min<int64_t>(round_up(tasks, 4), 64));
}

}  // namespace sepconv::cpu
