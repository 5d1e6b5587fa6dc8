// One grouped 2-D convolution in plain numbers: what every kernel, on every device, is told about its tensors.
//
//   y[n, k, p, q] = sum over c, r, s of  x[n, c, h, w] * weight[k, c', r, s]
//       where h = p * stride_h + r * dilation_h - pad_h,  w = q * stride_w + s * dilation_w - pad_w
//
// where k belongs to group k / (K / groups), c runs over the C / groups input channels of that group, c' is its index
// inside the group, and x is zero outside the image. The bottom and right padding are not stored: P and Q imply them.
//
// No torch header is seen here: kernels include this file and nothing of torch.
#pragma once

#include <cstdint>

namespace sepconv {

enum class DType : int { float32, float64, float16, bfloat16 };

// The three bilinear maps: C(x, w), its gradient by x, its gradient by w.
enum class Map : int { forward, grad_input, grad_weight };

// How the four dimensions of a tensor lie in memory.
//   nchw: the last dimension is dense (stride 1), rows and planes follow without gaps
//   nhwc: the channel dimension is dense ("channels_last"), pixels and rows follow without gaps
//   strided: anything else
enum class Layout : int { nchw, nhwc, strided };

// Strides in elements, in the order of the logical dimensions: (N, C, H, W) for an image, (K, C / groups, R, S) for a
// weight.
struct Strides {
  int64_t n = 0, c = 0, h = 0, w = 0;
};

struct ConvShape {
  int64_t N = 0, C = 0, H = 0, W = 0;  // input
  int64_t K = 0, R = 0, S = 0;         // weight [K, C / groups, R, S]
  int64_t P = 0, Q = 0;                // output rows and columns
  int64_t groups = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;  // at the top and at the left
  int64_t dilation_h = 1, dilation_w = 1;
  Strides x, w, y;  // input (or its gradient), weight (or its gradient), output (or its gradient)

  int64_t channels_per_group() const { return C / groups; }
  int64_t outputs_per_group() const { return K / groups; }
  bool is_depthwise() const { return groups == C; }  // any multiplier K / C
  // A 1x1 kernel without padding: a matrix product over pixels, subsampled where the stride is not 1.
  bool is_pointwise() const { return R == 1 && S == 1 && groups == 1 && pad_h == 0 && pad_w == 0; }
  int64_t input_elements() const { return N * C * H * W; }
  int64_t weight_elements() const { return K * channels_per_group() * R * S; }
  int64_t output_elements() const { return N * K * P * Q; }
};

// The two filters of a spatially separable convolution, whose shape is a depthwise ConvShape of stride 1 with K = C: R
// numbers down a column and S along a row for each channel, dense. The distance from one channel's filter to the next
// is 0 where one filter serves them all.
struct SpatialFilters {
  const void *column, *row;
  int64_t column_channel, row_channel;
};

// The layout of an image whose dimensions are (N, channels, rows, columns). A dimension of size 1 has no say, so a
// tensor may be both; nchw is then the answer.
inline Layout image_layout(int64_t channels, int64_t rows, int64_t columns, int64_t batch, const Strides& s) {
  const auto dense = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
  if (dense(columns, s.w, 1) && dense(rows, s.h, columns) && dense(channels, s.c, rows * columns) &&
      dense(batch, s.n, channels * rows * columns)) {
    return Layout::nchw;
  }
  if (dense(channels, s.c, 1) && dense(columns, s.w, channels) && dense(rows, s.h, columns * channels) &&
      dense(batch, s.n, rows * columns * channels)) {
    return Layout::nhwc;
  }
  return Layout::strided;
}

inline Layout input_layout(const ConvShape& shape) { return image_layout(shape.C, shape.H, shape.W, shape.N, shape.x); }
inline Layout output_layout(const ConvShape& shape) {
  return image_layout(shape.K, shape.P, shape.Q, shape.N, shape.y);
}

}  // namespace sepconv
