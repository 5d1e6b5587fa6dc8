// What depthwise_toeplitz.cu and depthwise_toeplitz_grad_weight.cu share: one row of a kernel, slid along one row of an
// image, is a product with a Toeplitz matrix, whose element (j, i) depends on j - i alone.
//
// The left factor is plain image rows, which ldmatrix reads from shared memory as they lie; neighbouring tiles share
// their columns. The right factor needs no building either: two copies of the short row in shared memory, one of them a
// place off, give every pair of T's elements as one aligned word.
//
// A block of four warps owns a channel and a part of the places; a place is a strip of `rows` output rows and a tile of
// output columns in each of `lanes` images side by side. The block lays the images' rows into shared memory, with zeros
// for the padding; the output rows of all its images, one after the other, are then dealt to the warps.
#pragma once

#include "core/correlation.h"
#include "cuda/depthwise/toeplitz/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {

inline constexpr int kToeplitzWarps = 4, kToeplitzThreads = 32 * kToeplitzWarps;

struct ToeplitzArgs {
  int64_t x_n, x_c, y_n, y_c;  // strides, in elements; of grad_y and grad_x in grad_input
  int64_t w_n;
  int x_h, y_h, w_h, w_w;
  int N, K, H, W, P, Q, R, S, pad_h, pad_w;
  bool turned;       // read the filter from its last tap to its first
  bool whole_pairs;  // two neighbouring columns of y can be stored as one
  int rows, images;  // of a place
  uint32_t places, parts;
  FastDiv by_parts, by_multiplier, by_column_tiles, by_strips, by_rows, by_sections;
};

// Places in turn: (column tile fastest, strip, group of images).
struct ToeplitzPlace {
  int column_tile, strip, first_image;
  __device__ __forceinline__ ToeplitzPlace(const ToeplitzArgs& a, uint32_t place) {
    uint32_t strips = a.by_column_tiles.split(place);
    column_tile = static_cast<int>(place);
    first_image = static_cast<int>(a.by_strips.split(strips)) * a.images;
    strip = static_cast<int>(strips);
  }
};

// Columns of a row of images in shared memory: `halves` pieces of 8, rounded up to the pairs that ldmatrix_x4 reads. An
// odd number of 16-byte pieces puts the eight rows of a matrix on different banks.
__host__ __device__ constexpr int toeplitz_even(int halves) { return (halves + 1) / 2 * 2; }
__host__ __device__ constexpr int toeplitz_pitch(int halves) { return (toeplitz_even(halves) | 1) * 8; }

// Lays rows [first_row, first_row + count) and columns from first_column on of each of the place's images into `tile`,
// [images, count, kPitch]; zeros where there is no pixel.
template <int kPitch, typename T>
__device__ __forceinline__ void stage_images(const ToeplitzArgs& a, T* tile, const T* __restrict__ x, int first_image,
                                             int count, int first_row, int first_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const T zero = from_acc<T>(0.f);
  for (int image = 0; image < a.images; ++image) {
    const T* const from = x + static_cast<int64_t>(first_image + image) * a.x_n;
    T* const to = tile + image * count * kPitch;
#pragma unroll 4
    for (int row = warp; row < count; row += kToeplitzWarps) {
      const int h = first_row + row;
      const bool exists = first_image + image < a.N && static_cast<unsigned>(h) < static_cast<unsigned>(a.H);
#pragma unroll
      for (int pair = 0; pair < kPitch / 2; pair += 32) {
        const int i = 2 * (pair + lane), w = first_column + i;
        if (i >= kPitch) continue;
        Vec<T, 2> v;
        v.v[0] = exists && static_cast<unsigned>(w) < static_cast<unsigned>(a.W) ? from[h * a.x_h + w] : zero;
        v.v[1] = exists && static_cast<unsigned>(w + 1) < static_cast<unsigned>(a.W) ? from[h * a.x_h + w + 1] : zero;
        *reinterpret_cast<Vec<T, 2>*>(to + row * kPitch + i) = v;
      }
    }
  }
}

// A short row as the right factor. Copy o holds element k at place k + 8 + o, and zeros elsewhere.
template <int kSteps>
struct ToeplitzRow {
  static constexpr int kLength = toeplitz_copy_length(kSteps), kGap = toeplitz_copy_gap(kSteps);
  static constexpr int kElements = toeplitz_row_elements(kSteps), kSecond = kLength + kGap;
  static_assert(kSecond / 2 % 32 >= 7 && kSecond / 2 % 32 <= 25);  // see toeplitz_copy_gap()

