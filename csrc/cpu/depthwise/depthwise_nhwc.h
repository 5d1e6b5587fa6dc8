// The correlation over one NHWC image that depthwise_nhwc.cpp is made of, for kernels that have a depthwise stage.
// Compiled there, for each instruction set; every function here takes the one in use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "cpu/simd/storage.h"

namespace sepconv::cpu {

//   y[p, q] = activation(bias + sum over r, s of
//                        w[r, s] * x[p * stride_h - pad_h + r * dilation_h, q * stride_w - pad_w + s * dilation_w])
//
// for all channels. Rows and pixels lie apart as the strides say (x_row, x_pixel, y_row, y_pixel, in elements), and
// those of x may also be one and the same (0); the pads may be negative.
template <typename T>
struct Correlation {
  using A = accumulate_t<T>;
  const T* x;     // [H, W, C]
  T* y;           // [P, Q, C]
  const A* w;     // [channel groups, R, S, group], see pack()
  const A* bias;  // [channel groups, group]
  Activation activation = kNoActivation;
  int64_t C, H, W, P, Q, R, S;
  int64_t x_row, x_pixel, y_row, y_pixel;
  int64_t stride_h = 1, stride_w = 1, pad_h, pad_w, dilation_h = 1, dilation_w = 1;
};

// The channels that a block function takes at a time: `width` of them, one or two vectors. The last group overlaps
// the one before it; fewer than kLanes are one group, with zeros behind them.
struct ChannelGroups {
  int64_t channels, width;
  int64_t count() const { return (channels + width - 1) / width; }
  int64_t padded() const { return count() * width; }
  int64_t first(int64_t group) const { return std::max<int64_t>(std::min(group * width, channels - width), 0); }
};

// The part of a correlation that one call of a block function computes: output rows [p0, p1), columns from q (`count`
// of them are stored), channel groups [v0, v1), and of the filter the taps from s0 on, as many as the function is
// made for. Where the kernel row is longer than that, `partial` [p1 - p0, v1 - v0, columns, width] carries the sums
// from call to call.
template <typename A>
struct NhwcBlock {
  int64_t p0, p1, q, v0, v1;
  int count;
  int64_t s0 = 0;
  bool last = true;
  A* partial = nullptr;
  int64_t x_ahead = 0, y_ahead = 0;  // from this block's memory to the next block's, in elements
};

// The block functions for a correlation. A kernel row longer than a pass takes several, of `taps` or taps - 1 taps.
template <typename T>
struct NhwcKernel {
  using Function = void (*)(const Correlation<T>&, const NhwcBlock<accumulate_t<T>>&);
  struct Functions {
    Function wide = nullptr, wide_guarded = nullptr, narrow = nullptr;
  };
  Functions longer, shorter;  // for passes of `taps`, and of one tap less
  int64_t passes = 1, taps = 0;
  ChannelGroups groups;

  NhwcKernel(int64_t C, int64_t S, int64_t stride, int64_t dilation);
  bool generic() const { return longer.wide == nullptr; }
};

// Output rows [p0, p1).
template <typename T>
void correlate(const Correlation<T>&, const NhwcKernel<T>&, int64_t p0, int64_t p1);

// The forward convolution of the first image. `packed` comes to hold the weight and the bias that it refers to.
template <typename T>
Correlation<T> forward_correlation(const ConvShape&, const T* x, const T* w, const Epilogue&, const ChannelGroups&,
                                   std::vector<accumulate_t<T>>& packed, T* y);

}  // namespace sepconv::cpu
