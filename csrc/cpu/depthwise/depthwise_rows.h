// The doors of depthwise convolutions of float32 over NHWC images, and of those in groups of a few channels that make
// as many, with a weight packed once and the sums of every channel: raw memory in, raw memory out; results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/pixels.h"

namespace sepconv::cpu {

struct DepthwiseShape {
  int64_t H = 0, W = 0, P = 0, Q = 0, R = 0, S = 0;
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  int64_t group = 1;  // channels of a group
};
// Groups whose channels fill vectors, or vectors that are filled by groups.
constexpr bool depthwise_rows_can(int64_t group) {
  return group == 1 || group == 2 || group == 4 || group == 8 || group % 16 == 0;
}

// A weight packed once: [C, R, S] -> [ceil(C / kDepthwiseLanes), R, S, kDepthwiseLanes], zero beyond C, the same for
// every instruction set. `w` has the strides of a weight [C, 1, R, S]. Of groups: [C, group, R, S] ->
// [ceil(C / kDepthwiseLanes), R, S, group, kDepthwiseLanes], of `group` times the size.
inline constexpr int64_t kDepthwiseLanes = 16;
constexpr int64_t depthwise_packed_floats(int64_t C, int64_t R, int64_t S) {
  return (C + kDepthwiseLanes - 1) / kDepthwiseLanes * kDepthwiseLanes * R * S;
}
void depthwise_pack(int64_t C, int64_t R, int64_t S, const float* w, const Strides&, float* packed);

// y = activation(depthwise(x) + bias); x [N, H, W, C] and y [N, P, Q, C]. `sums`, where it is not null, gets the sum of
// every channel of y over each image's pixels: [N, C].
void depthwise_rows_forward(int64_t N, int64_t C, const DepthwiseShape&, Pixels x, const float* packed, const Epilogue&,
                            Written y, float* sums = nullptr);

// Some channels of one image, for kernels that have a depthwise stage.
struct DepthwiseRows {
  const float* x;  // the image, or a ring that holds its row h at h % ring
  int64_t ring;    // rows; of an image at least H
  int64_t x_row, x_pixel;
  float* y;  // its row 0
  int64_t y_row, y_pixel;
  const float* packed;  // [ceil(channels / kDepthwiseLanes)][R][S][group][kDepthwiseLanes]
  const float* bias;    // [channels], or null
  Activation activation;
  float* sums;  // [channels], to which each row's sum of activated outputs is added; or null
  int64_t channels;
  const DepthwiseShape* shape;
  bool far = false;  // x is larger than a near cache: the rows that come next are fetched
};
inline constexpr int64_t kNearImage = 256 << 10;  // bytes of an image that is not far

// Output rows [p0, p1), by the calling thread. `bands`: so many at a time that their input stays in a near cache.
void depthwise_rows(const DepthwiseRows&, int64_t p0, int64_t p1);
void depthwise_bands(const DepthwiseRows&, int64_t p0, int64_t p1);

}  // namespace sepconv::cpu
