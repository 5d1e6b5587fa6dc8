// Depthwise convolution with large kernels, stride 1, of contiguous images (NCHW) in half types, on tensor cores.
//
// One row of a kernel, slid along one row of an image, is a product with a Toeplitz matrix, whose element (j, i) depends
// on j - i alone. Forward, for one channel and kernel row r:
//     y[p, q0 + i] += sum over j of  x[p - pad_h + r, q0 - pad_w + j] * T[j, i],   T[j, i] = w[r, j - i]
// and grad_weight, for one output row p:
//     grad_w[r, s0 + i] += sum over j of  x[p - pad_h + r, q0 - pad_w + s0 + j] * T[j, i],   T[j, i] = grad_y[p, q0 + j - i]
// In both the left factor is plain image rows, which ldmatrix reads from shared memory as they lie: its 16 rows are 16
// output rows in the first and 16 kernel rows in the second, and neighbouring tiles share their columns. The right
// factor needs no building either: two copies of the short row in shared memory, one of them a place off, give every
// pair of T's elements as one aligned word. grad_input is forward with the filter turned around.
//
// Thread-to-data map. A block of four warps owns a channel and a part of the places; a place is a strip of `rows` output
// rows and a tile of output columns in each of `lanes` images side by side. The block lays the images' rows into shared
// memory, with zeros for the padding; the output rows of all its images, one after the other, are then dealt to the
// warps.
//   - forward: a warp takes 16 of them at a time, and kTiles * 8 columns; the sums stay in registers over all kernel rows.
//   - grad_weight: a warp takes every fourth of them; its sums are 16 kM x 8 kN taps, and stay in registers to the end.
//     Blocks beside each other take other taps. The warps' sums are added in order, then launch_sum_partials adds the parts.
//
// A window reaches up to seven columns beyond a tap's own: an infinite x there meets a zero and makes a NaN.
#include <algorithm>
#include <utility>

#include "common.cuh"
#include "ptx.cuh"
#include "tiling.h"

namespace sepconv::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

