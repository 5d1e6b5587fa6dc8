// The depthwise convolution and the 1x1 one after it in a single kernel: what separable.cu (plain arithmetic) and
// separable_mma.cu (tensor cores) share. The intermediate h lives in shared memory only, kDepth of its channels at a
// time:
//
//   y[pixel, k] = sum over chunks of kDepth channels c of  h[pixel, c] * v[k, c],   h = activation(bias + depthwise(x,
//   w))
//
// A block owns kPixels neighbouring output pixels (of all images in a row) and a tile of output channels. For each
// chunk its threads compute h for its pixels, straight from global memory (the windows of neighbours overlap in L1),
// lay it down as the left factor of the product, lay the chunk of v beside it, and multiply.
#pragma once

#include <algorithm>
#include <utility>

#include "core/separable_shape.h"
#include "cuda/device/common.cuh"
#include "cuda/separable/cut.h"

namespace sepconv::cuda::separable {

constexpr int kThreads = 256;
constexpr int kPixels = 64;
constexpr int kDepth = 32;

template <typename T>
struct SeparableArgs {
  const T *x, *w, *w_bias, *v, *v_bias;
  T* y;
  Activation h_activation, y_activation;
  Strides x_strides, y_strides, w_strides;
  int64_t v_n, v_c;
  int H, W, R, S, taps;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  uint32_t pixels;  // N * P * Q
  int channels;     // of h
  int outputs;
  FastDiv by_image, by_row, by_multiplier, by_columns;
  bool v_vectors;  // rows of v can be read in pieces of 16 bytes
  bool y_vectors;  // channels of y are dense, and written in pieces of 16 bytes
};

// How the depthwise stage deals a chunk to the threads: neighbours take neighbouring 16-byte vectors of channels, or
// single channels (both where channels are dense), or neighbouring pixels.
enum class Deal : int { vectors, channels, pixels };

// Where a block's pixels lie: the corner of the window in x, and the pixel in y. Pixels beyond the last have row `far`.
struct PixelTable {
  static constexpr int kFar = 1 << 30;
  int64_t corner[kPixels];  // offset in x of tap (0, 0), which may lie outside the image
  int64_t out[kPixels];     // offset in y
  int row[kPixels], column[kPixels];

  template <typename T>
  __device__ __forceinline__ void fill(const SeparableArgs<T>& a, uint32_t first) {
    for (int i = static_cast<int>(threadIdx.x); i < kPixels; i += kThreads) {
      uint32_t pixel = first + i;
      if (pixel >= a.pixels) {
        row[i] = kFar, column[i] = 0, corner[i] = 0, out[i] = -1;
        continue;
      }
      const int64_t n = a.by_image.split(pixel);
      const int p = static_cast<int>(a.by_row.split(pixel)), q = static_cast<int>(pixel);
      row[i] = p * a.stride_h - a.pad_h;
      column[i] = q * a.stride_w - a.pad_w;
      corner[i] = n * a.x_strides.n + row[i] * a.x_strides.h + column[i] * a.x_strides.w;
      out[i] = n * a.y_strides.n + p * a.y_strides.h + q * a.y_strides.w;
    }
  }
};

// The chunk's filters, [taps, kDepth], in the accumulation type; channels beyond the last are zeros.
template <typename T>
__device__ __forceinline__ void stage_filters(const SeparableArgs<T>& a, acc_t<T>* filters, int first_channel) {
  for (int i = static_cast<int>(threadIdx.x); i < a.taps * kDepth; i += kThreads) {
    const int tap = i / kDepth, c = first_channel + i % kDepth, r = tap / a.S, s = tap - r * a.S;
    const bool exists = c < a.channels;
    filters[i] = exists ? to_acc(a.w[c * a.w_strides.n + r * a.w_strides.h + s * a.w_strides.w]) : acc_t<T>(0);
  }
}

// Computes h for the block's pixels and the chunk's channels. put(pixel, channel of the chunk, values) gets kVec values
// of neighbouring channels, behind bias and activation; zeros where there is no pixel or channel.
template <typename T, Deal kDeal, typename Put>
__device__ __forceinline__ void depthwise_stage(const SeparableArgs<T>& a, const PixelTable& table,
                                                const acc_t<T>* filters, int first_channel, const Put& put) {
  using A = acc_t<T>;
  constexpr int kVec = kDeal == Deal::vectors ? kVec16<T> : 1;
  constexpr int kItems = kPixels * kDepth / kVec;
  static_assert(kItems % kThreads == 0);
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kItems; item += kThreads) {
    const int pixel = kDeal == Deal::pixels ? item % kPixels : item / (kDepth / kVec);
    const int local = kDeal == Deal::pixels ? item / kPixels : item % (kDepth / kVec) * kVec;
    const int channel = first_channel + local, row = table.row[pixel], column = table.column[pixel];
    A sums[kVec] = {};
    if (row < PixelTable::kFar && channel < a.channels) {
      const int64_t x_channel = kDeal == Deal::vectors ? channel : a.by_multiplier.div(channel) * a.x_strides.c;
      const T* const corner = a.x + table.corner[pixel] + x_channel;
      const A* filter = filters + local;
      for (int r = 0; r < a.R; ++r) {
        const int h = row + r * a.dilation_h;
        if (static_cast<unsigned>(h) < static_cast<unsigned>(a.H)) {
          const T* const in = corner + r * a.dilation_h * a.x_strides.h;
#pragma unroll 3
          for (int s = 0; s < a.S; ++s) {
            if (static_cast<unsigned>(column + s * a.dilation_w) >= static_cast<unsigned>(a.W)) continue;
            A value[kVec];
            load_vec<kVec>(value, in + s * a.dilation_w * a.x_strides.w);
#pragma unroll
            for (int i = 0; i < kVec; ++i) sums[i] += value[i] * filter[s * kDepth + i];
          }
        }
        filter += a.S * kDepth;
      }
      if (a.w_bias != nullptr) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sums[i] += to_acc(a.w_bias[channel + i]);
      }
      activate_all<T>(a.h_activation, sums);
    }
    put(pixel, local, sums);
  }
}

