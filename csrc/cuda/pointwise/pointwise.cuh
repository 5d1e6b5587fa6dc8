// A 1x1 convolution as a matrix product, for every map and every memory layout: what pointwise.cu (plain arithmetic)
// and pointwise_mma.cu (tensor cores) share.
//
//   out[m, n] = sum over k of a[m, k] * b[n, k]
//
//   map          k        {m, n}                  operands
//   forward      c        {pixel, output channel} x, w
//   grad_input   output channel  {pixel, c}       grad_y, w
//   grad_weight  pixel    output channel, c       grad_y, x; the pixels are split over blocks, which write partial sums
//
// In the first two, n is the dimension in which the result is dense: the channel in channels_last, the pixel in NCHW,
// so that neighbouring threads store to neighbours in both. An operand is read along its own dense dimension, whichever
// that is, in vectors of 16 bytes where strides, sizes and pointers allow it, else element by element.
#pragma once

#include <algorithm>
#include <utility>

#include "cuda/device/common.cuh"
#include "cuda/pointwise/cut.h"

namespace sepconv::cuda::pointwise {

// From an index of the product to an offset in a tensor. An index is a channel or a pixel; a pixel is (image, row,
// column), with as many of the three melted together as the strides allow.
struct PointwiseAxis {
  uint32_t size = 0;
  int64_t image = 0, row = 0, step = 0;  // strides
  FastDiv by_image{kNarrowLimit - 1}, by_row{kNarrowLimit - 1};
  int64_t run = 0;  // indices that follow each other by one `step`, as far as the next row or image

  __device__ __forceinline__ int64_t offset(uint32_t i) const {
    const uint32_t n = by_image.split(i);
    const uint32_t r = by_row.split(i);
    return n * image + r * row + i * step;
  }
};

inline PointwiseAxis channel_axis(int64_t channels, int64_t stride) {
  PointwiseAxis axis;
  axis.size = static_cast<uint32_t>(channels);
  axis.step = stride;
  axis.run = channels;
  return axis;
}

// The pixels of N images of rows x columns.
inline PointwiseAxis pixel_axis(int64_t N, int64_t rows, int64_t columns, int64_t image, int64_t row, int64_t column) {
  struct Dimension {
    int64_t size, stride;
  };
  Dimension d[3] = {{N, image}, {rows, row}, {columns, column}};
  int first = 2;  // d[first] .. d[2] are what is left
  for (int i = 1; i >= 0; --i) {
    if (d[i].size == 1) continue;
    if (d[first].size == 1) {
      d[first] = d[i];
    } else if (d[i].stride == d[first].size * d[first].stride) {
      d[first].size *= d[i].size;
    } else {
      d[--first] = d[i];
    }
  }
  PointwiseAxis axis;
  axis.size = static_cast<uint32_t>(N * rows * columns);
  axis.step = d[2].stride;
  axis.run = d[2].size;
  if (first <= 1) {
    axis.row = d[1].stride;
    axis.by_row = FastDiv(d[2].size);
  }
  if (first == 0) {
    axis.image = d[0].stride;
    axis.by_image = FastDiv(d[1].size * d[2].size);
  }
  return axis;
}

// True where kVec neighbours along `dense` always are one aligned vector.
template <typename T>
bool whole_vectors(int vec, const void* data, const PointwiseAxis& dense, const PointwiseAxis& other) {
  const auto multiple = [vec](int64_t v) { return v % vec == 0; };
  return dense.step == 1 && multiple(dense.run) && multiple(dense.row) && multiple(dense.image) &&
         multiple(other.step) && multiple(other.row) && multiple(other.image) &&
         reinterpret_cast<uintptr_t>(data) % (vec * sizeof(T)) == 0;
}

// Which way to read: the dense one; where both or none are, the one that goes on for longer.
inline bool dense_along(const PointwiseAxis& axis, const PointwiseAxis& other) {
  if ((axis.step == 1) != (other.step == 1)) return axis.step == 1;
  return axis.run >= other.run;
}

template <typename T>
struct Operand {
  const T* data = nullptr;
  PointwiseAxis outer;  // m or n
  PointwiseAxis k;
  bool along_k = false;  // read vectors along k, else along outer
  bool vectors = false;  // they are aligned and whole