struct Args {
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
struct Place {
  int column_tile, strip, first_image;
  __device__ __forceinline__ Place(const Args& a, uint32_t place) {
    uint32_t strips = a.by_column_tiles.split(place);
    column_tile = static_cast<int>(place);
    first_image = static_cast<int>(a.by_strips.split(strips)) * a.images;
    strip = static_cast<int>(strips);
  }
};

// Columns of a row of images in shared memory: `halves` pieces of 8, rounded up to the pairs that ldmatrix_x4 reads. An
// odd number of 16-byte pieces puts the eight rows of a matrix on different banks.
__host__ __device__ constexpr int even(int halves) { return (halves + 1) / 2 * 2; }
__host__ __device__ constexpr int pitch(int halves) { return (even(halves) | 1) * 8; }

// Lays rows [first_row, first_row + count) and columns from first_column on of each of the place's images into `tile`,
// [images, count, kPitch]; zeros where there is no pixel.
template <int kPitch, typename T>
__device__ __forceinline__ void stage_images(const Args& a, T* tile, const T* __restrict__ x, int first_image,
                                             int count, int first_row, int first_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const T zero = from_acc<T>(0.f);
  for (int image = 0; image < a.images; ++image) {
    const T* const from = x + static_cast<int64_t>(first_image + image) * a.x_n;
    T* const to = tile + image * count * kPitch;
#pragma unroll 4
    for (int row = warp; row < count; row += kWarps) {
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
  static constexpr int kLength = 16 * kSteps + 8;
  static constexpr int kElements = 2 * kLength;

  // element(k) is called for k in [0, count).
  template <typename T, typename Element>
  static __device__ __forceinline__ void stage(T* row, int count, int lane, const Element& element) {
#pragma unroll
    for (int place = 0; place < kElements; place += 32) {
      const int i = place + lane;
      if (i >= kElements) continue;
      const int k = i < kLength ? i - 8 : i - kLength - 9;
      row[i] = k >= 0 && k < count ? element(k) : from_acc<T>(0.f);
    }
  }

  // The fragments of T's rows 16 step .. 16 step + 15.
  template <typename T>
  static __device__ __forceinline__ void load(uint32_t (&fragments)[kSteps][2], const T* row, int lane) {
    const int column = lane / 4, j = lane % 4 * 2;
    const T* const first = row + column % 2 * (kLength + 1) + 8 + j - column;
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
  uint32_t words[even(kHalves) / 2][4];

  // `row` is the lane's own: row lane % 16, 8 columns further in the second half of the warp.
  template <typename T>
  __device__ __forceinline__ void load(const T* row) {
#pragma unroll
    for (int i = 0; i < even(kHalves) / 2; ++i) ldmatrix_x4(words[i], row + 16 * i);
  }
  template <typename T>
  __device__ __forceinline__ void multiply_add(float (&sums)[4], int half, const uint32_t (&right)[2]) const {
    const uint32_t left[4] = {words[half / 2][half % 2 * 2], words[half / 2][half % 2 * 2 + 1],
                              words[(half + 1) / 2][(half + 1) % 2 * 2], words[(half + 1) / 2][(half + 1) % 2 * 2 + 1]};
    mma_m16n8k16<T>(sums, left, right);
  }
};

template <typename T, int kTiles, int kSteps>
__global__ void __launch_bounds__(kThreads, 4)
    toeplitz_kernel(const Args a, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                    const Activation activation, T* __restrict__ y) {
  using Row = ToeplitzRow<kSteps>;
  constexpr int kHalves = kTiles - 1 + 2 * kSteps, kPitch = pitch(kHalves);
  DYN_SMEM(smem);
  T* const filter = reinterpret_cast<T*>(smem);  // [R, Row::kElements]
  T* const tile = filter + a.R * Row::kElements;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t part = blockIdx.x;
  const int k = static_cast<int>(a.by_parts.split(part));
  const T* const x_channel = x + a.by_multiplier.div(k) * a.x_c;
  for (int r = warp; r < a.R; r += kWarps) {
    const T* const row = w + k * a.w_n + (a.turned ? a.R - 1 - r : r) * a.w_h;
    const auto tap = [&](int s) { return row[(a.turned ? a.S - 1 - s : s) * a.w_w]; };
    Row::stage(filter + r * Row::kElements, a.S, lane, tap);
  }
  const float add = bias != nullptr ? to_acc(bias[k]) : 0.f;
  const int tile_rows = a.rows + a.R - 1, output_rows = a.images * a.rows;

  for (uint32_t i = part; i < a.places; i += a.parts) {
    const Place place(a, i);
    const int first_column = place.column_tile * kTiles * 8;
    stage_images<kPitch>(a, tile, x_channel, place.first_image, tile_rows, place.strip * a.rows - a.pad_h,
                         first_column - a.pad_w);
    __syncthreads();
    for (int m0 = warp * 16; m0 < output_rows; m0 += kWarps * 16) {
      const uint32_t m = min(m0 + lane % 16, output_rows - 1);
      const uint32_t image = a.by_rows.div(m);
      const T* row = tile + (image * tile_rows + (m - image * a.rows)) * kPitch + lane / 16 * 8;
      float sums[kTiles * 4] = {};
#pragma unroll 1
      for (int r = 0; r < a.R; ++r) {
        ImageRows<kHalves> left;
        uint32_t right[kSteps][2];
        left.load(row);
        Row::load(right, filter + r * Row::kElements, lane);
        row += kPitch;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            left.template multiply_add<T>(reinterpret_cast<float (&)[4]>(sums[t * 4]), t + 2 * step, right[step]);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kTiles * 4; ++v) sums[v] += add;
      activate_all(activation, sums);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t own = m0 + lane / 4 + 8 * half;
        const uint32_t own_image = a.by_rows.div(own);
        const int n = place.first_image + static_cast<int>(own_image);
        const int p = place.strip * a.rows + static_cast<int>(own - own_image * a.rows);
        if (own >= static_cast<uint32_t>(output_rows) || n >= a.N || p >= a.P) continue;
        T* const out = y + n * a.y_n + k * a.y_c + p * a.y_h;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int q = first_column + t * 8 + lane % 4 * 2;
          const float values[2] = {sums[t * 4 + 2 * half], sums[t * 4 + 2 * half + 1]};
          if (q >= a.Q) continue;
          if (a.whole_pairs) {
            store_vec<2>(out + q, values);
          } else {
            out[q] = from_acc<T>(values[0]);
            if (q + 1 < a.Q) out[q + 1] = from_acc<T>(values[1]);
          }
        }
      }
    }
    __syncthreads();  // the images have no readers left
  }
}

template <typename T, int kM, int kN, int kSteps>
__global__ void __launch_bounds__(kThreads, 4)
    toeplitz_grad_weight_kernel(const Args a, const T* __restrict__ grad_y, const T* __restrict__ x,
                                float* __restrict__ partials) {
  using Row = ToeplitzRow<kSteps>;
  constexpr int kColumns = 16 * kSteps - 8, kTapRows = 16 * kM, kTapColumns = 8 * kN;
  constexpr int kHalves = kN - 1 + 2 * kSteps, kPitch = pitch(kHalves);
  DYN_SMEM(smem);
  T* const tile = reinterpret_cast<T*>(smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t part = blockIdx.x;
  uint32_t section = a.by_parts.split(part);
  const int k = static_cast<int>(a.by_sections.split(section));
  const int column_sections = (a.S + kTapColumns - 1) / kTapColumns;
  const int first_r = static_cast<int>(section) / column_sections * kTapRows;
  const int first_s = static_cast<int>(section) % column_sections * kTapColumns;
  const T* const x_channel = x + a.by_multiplier.div(k) * a.x_c;
  const T* const y_channel = grad_y + k * a.y_c;
  const int tile_rows = a.rows + kTapRows - 1, output_rows = a.images * a.rows;
  T* const grads = tile + a.images * tile_rows * kPitch;  // [output_rows, Row::kElements]

  float sums[kM][kN][4] = {};
  for (uint32_t i = part; i < a.places; i += a.parts) {
    const Place place(a, i);
    const int first_column = place.column_tile * kColumns;
    stage_images<kPitch>(a, tile, x_channel, place.first_image, tile_rows, place.strip * a.rows - a.pad_h + first_r,
                         first_column - a.pad_w + first_s);
#pragma unroll 2
    for (int m = warp; m < output_rows; m += kWarps) {
      const int image = static_cast<int>(a.by_rows.div(m));
      const int n = place.first_image + image, p = place.strip * a.rows + m - image * a.rows;
      const T* const row = y_channel + n * a.y_n + p * a.y_h + first_column;
      const int count = n < a.N && p < a.P ? min(kColumns, a.Q - first_column) : 0;
      Row::stage(grads + m * Row::kElements, count, lane, [&](int q) { return row[q]; });
    }
    __syncthreads();
#pragma unroll 1
    for (int m = warp; m < output_rows; m += kWarps) {
      const int image = static_cast<int>(a.by_rows.div(m));
      const T* const row = tile + (image * tile_rows + m - image * a.rows + lane % 16) * kPitch + lane / 16 * 8;
      uint32_t right[kSteps][2];
      Row::load(right, grads + m * Row::kElements, lane);
#pragma unroll
      for (int r = 0; r < kM; ++r) {
        ImageRows<kHalves> left;
        left.load(row + 16 * r * kPitch);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int s = 0; s < kN; ++s) left.template multiply_add<T>(sums[r][s], s + 2 * step, right[step]);
        }
      }
    }
    __syncthreads();  // the images and gradients have no readers left
  }

  // The warps' sums, added in the order of the warps.
  float* const total = reinterpret_cast<float*>(smem);  // [kWarps, kTapRows, kTapColumns]
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int s = 0; s < kN; ++s) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int row = 16 * r + lane / 4 + v / 2 * 8, column = 8 * s + lane % 4 * 2 + v % 2;
        total[(warp * kTapRows + row) * kTapColumns + column] = sums[r][s][v];
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTapRows * kTapColumns; i += kThreads) {
    const int r = first_r + i / kTapColumns, s = first_s + i % kTapColumns;
    if (r >= a.R || s >= a.S) continue;
    float sum = total[i];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += total[other * kTapRows * kTapColumns + i];
    partials[((static_cast<int64_t>(part) * a.K + k) * a.R + r) * a.S + s] = sum;
  }
}

