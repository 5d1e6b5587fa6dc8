// The doors of depthwise convolutions of float32 over dense NHWC images, with a weight packed once and the sums of
// every channel: raw memory in, raw memory out; results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/conv_shape.h"

namespace sepconv::cpu {

struct DepthwiseShape {
  int64_t H = 0, W = 0, P = 0, Q = 0, R = 0, S = 0;
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
};

// A weight packed once: [C, R, S] -> [ceil(C / kDepthwiseLanes), R, S, kDepthwiseLanes], zero beyond C, the same for
// every instruction set. `w` has the strides of a weight [C, 1, R, S].
inline constexpr int64_t kDepthwiseLanes = 16;
constexpr int64_t depthwise_packed_floats(int64_t C, int64_t R, int64_t S) {
  return (C + kDepthwiseLanes - 1) / kDepthwiseLanes * kDepthwiseLanes * R * S;
}
void depthwise_pack(int64_t C, int64_t R, int64_t S, const float* w, const Strides&, float* packed);

// y = activation(depthwise(x) + bias); x [N, H, W, C] and y [N, P, Q, C] are dense. `sums`, where it is not null, gets
// the sum of every channel of y over each image's pixels: [N, C].
void depthwise_rows_forward(int64_t N, int64_t C, const DepthwiseShape&, const float* x, const float* packed,
                            const Epilogue&, float* y, float* sums = nullptr);

}  // namespace sepconv::cpu
