// Depthwise grad_weight in one pass: what depthwise_grad_weight_nhwc.cu and depthwise_grad_weight_nchw.cu share.
//
// A thread owns one channel and kColumns neighbouring columns of grad_y, and walks down the rows of its images. It
// keeps a sum for every tap and the last rows of grad_y that an x can still meet; each value of x and of grad_y that it
// needs is read from shared memory once, converted once, and multiplied into every sum that it belongs to. How the rows
// come to shared memory, and which thread is where, is what the two layouts differ in.
//
// The order of all additions is a function of the shape: the rows of all images, one after the other, are cut into
// splits of equal length; a thread adds its rows in turn, a block its threads in order (store_sums), and
// launch_sum_partials adds the splits.
//
// Borders are zeros that are multiplied like other numbers: an infinite one that meets them makes a NaN.
#pragma once

#include <algorithm>

#include "cuda/depthwise/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda::grad_weight {

constexpr int kColumns = kGradWeightColumns;

// The rows that a block works down.
struct Rows {
  int H, P, pad_h;
  uint32_t total, part;  // rows of grad_y of all places one after the other; those of a split
  FastDiv by_rows;       // of one place: P

  __device__ __forceinline__ bool in_image(int h) const {  // a row of x
    return static_cast<unsigned>(h) < static_cast<unsigned>(H);
  }
};

// One after the other, the segments of a split: its rows of grad_y that lie in one place. In step i a thread takes up
// row first + i of grad_y, and then the kStride rows of x from (first + i) * kStride - pad_h on; it goes on until no
// row of x that the segment meets is left.
template <int kKernel, int kStride>
struct Walk {
  static constexpr int kRing = (kKernel - 1) / kStride + 1;  // rows of grad_y that a row of x meets, or more
  uint32_t next, last;                                       // rows of all places that no segment had yet
  int place = 0, first = 0, count = 0, steps = 0;

  __device__ __forceinline__ Walk(const Rows& a, uint32_t split)
      : next(split * a.part), last(min(next + a.part, a.total)) {}

  // The next segment; false where there is none.
  __device__ __forceinline__ bool open(const Rows& a) {
    if (next >= last) return false;
    uint32_t row = next;
    place = static_cast<int>(a.by_rows.split(row));
    first = static_cast<int>(row);
    count = min(a.P - first, static_cast<int>(last - next));
    next += count;
    const int below = a.H - 1 + a.pad_h - first * kStride;  // rows of x below the first that is met
    steps = max(min(count + kRing - 1, below / kStride + 1), 1);
    return true;
  }
  // The row of x that `step` begins with, which may lie outside of the image.
  __device__ __forceinline__ int x_row(const Rows& a, int step) const { return (first + step) * kStride - a.pad_h; }
};

// What a thread keeps in registers. Neighbouring columns lie kPitch elements apart in shared memory. Bit i of a mask
// says whether column i of a row exists.
template <typename T, int kKernel, int kStride, int kPitch>
struct Window {
  static constexpr int kRing = Walk<kKernel, kStride>::kRing;
  static constexpr int kReach = (kColumns - 1) * kStride + kKernel;  // columns of x
  static constexpr uint32_t kAll = 0xffffffffu;
  static_assert(kReach <= 32);

  float sums[kKernel][kKernel] = {};
  float ring[kRing][kColumns];  // ring[i]: row of grad_y taken up i steps ago

  __device__ __forceinline__ void clear() {  // but for the last row, which the next one replaces
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o) ring[i][o] = 0;
    }
  }
  // Takes up a row of grad_y: zeros where it does not exist.
  __device__ __forceinline__ void push(const T* row, bool exists, uint32_t mask = kAll) {
#pragma unroll
    for (int i = kRing - 1; i > 0; --i) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o) ring[i][o] = ring[i - 1][o];
    }