Args make_args(const ConvShape& s, const Tile& tile) {
  Args a{};
  a.x_n = s.x.n, a.x_c = s.x.c, a.x_h = static_cast<int>(s.x.h);
  a.y_n = s.y.n, a.y_c = s.y.c, a.y_h = static_cast<int>(s.y.h);
  a.N = static_cast<int>(s.N), a.K = static_cast<int>(s.K);
  a.H = static_cast<int>(s.H), a.W = static_cast<int>(s.W), a.P = static_cast<int>(s.P), a.Q = static_cast<int>(s.Q);
  a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.pad_h = static_cast<int>(s.pad_h), a.pad_w = static_cast<int>(s.pad_w);
  a.w_n = s.w.n, a.w_h = static_cast<int>(s.w.h), a.w_w = static_cast<int>(s.w.w), a.whole_pairs = tile.vec == 2;
  a.rows = tile.rows, a.images = tile.lanes, a.parts = static_cast<uint32_t>(tile.splits);
  a.by_parts = FastDiv(tile.splits), a.by_multiplier = FastDiv(s.K / s.C), a.by_rows = FastDiv(tile.rows);
  return a;
}

// Cuts the output into places with tiles of `columns` columns.
void cut(Args& a, int columns) {
  a.by_column_tiles = FastDiv(ceil_div(a.Q, columns)), a.by_strips = FastDiv(ceil_div(a.P, a.rows));
  a.places = a.by_column_tiles.divisor * a.by_strips.divisor * ceil_div(a.N, a.images);
}

