// Spatially separable convolution: a column filter and then a row filter over every channel, in one pass through
// memory.
//
//   t[p, w] = sum over r of column[c, r] * x[n, c, p + r - pad_h, w]
//   y[n, c, p, q] = sum over s of row[c, s] * t[p, q + s - pad_w]
//
// Thread-to-data map. A block computes kRows output rows, a.columns output columns and a.channels channels of one image
// (one channel where columns are dense, up to 32 neighbours where channels are). First its threads go over the elements
// of a line of t, with the halo of S - 1 columns, channels fastest: each computes that element of all kRows lines,
// loading an input row once for up to kRun taps, and leaves it in shared memory, in the accumulation type. After a
// barrier they go over the elements of a line of output, and read the lines of t shifted by one column a tap. So t
// never reaches memory, and a half type is rounded once. Neighbouring threads read and write neighbouring addresses in
// both passes. Strides of memory are any; offsets are 64 bits wide.
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/spatial/cut.h"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kSpatialRows;
constexpr int kRun = 4;

struct SpatialArgs {
  Strides x, y;
  int64_t column_channel, row_channel;
  int C, H, W, P, Q, R, S, pad_h, pad_w;
  int columns, channels, pitch;  // of a block; pitch: elements of a line of t
  // block -> (column tile, row tile, channel chunk, n); element of a line -> (channel, column)
  FastDiv by_column_tile, by_row_tile, by_chunk, by_channel;
};

// kRows elements of t, one below the other, from input row `first` on.
template <typename A, typename T>
__device__ __forceinline__ void column_sums(const SpatialArgs& a, const T* __restrict__ from,
                                            const T* __restrict__ filter, int first, A (&sums)[kRows]) {
  for (int r = 0; r < a.R; r += kRun) {
    A taps[kRun];
#pragma unroll
    for (int t = 0; t < kRun; ++t) taps[t] = r + t < a.R ? to_acc(filter[r + t]) : A(0);
#pragma unroll
    for (int i = 0; i < kRows + kRun - 1; ++i) {
      const int h = first + r + i;
      const A value = h >= 0 && h < a.H ? to_acc(from[h * a.x.h]) : A(0);
#pragma unroll
      for (int t = 0; t < kRun; ++t) {
        // A tap beyond the filter must not touch the sum: zero times infinity is not zero.
        if (i >= t && i - t < kRows && r + t < a.R) sums[i - t] += value * taps[t];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    spatial_kernel(const SpatialArgs a, const T* __restrict__ x, const T* __restrict__ column,
                   const T* __restrict__ row, T* __restrict__ y) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  DYN_SMEM(memory);
  A* lines = reinterpret_cast<A*>(memory);  // [kRows, pitch]
  uint32_t column_tile = blockIdx.x;
  uint32_t row_tile = a.by_column_tile.split(column_tile);
  uint32_t chunk = a.by_row_tile.split(row_tile);
  const int64_t n = a.by_chunk.split(chunk);
  const int q0 = static_cast<int>(column_tile) * a.columns, p0 = static_cast<int>(row_tile) * kRows;
  const int c0 = static_cast<int>(chunk) * a.channels;

  for (int i = threadIdx.x; i < a.pitch; i += kThreads) {
    uint32_t channel = i;
    const int w = q0 + static_cast<int>(a.by_channel.split(channel)) - a.pad_w, c = c0 + static_cast<int>(channel);
    A sums[kRows] = {};
    if (w >= 0 && w < a.W && c < a.C) {
      column_sums(a, x + n * a.x.n + c * a.x.c + w * a.x.w, column + c * a.column_channel, p0 - a.pad_h, sums);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) lines[k * a.pitch + i] = sums[k];
  }
  __syncthreads();

  for (int i = threadIdx.x; i < a.columns * a.channels; i += kThreads) {
    uint32_t channel = i;
    const int q = q0 + static_cast<int>(a.by_channel.split(channel)), c = c0 + static_cast<int>(channel);
    if (q >= a.Q || c >= a.C) continue;
    const T* filter = row + c * a.row_channel;
    A sums[kRows] = {};
    for (int s = 0; s < a.S; ++s) {
      const A tap = to_acc(filter[s]);
#pragma unroll
      for (int k = 0; k < kRows; ++k) sums[k] += lines[k * a.pitch + i + s * a.channels] * tap;
    }
    T* to = y + n * a.y.n + c * a.y.c + q * a.y.w;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (p0 + k < a.P) to[(p0 + k) * a.y.h] = from_acc<T>(sums[k]);
    }
  }
}

}  // namespace

cudaError_t launch_spatial_separable(const ConvShape& s, DType dtype, const void* x, const SpatialFilters& filters,
                                     void* y, cudaStream_t stream) {
  const SpatialTile tile = spatial_tile(s, dtype);
  SpatialArgs a{};
  a.x = s.x, a.y = s.y;
  a.column_channel = filters.column_channel, a.row_channel = filters.row_channel;
  a.C = static_cast<int>(s.C), a.H = static_cast<int>(s.H), a.W = static_cast<int>(s.W);
  a.P = static_cast<int>(s.P), a.Q = static_cast<int>(s.Q), a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.pad_h = static_cast<int>(s.pad_h), a.pad_w = static_cast<int>(s.pad_w);
  a.columns = tile.columns, a.channels = tile.channels, a.pitch = (tile.columns + a.S - 1) * tile.channels;
  a.by_column_tile = FastDiv(ceil_div<int64_t>(s.Q, tile.columns));
  a.by_row_tile = FastDiv(ceil_div<int64_t>(s.P, kRows));
  a.by_chunk = FastDiv(ceil_div<int64_t>(s.C, tile.channels));
  a.by_channel = FastDiv(tile.channels);
  const LaunchConfig config{dim3(static_cast<unsigned>(spatial_blocks(s, tile))), dim3(kThreads),
                            static_cast<size_t>(tile.smem_bytes), stream};
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(spatial_kernel<T>, config, a, static_cast<const T*>(x), static_cast<const T*>(filters.column),
                  static_cast<const T*>(filters.row), static_cast<T*>(y));
  });
}

}  // namespace sepconv::cuda