  // element(k) is called for k in [0, count).
  template <typename T, typename Element>
  static __device__ __forceinline__ void stage(T* row, int count, int lane, const Element& element) {
#pragma unroll
    for (int place = 0; place < 2 * kLength; place += 32) {
      const int i = place + lane;
      if (i >= 2 * kLength) continue;
      const int k = i < kLength ? i - 8 : i - kLength - 9;
      row[i < kLength ? i : i + kGap] = k >= 0 && k < count ? element(k) : from_acc<T>(0.f);
    }
  }

  // The fragments of T's rows 16 step .. 16 step + 15.
  template <typename T>
  static __device__ __forceinline__ void load(uint32_t (&fragments)[kSteps][2], const T* row, int lane) {
    const int column = lane / 4, j = lane % 4 * 2;
    const T* const first = row + column % 2 * (kSecond + 1) + 8 + j - column;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        fragments[step][half] = *reinterpret_cast<const uint32_t*>(first + 16 * step + 8 * half);
      }
    }
  }
};

// 16 rows of kHalves pieces of 8 columns, as the left factor: piece i is fragment(i).
template <int kHalves>
struct ImageRows {
  uint32_t words[toeplitz_even(kHalves) / 2][4];

  // `row` is the lane's own: row lane % 16, 8 columns further in the second half of the warp.
  template <typename T>
  __device__ __forceinline__ void load(const T* row) {
#pragma unroll
    for (int i = 0; i < toeplitz_even(kHalves) / 2; ++i) ldmatrix_x4(words[i], row + 16 * i);
  }
  template <typename T>
  __device__ __forceinline__ void multiply_add(float (&sums)[4], int half, const uint32_t (&right)[2]) const {
    const uint32_t left[4] = {words[half / 2][half % 2 * 2], words[half / 2][half % 2 * 2 + 1],
                              words[(half + 1) / 2][(half + 1) % 2 * 2], words[(half + 1) / 2][(half + 1) % 2 * 2 + 1]};
    mma_m16n8k16<T>(sums, left, right);
  }
};

// ---- on the host

inline ToeplitzArgs make_toeplitz_args(Map map, const ConvShape& s, const ToeplitzCut& cut) {
  const Correlation c = correlation(map, s);
  ToeplitzArgs a{};
  // grad_weight: y is what is read with x, and the filter; c.image is x.
  const bool sums = map == Map::grad_weight;
  const Strides& y = sums ? s.y : c.result;
  a.x_n = c.image.n, a.x_c = c.image.c, a.x_h = static_cast<int>(c.image.h);
  a.y_n = y.n, a.y_c = y.c, a.y_h = static_cast<int>(y.h);
  a.N = static_cast<int>(s.N), a.K = static_cast<int>(s.K);
  a.H = static_cast<int>(c.image_h), a.W = static_cast<int>(c.image_w);
  a.P = static_cast<int>(sums ? s.P : c.result_h), a.Q = static_cast<int>(sums ? s.Q : c.result_w);
  a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.pad_h = static_cast<int>(c.pad_h), a.pad_w = static_cast<int>(c.pad_w), a.turned = c.turned;
  a.w_n = s.w.n, a.w_h = static_cast<int>(s.w.h), a.w_w = static_cast<int>(s.w.w), a.whole_pairs = cut.vec == 2;
  a.rows = cut.rows, a.images = cut.images, a.parts = static_cast<uint32_t>(cut.splits);
  a.by_parts = FastDiv(cut.splits), a.by_multiplier = FastDiv(s.K / s.C), a.by_rows = FastDiv(cut.rows);
  return a;
}

// Cuts the output into places with tiles of `columns` columns.
inline void cut_toeplitz(ToeplitzArgs& a, int columns) {
  a.by_column_tiles = FastDiv(ceil_div(a.Q, columns)), a.by_strips = FastDiv(ceil_div(a.P, a.rows));
  a.places = a.by_column_tiles.divisor * a.by_strips.divisor * ceil_div(a.N, a.images);
}

}  // namespace sepconv::cuda