  Operand(const void* p, const PointwiseAxis& outer_axis, const PointwiseAxis& k_axis)
      : data(static_cast<const T*>(p)), outer(outer_axis), k(k_axis) {
    along_k = dense_along(k, outer);
    vectors = along_k ? whole_vectors<T>(kVec16<T>, data, k, outer) : whole_vectors<T>(kVec16<T>, data, outer, k);
  }
};

template <typename T>
struct Product {
  Operand<T> a, b;
  // Result, or with `partials` the workspace [splits, m, n] of the accumulation type.
  T* out = nullptr;
  acc_t<T>* partials = nullptr;
  PointwiseAxis out_m, out_n;
  bool out_vectors = false;  // 16 bytes along n
  const T* bias = nullptr;
  bool bias_along_n = false;
  Activation activation = Activation::identity;
  uint32_t k_a_split = 0;  // a multiple of every tile's depth
  // Neighbouring blocks share a tile of b, else of a: the tile of pixels, which is the large one.
  bool m_tiles_first = false;

  Product(const Operand<T>& a_, const Operand<T>& b_) : a(a_), b(b_) {}
};

// forward and grad_input: pixels x channels. `from` is the image that is read, `to` the one that is written; the weight
// has channels that are summed over and channels that are written.
template <typename T>
Product<T> image_product(const Launch& call, const PointwiseAxis& from_pixels, const PointwiseAxis& from_channels,
                         const PointwiseAxis& w_read, const PointwiseAxis& w_written, const PointwiseAxis& to_pixels,
                         const PointwiseAxis& to_channels) {
  const Operand<T> pixels(call.first, from_pixels, from_channels), weight(call.second, w_written, w_read);
  const bool channels_dense = dense_along(to_channels, to_pixels);
  Product<T> p = channels_dense ? Product<T>(pixels, weight) : Product<T>(weight, pixels);
  p.out = call.out_as<T>();
  p.out_m = channels_dense ? to_pixels : to_channels;
  p.out_n = channels_dense ? to_channels : to_pixels;
  p.out_vectors = whole_vectors<T>(kVec16<T>, call.out, p.out_n, p.out_m);
  p.bias = call.bias_as<T>();
  p.activation = call.epilogue.activation;
  p.bias_along_n = channels_dense;
  p.k_a_split = from_channels.size;
  p.m_tiles_first = !channels_dense;
  return p;
}

inline PointwiseAxis x_pixels(const ConvShape& s) {
  return pixel_axis(s.N, s.P, s.Q, s.x.n, s.x.h * s.stride_h, s.x.w * s.stride_w);
}
inline PointwiseAxis y_pixels(const ConvShape& s) { return pixel_axis(s.N, s.P, s.Q, s.y.n, s.y.h, s.y.w); }

template <typename T>
Product<T> forward_product(const Launch& call) {
  const ConvShape& s = call.shape;
  return image_product<T>(call, x_pixels(s), channel_axis(s.C, s.x.c), channel_axis(s.C, s.w.c),
                          channel_axis(s.K, s.w.n), y_pixels(s), channel_axis(s.K, s.y.c));
}

template <typename T>
Product<T> grad_input_product(const Launch& call) {
  const ConvShape& s = call.shape;
  return image_product<T>(call, y_pixels(s), channel_axis(s.K, s.y.c), channel_axis(s.K, s.w.n),
                          channel_axis(s.C, s.w.c), x_pixels(s), channel_axis(s.C, s.x.c));
}

template <typename T>
Product<T> grad_weight_product(const Launch& call, int splits) {
  constexpr int64_t kDepth = 32;
  const ConvShape& s = call.shape;
  Product<T> p(Operand<T>(call.first, channel_axis(s.K, s.y.c), y_pixels(s)),
               Operand<T>(call.second, channel_axis(s.C, s.x.c), x_pixels(s)));
  p.partials = call.workspace_as<acc_t<T>>();
  p.k_a_split = static_cast<uint32_t>(ceil_div(ceil_div<int64_t>(p.a.k.size, splits), kDepth) * kDepth);
  return p;
}

// ---- on the device

// Where a block's tile of the product lies.
struct TileGrid {
  FastDiv by_first;
  bool m_first;
  TileGrid(int64_t m_tiles, int64_t n_tiles, bool m_tiles_first)
      : by_first(m_tiles_first ? m_tiles : n_tiles), m_first(m_tiles_first) {}
  __device__ __forceinline__ void split(uint32_t block, uint32_t& m_tile, uint32_t& n_tile) const {
    uint32_t first = block;
    const uint32_t second = by_first.split(first);
    m_tile = m_first ? first : second;
    n_tile = m_first ? second : first;
  }
};

// How the threads of a block share a tile of kOuter x kDepth elements of an operand. Where the operand has whole
// vectors, in vectors of 16 bytes, neighbouring threads along the dense dimension: vector i of a thread begins at
// (outer(i), depth(i)). Else element by element: along k in the same order, along outer with one element a thread, so
// that a thread has but one outer index and neighbouring threads read neighbours.
template <typename T, bool kAlongK, int kOuter, int kDepth, int kThreads>
struct TileShare {
  static constexpr int kVec = kVec16<T>;
  static constexpr int kVectors = kOuter * kDepth / (kVec * kThreads);
  static constexpr int kElements = kVectors * kVec;
  static constexpr int kAlong = (kAlongK ? kDepth : kOuter) / kVec;  // vectors in the dense dimension
  static_assert(kElements * kThreads == kOuter * kDepth && kThreads % kAlong == 0 && kThreads % kOuter == 0);