template <typename T, int kTiles, int kSteps>
cudaError_t start(Args a, const void* x, const void* w, const Epilogue& epilogue, void* y, cudaStream_t stream) {
  cut(a, 8 * kTiles);
  const size_t elements =
      a.R * ToeplitzRow<kSteps>::kElements + a.images * (a.rows + a.R - 1) * pitch(kTiles - 1 + 2 * kSteps);
  const LaunchConfig config{dim3(a.K * a.parts), dim3(kThreads), elements * sizeof(T), stream};
  return launch(toeplitz_kernel<T, kTiles, kSteps>, config, a, static_cast<const T*>(x), static_cast<const T*>(w),
                static_cast<const T*>(epilogue.bias), epilogue.activation, static_cast<T*>(y));
}

template <typename T, int kM, int kN, int kSteps>
cudaError_t start_grad_weight(Args a, const void* grad_y, const void* x, void* workspace, cudaStream_t stream) {
  static_assert(toeplitz_grad_columns(kSteps) == 16 * kSteps - 8);  // as the kernel has it
  cut(a, toeplitz_grad_columns(kSteps));
  const int sections = ceil_div(a.R, 16 * kM) * ceil_div(a.S, 8 * kN);
  a.by_sections = FastDiv(sections);
  const size_t elements =
      a.images * ((a.rows + 16 * kM - 1) * pitch(kN - 1 + 2 * kSteps) + a.rows * ToeplitzRow<kSteps>::kElements);
  const LaunchConfig config{dim3(a.K * sections * a.parts), dim3(kThreads),
                            std::max(elements * sizeof(T), sizeof(float) * kWarps * 128 * kM * kN), stream};
  return launch(toeplitz_grad_weight_kernel<T, kM, kN, kSteps>, config, a, static_cast<const T*>(grad_y),
                static_cast<const T*>(x), static_cast<float*>(workspace));
}

cudaError_t run(const Args& a, DType dtype, const void* x, const void* w, const Epilogue& epilogue, void* y,
                cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_steps = [&](auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      switch (toeplitz_steps(a.S)) {
        case 1: return start<T, kTiles, 1>(a, x, w, epilogue, y, stream);
        case 2: return start<T, kTiles, 2>(a, x, w, epilogue, y, stream);
        case 3: return start<T, kTiles, 3>(a, x, w, epilogue, y, stream);
        default: return start<T, kTiles, 5>(a, x, w, epilogue, y, stream);
      }
    };
    switch (toeplitz_tiles(a.Q)) {
      case 1: return with_steps(Int<1>{});
      case 2: return with_steps(Int<2>{});
      case 4: return with_steps(Int<4>{});
      default: return with_steps(Int<7>{});
    }
  });
}

}  // namespace

cudaError_t launch_depthwise_toeplitz_forward(const ConvShape& shape, DType dtype, const void* x, const void* w,
                                              const Epilogue& epilogue, void* y, const Tile& tile,
                                              cudaStream_t stream) {
  return run(make_args(shape, tile), dtype, x, w, epilogue, y, stream);
}

cudaError_t launch_depthwise_toeplitz_grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w,
                                                 void* grad_x, const Tile& tile, cudaStream_t stream) {
  Args a = make_args(shape, tile);
  std::swap(a.x_n, a.y_n), std::swap(a.x_c, a.y_c), std::swap(a.x_h, a.y_h), std::swap(a.H, a.P), std::swap(a.W, a.Q);
  a.pad_h = a.R - 1 - a.pad_h, a.pad_w = a.S - 1 - a.pad_w, a.turned = true;
  return run(a, dtype, grad_y, w, Epilogue{}, grad_x, stream);
}

cudaError_t launch_depthwise_toeplitz_grad_weight(const ConvShape& shape, DType dtype, const void* grad_y,
                                                  const void* x, void* grad_w, void* workspace, const Tile& tile,
                                                  cudaStream_t stream) {
  const Args a = make_args(shape, tile);
  const cudaError_t error = dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_steps = [&](auto m, auto n) {
      constexpr int kM = decltype(m)::value, kN = decltype(n)::value;
      switch (toeplitz_grad_steps(a.Q)) {
        case 1: return start_grad_weight<T, kM, kN, 1>(a, grad_y, x, workspace, stream);
        case 2: return start_grad_weight<T, kM, kN, 2>(a, grad_y, x, workspace, stream);
        case 3: return start_grad_weight<T, kM, kN, 3>(a, grad_y, x, workspace, stream);
        default: return start_grad_weight<T, kM, kN, 4>(a, grad_y, x, workspace, stream);
      }
    };
    return toeplitz_few_taps(a.R, a.S) ? with_steps(Int<1>{}, Int<2>{}) : with_steps(Int<2>{}, Int<4>{});
  });
  return error != cudaSuccess ? error : launch_sum_partials(shape, dtype, workspace, tile.splits, grad_w, stream);
}

}  // namespace sepconv::cuda