// Shared memory that both kernels begin with; the tiles of the product follow, on a 16-byte boundary.
template <typename T>
__host__ __device__ constexpr size_t head_bytes(int taps) {
  return sizeof(PixelTable) + taps * kDepth * sizeof(acc_t<T>);
}

template <typename T>
SeparableArgs<T> make_args(const SeparableShape& shape, const SeparableMemory& m, int columns) {
  const ConvShape &d = shape.depthwise, &p = shape.pointwise;
  SeparableArgs<T> a{};
  a.x = static_cast<const T*>(m.x), a.w = static_cast<const T*>(m.depthwise_weight);
  a.v = static_cast<const T*>(m.pointwise_weight), a.y = static_cast<T*>(m.y);
  a.w_bias = static_cast<const T*>(m.depthwise.bias), a.v_bias = static_cast<const T*>(m.pointwise.bias);
  a.h_activation = m.depthwise.activation, a.y_activation = m.pointwise.activation;
  a.x_strides = d.x, a.y_strides = p.y, a.w_strides = d.w, a.v_n = p.w.n, a.v_c = p.w.c;
  a.H = static_cast<int>(d.H), a.W = static_cast<int>(d.W), a.R = static_cast<int>(d.R), a.S = static_cast<int>(d.S);
  a.taps = a.R * a.S;
  a.stride_h = static_cast<int>(d.stride_h), a.stride_w = static_cast<int>(d.stride_w);
  a.pad_h = static_cast<int>(d.pad_h), a.pad_w = static_cast<int>(d.pad_w);
  a.dilation_h = static_cast<int>(d.dilation_h), a.dilation_w = static_cast<int>(d.dilation_w);
  a.pixels = static_cast<uint32_t>(d.N * d.P * d.Q);
  a.channels = static_cast<int>(d.K), a.outputs = static_cast<int>(p.K);
  a.by_image = FastDiv(d.P * d.Q), a.by_row = FastDiv(d.Q), a.by_multiplier = FastDiv(d.K / d.C);
  a.by_columns = FastDiv(ceil_div(a.outputs, columns));
  constexpr int64_t kVec = kVec16<T>;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % kVec == 0; };
  a.v_vectors = p.w.c == 1 && whole(p.K, p.w.n) && p.C % kVec == 0 && aligned(m.pointwise_weight);
  a.y_vectors =
      p.y.c == 1 && p.K % kVec == 0 && whole(p.N, p.y.n) && whole(p.P, p.y.h) && whole(p.Q, p.y.w) && aligned(m.y);
  return a;
}

// How the depthwise stage reads x.
template <typename T>
Deal choose_deal(const SeparableShape& shape, const void* x) {
  const ConvShape& d = shape.depthwise;
  constexpr int64_t kVec = kVec16<T>;
  if (d.C == 1 || d.x.c != 1) return Deal::pixels;
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % kVec == 0; };
  const bool vectors = d.K == d.C && d.C % kVec == 0 && whole(d.N, d.x.n) && whole(d.H, d.x.h) && whole(d.W, d.x.w) &&
                       reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return vectors ? Deal::vectors : Deal::channels;
}

// Calls f(Deal as a type).
template <typename F>
cudaError_t dispatch_deal(Deal deal, F&& f) {
  switch (deal) {
    case Deal::vectors: return f(std::integral_constant<Deal, Deal::vectors>{});
    case Deal::channels: return f(std::integral_constant<Deal, Deal::channels>{});
    case Deal::pixels: return f(std::integral_constant<Deal, Deal::pixels>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace sepconv::cuda::separable