#pragma unroll
    for (int o = 0; o < kColumns; ++o) ring[0][o] = 0;
    if (exists) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o) {
        if (mask >> o & 1) ring[0][o] = to_acc(row[o * kPitch]);
      }
    }
  }
  // Multiplies the row of x that comes `phase` after the first one of this step with all rows of grad_y that it meets.
  __device__ __forceinline__ void meet(int phase, const T* row, uint32_t mask = kAll) {
    float values[kReach];
#pragma unroll
    for (int i = 0; i < kReach; ++i) values[i] = mask >> i & 1 ? to_acc(row[i * kPitch]) : 0;
#pragma unroll
    for (int i = 0; i < kReach; ++i) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o) {
        const int s = i - o * kStride;
        if (s < 0 || s >= kKernel) continue;
#pragma unroll
        for (int r = phase; r < kKernel; r += kStride) sums[r][s] += values[i] * ring[(r - phase) / kStride][o];
      }
    }
  }
};

// Where sums go: to the partial sums of this block's split, or to the gradient itself where there is but one split.
template <typename T>
struct Result {
  float* partials;  // [splits, K, R, S]
  T* grad_w;
  int64_t w_n, w_h, w_w;
  int K, splits;
};

// Adds up the sums of all threads of a channel, thread first(c) + i * step for i in [0, count) in this order, and
// stores the totals of channels [first_channel, first_channel + channels). `buffer`: kKernel floats a thread, free to
// use once every thread has arrived.
template <int kKernel, typename T, typename First>
__device__ __forceinline__ void store_sums(const Result<T>& a, const float (&sums)[kKernel][kKernel], float* buffer,
                                           uint32_t split, int first_channel, int channels, const First& first,
                                           int step, int count) {
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kKernel; ++s) buffer[s * threads + t] = sums[r][s];
    __syncthreads();
    for (int i = t; i < channels * kKernel; i += threads) {
      const int c = i / kKernel, s = i % kKernel, k = first_channel + c;
      const float* from = buffer + s * threads + first(c);
      float total = 0;
#pragma unroll 4
      for (int j = 0; j < count; ++j) total += from[j * step];
      if (a.splits == 1) {
        a.grad_w[k * a.w_n + r * a.w_h + s * a.w_w] = from_acc<T>(total);
      } else {
        a.partials[((static_cast<int64_t>(split) * a.K + k) * kKernel + r) * kKernel + s] = total;
      }
    }
  }
}

inline Rows make_rows(const ConvShape& s, int64_t places, const GradWeightRowsCut& cut) {
  const int64_t total = places * s.P, part = std::max<int64_t>(cut.rows, ceil_div(total, cut.splits));
  return {static_cast<int>(s.H),        static_cast<int>(s.P),       static_cast<int>(s.pad_h),
          static_cast<uint32_t>(total), static_cast<uint32_t>(part), FastDiv(s.P)};
}

template <typename T>
Result<T> make_result(const Launch& call, int splits) {
  const ConvShape& s = call.shape;
  return {call.workspace_as<float>(), call.out_as<T>(), s.w.n, s.w.h, s.w.w, static_cast<int>(s.K), splits};
}

// Calls f(type, kernel, stride) with the three as types; float64 has no kernel here.
template <typename F>
cudaError_t dispatch(const ConvShape& shape, DType dtype, F&& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    if constexpr (std::is_same_v<typename decltype(tag)::type, double>) {
      return cudaErrorInvalidValue;
    } else {
      const auto with_kernel = [&](auto stride) {
        switch (shape.R) {
          case 3: return f(tag, Int<3>{}, stride);
          case 5: return f(tag, Int<5>{}, stride);
          case 7: return f(tag, Int<7>{}, stride);
          default: return cudaErrorInvalidValue;
        }
      };
      return shape.stride_h == 1 ? with_kernel(Int<1>{}) : with_kernel(Int<2>{});
    }
  });
}

}  // namespace sepconv::cuda::grad_weight
