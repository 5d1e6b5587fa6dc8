// Depthwise convolution of float32 over dense NHWC images, with a weight packed once and the sums of every channel.
//
// Loop-to-data map. A task has some rows of an image, or some of its channels where their sums are wanted, and goes
// down its rows by bands, so that a band's input rows stay in the second-level cache while one vector of channels after
// another passes over them: depthwise_rows_simd.h.
//
// Floor: R x S multiply-adds an output at the rate of the registers, or the bytes of x and y.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/depthwise/depthwise_rows.cpp"
#include "cpu/depthwise/depthwise_rows.h"

#include "cpu/pointwise/product_shared.h"

namespace sepconv::cpu {

struct RowsCall {
  int64_t N, C;
  const DepthwiseShape& shape;
  Pixels x;
  const float* packed;
  const Epilogue& epilogue;
  Written y;
  float* sums;
};

}  // namespace sepconv::cpu

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void depthwise_pack(int64_t C, int64_t R, int64_t S, const float* w, const Strides& strides, float* packed) {
  for (int64_t c = 0; c < C; c += kDepthwiseLanes) {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t s = 0; s < S; ++s, packed += kDepthwiseLanes) {
        const float* from = w + c * strides.n + r * strides.h + s * strides.w;
        for (int64_t i = 0; i < kDepthwiseLanes; ++i) packed[i] = c + i < C ? from[i * strides.n] : 0.0f;
      }
    }
  }
}

void depthwise_rows_forward(int64_t N, int64_t C, const DepthwiseShape& shape, Pixels x, const float* packed,
                            const Epilogue& epilogue, Written y, float* sums) {
  if (N * C * shape.P * shape.Q == 0) return;
  const RowsCall call{N, C, shape, x, packed, epilogue, y, sums};
  SEPCONV_BEST_ISA(run)(call);
}

void depthwise_rows(const DepthwiseRows& rows, int64_t p0, int64_t p1) {
  SEPCONV_BEST_ISA(rows_of_channels)(rows, p0, p1);
}

void depthwise_bands(const DepthwiseRows& rows, int64_t p0, int64_t p1) {
  SEPCONV_BEST_ISA(bands_of_channels)(rows, p0, p1);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/pointwise/product_simd.h"

#include "cpu/depthwise/depthwise_rows_simd.h"

inline constexpr int64_t kBandBytes = 256 << 10;  // of a band's input rows

// Output rows [p0, p1), band after band.
inline void bands_of_channels(const DepthwiseRows& rows, int64_t p0, int64_t p1) {
  const int64_t row = rows.shape->stride_h * rows.shape->W * rows.channels * int64_t{sizeof(float)};
  const int64_t band = std::max<int64_t>(2, kBandBytes / std::max<int64_t>(row, 1));
  for (int64_t p = p0; p < p1; p += band) rows_of_channels(rows, p, std::min(p + band, p1));
}

struct RowsTask {
  const RowsCall& call;
  int64_t row_parts, channel_parts;

  void operator()(int64_t task) const {
    const DepthwiseShape& s = call.shape;
    const int64_t n = task / (row_parts * channel_parts);
    const Part strip(s.P, row_parts, task / channel_parts % row_parts);
    const Part part(call.C, channel_parts, task % channel_parts, std::max(kDepthwiseLanes, s.group));
    const float* bias = static_cast<const float*>(call.epilogue.bias);
    DepthwiseRows rows{};
    rows.shape = &s, rows.channels = part.end - part.begin, rows.activation = call.epilogue.activation;
    rows.x_pixel = call.x.pitch, rows.x_row = s.W * rows.x_pixel, rows.ring = s.H;
    rows.x = call.x.data + n * s.H * rows.x_row + part.begin;
    rows.y_pixel = call.y.pitch, rows.y_row = s.Q * rows.y_pixel;
    rows.y = call.y.data + n * s.P * rows.y_row + part.begin;
    rows.packed = call.packed + part.begin * s.R * s.S * s.group;
    rows.bias = bias == nullptr ? nullptr : bias + part.begin;
    if (call.sums != nullptr) {
      rows.sums = call.sums + n * call.C + part.begin;
      std::fill_n(rows.sums, rows.channels, 0.0f);
    }
    rows.far = s.H * s.W * call.C * int64_t{sizeof(float)} > kNearImage;
    bands_of_channels(rows, strip.begin, strip.end);
  }
};

inline void run(const RowsCall& call) {
  const DepthwiseShape& s = call.shape;
  const int64_t threads = parts_of(call.N * call.C * s.P * s.Q * s.R * s.S * s.group);
  RowsTask task{call, 1, 1};
  if (call.N % threads != 0) {
    if (call.sums != nullptr) {
      task.channel_parts = std::min(threads, ceil_div(call.C, std::max(kDepthwiseLanes, s.group)));
    } else {
      task.row_parts = std::min(threads, s.P);
    }
  }
  parallel(call.N * task.row_parts * task.channel_parts, task);
}

#endif
