// One output of a depthwise convolution of stride 1, tap by tap: for the few that a kernel on tensor cores cannot give.
// Its products with zeros beside a filter's row make a NaN of an infinite x that no tap of the output meets.
#pragma once

#include "cuda/device/common.cuh"

namespace sepconv::cuda {

// x is grad_y in grad_input, and the filter is then read from its last tap to its first.
struct SingleOutput {
  int x_h, w_h, w_w;  // strides, in elements
  int H, W, R, S, pad_h, pad_w;
  bool turned;
  // x and w point to the channel's plane and filter; `sum` is the bias.
  template <typename T>
  __device__ __forceinline__ T compute(const T* __restrict__ x, const T* __restrict__ w, float sum,
                                       Activation activation, int p, int q) const {
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      const int h = p - pad_h + r;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(H)) continue;
#pragma unroll 1
      for (int s = 0; s < S; ++s) {
        const int column = q - pad_w + s;
        if (static_cast<unsigned>(column) >= static_cast<unsigned>(W)) continue;
        const int tap = (turned ? R - 1 - r : r) * w_h + (turned ? S - 1 - s : s) * w_w;
        sum += to_acc(x[static_cast<int64_t>(h) * x_h + column]) * to_acc(w[tap]);
      }
    }
    return from_acc<T>(activate_as<T>(activation, sum));
  }
};

}  // namespace sepconv::cuda