  // Rows of four vectors along k: eight neighbouring lanes take rows r and r + 4. Where rows lie an odd number of
  // vectors apart in shared memory, those two have different banks.
  static __device__ __forceinline__ int outer(int i) {
    const int vector = static_cast<int>(threadIdx.x) + i * kThreads;
    if (kAlongK && kAlong == 4) return vector / 32 * 8 + vector / 4 % 2 * 4 + vector / 8 % 4;
    return kAlongK ? vector / kAlong : vector % kAlong * kVec;
  }
  static __device__ __forceinline__ int depth(int i) {
    const int vector = static_cast<int>(threadIdx.x) + i * kThreads;
    return kAlongK ? vector % kAlong * kVec : vector / kAlong;
  }
  static __device__ __forceinline__ int element_outer(int e) {
    return kAlongK ? outer(e / kVec) : static_cast<int>(threadIdx.x) % kOuter;
  }
  static __device__ __forceinline__ int element_depth(int e) {
    return kAlongK ? depth(e / kVec) + e % kVec : static_cast<int>(threadIdx.x) / kOuter + e * (kThreads / kOuter);
  }

  // Offsets of the thread's outer indices, which stay the same while k moves on; and whether they lie inside.
  static constexpr int kOuters = kAlongK ? kVectors : 1;
  int64_t at[kOuters];
  bool inside[kOuters];

  __device__ __forceinline__ TileShare(const Operand<T>& operand, uint32_t first) {
#pragma unroll
    for (int i = 0; i < kOuters; ++i) {
      const uint32_t index = first + (kAlongK || operand.vectors ? outer(i) : element_outer(i));
      inside[i] = index < operand.outer.size;
      at[i] = inside[i] ? operand.outer.offset(index) : 0;
    }
  }

  // Element e of the thread; zero where it is outside.
  __device__ __forceinline__ T element(const Operand<T>& operand, int e, uint32_t k0, uint32_t k_end) const {
    const int i = kAlongK ? e / kVec : 0;
    const uint32_t k = k0 + element_depth(e);
    return inside[i] && k < k_end ? operand.data[at[i] + operand.k.offset(k)] : from_acc<T>(0);
  }

  // Address of the whole vector i, or null where it is outside. Only with operand.vectors.
  __device__ __forceinline__ const T* address(const Operand<T>& operand, int i, uint32_t k0, uint32_t k_end) const {
    const int o = kAlongK ? i : 0;
    const uint32_t k = k0 + depth(i);
    return inside[o] && k < k_end ? operand.data + at[o] + operand.k.offset(k) : nullptr;
  }
};

}  // namespace sepconv::cuda::pointwise
