// What depthwise_large.cu and depthwise_large_grad_weight.cu share: how a block lays planes into shared memory, and the
// inner loop, which correlates a plane of an image with a plane of a filter (core/correlation.h says what is which).
//
// Thread-to-data map. A thread keeps a tile of kKeep rows and 8 columns of results in registers. It walks over the rows
// of the image that they meet; along such a row it slides a window of 11 values by four columns at a time. The window
// meets kKeep rows of the filter: of each it reads four taps, as one load of 16 bytes that most threads of a warp
// share. So kKeep + 1 loads of shared memory feed 32 kKeep multiply-adds. Rows beyond the filter at either end are
// skipped by a branch that is the same for the whole warp; of rows beyond the image only those are walked that another
// thread of the warp has, and they are read as zeros. Threads: columns fastest, then planes, rows, and parts of the
// filter's rows, so that a warp meets few rows of the image.
#pragma once

#include "cuda/depthwise/large/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda::large {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Planes of an image in memory: the strides of a tensor, in elements, and how many rows and columns exist.
struct Planes {
  int64_t n, c;
  int h, w, rows, columns;
  bool quads;  // four neighbouring columns, from one that is a multiple of four, can be read as one
};

struct LargeArgs {
  Planes image, filter;  // filter: grad_weight only
  int N, channels, result_h, result_w, pad_h, pad_w, filter_h, filter_w;
  LargeBlock block;
  int images, row_channels;  // planes of a block that are a row of loads each; channels side by side in such a row
  FastDiv by_row_channels, by_image_rows, by_filter_rows, by_planes, by_columns, by_rows, by_multiplier;
  FastDiv by_channel_blocks, by_channels, by_column_tiles, by_strips;
  uint32_t places;
};

inline LargeArgs make_args(const ConvShape& s, const Correlation& c, const LargeBlock& block) {
  const LargePlaces places = large_places(c, block);
  LargeArgs a{};
  a.N = static_cast<int>(c.N), a.channels = static_cast<int>(c.channels), a.block = block;
  a.result_h = static_cast<int>(c.result_h), a.result_w = static_cast<int>(c.result_w);
  a.filter_h = static_cast<int>(c.filter_h), a.filter_w = static_cast<int>(c.filter_w);
  a.pad_h = static_cast<int>(c.pad_h), a.pad_w = static_cast<int>(c.pad_w);
  a.row_channels = c.channels_dense ? block.channels : 1;
  a.by_row_channels = FastDiv(a.row_channels), a.by_image_rows = FastDiv(block.image_rows);
  a.by_filter_rows = FastDiv(block.filter_rows);
  a.by_planes = FastDiv(block.planes()), a.by_columns = FastDiv(block.column_threads),
  a.by_rows = FastDiv(block.row_threads);
  a.by_multiplier = FastDiv(s.K / s.C), a.by_channels = FastDiv(block.channels);
  a.by_channel_blocks = FastDiv(places.channel_blocks), a.by_column_tiles = FastDiv(places.column_tiles);
  a.by_strips = FastDiv(places.strips), a.places = static_cast<uint32_t>(places.places());
  return a;
}

inline Planes make_planes(const Strides& t, int64_t rows, int64_t columns, int64_t N, int64_t channels) {
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % 4 == 0; };
  const bool quads =
      (columns == 1 || t.w == 1) && columns % 4 == 0 && whole(rows, t.h) && whole(channels, t.c) && whole(N, t.n);
  // The stride of a single plane may be anything, but copies need addresses on 16 bytes for planes that do not exist
  // too.
  return {N > 1 ? t.n : 0,
          channels > 1 ? t.c : 0,
          static_cast<int>(t.h),
          static_cast<int>(t.w),
          static_cast<int>(rows),
          static_cast<int>(columns),
          quads};
}

// Where tensors begin is known at the launch only.
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One element to shared memory, zero where not `valid`: float as it is, without passing through a register.
template <typename T>
__device__ __forceinline__ void put(acc_t<T>* to, const T* from, bool valid) {
  if constexpr (std::is_same_v<T, float>) {
    cp_async4(to, from, valid);
  } else {
    *to = valid ? to_acc(*from) : acc_t<T>(0);
  }
}

// What a block takes at a time. Rows and columns of the image may lie outside of it.
struct Window {
  int first_image, first_channel, first_row, rows, first_column, columns;
};

// Lays rows [first_row, first_row + rows) and columns [first_column, first_column + columns) of each plane into `tile`;
// zeros where there is no pixel and no plane. A warp takes a row of a plane, or of all channels of an image
// where channels are dense. by_rows.divisor is at least `rows`.
template <typename T>
__device__ __forceinline__ void stage(const LargeArgs& a, const Planes& from, const FastDiv& by_rows,
                                      const FastDiv& by_multiplier, const Window& window, int pitch, int plane,
                                      const T* __restrict__ data, acc_t<T>* tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int outer = a.row_channels == 1 ? a.block.channels : 1;  // channels that are rows of their own
  const int rows = static_cast<int>(by_rows.divisor) * a.block.images * outer;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) / 32; i < rows; i += warps) {
    uint32_t row = i;
    const int owner = static_cast<int>(by_rows.split(row));
    if (static_cast<int>(row) >= window.rows) continue;
    const int image = outer == 1 ? owner : static_cast<int>(a.by_channels.div(owner));
    const int channel = owner - image * outer;
    const int n = window.first_image + image, k = window.first_channel + channel;
    const int h = window.first_row + static_cast<int>(row);
    const bool line_exists = n < a.N && h < from.rows;
    const T* const line = data + n * from.n + static_cast<int64_t>(h) * from.h;
    acc_t<T>* const to = tile + (image * a.block.channels + channel) * plane + static_cast<int>(row) * pitch;
    const auto column_exists = [&](int w) { return static_cast<unsigned>(w) < static_cast<unsigned>(from.columns); };
    if (a.row_channels == 1) {
      const bool exists = line_exists && k < a.channels;
      const T* const pixels = line + by_multiplier.div(k) * from.c;
      if constexpr (std::is_same_v<T, float>) {
        if (from.quads) {
          for (int j = 4 * lane; j < window.columns; j += 128) {
            const int w = window.first_column + j;
            cp_async16(to + j, pixels + w, exists && column_exists(w));
          }
          continue;
        }
      }
#pragma unroll 2
      for (int j = lane; j < window.columns; j += 32) {
        const int w = window.first_column + j;
        put<T>(to + j, pixels + w * from.w, exists && column_exists(w));
      }
    } else {
#pragma unroll 2
      for (int i = lane; i < window.columns * a.row_channels; i += 32) {
        uint32_t c = i;
        const int j = static_cast<int>(a.by_row_channels.split(c)), w = window.first_column + j;
        const int own = window.first_channel + static_cast<int>(c);
        put<T>(to + static_cast<int>(c) * plane + j, line + by_multiplier.div(own) * from.c + w * from.w,
               line_exists && own < a.channels && column_exists(w));
      }
    }
  }
}

__device__ __forceinline__ void finish_stage() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

// A thread's place among the results of its block. Threads too many repeat the last one.
struct Lane {
  int part, column, plane, row;
  __device__ __forceinline__ explicit Lane(const LargeArgs& a) {
    uint32_t own = min(threadIdx.x, a.block.used - 1u);
    uint32_t above = a.by_columns.split(own), over = a.by_planes.split(above);
    column = static_cast<int>(own), plane = static_cast<int>(above);
    part = static_cast<int>(a.by_rows.split(over));
    row = static_cast<int>(over);
  }
};

template <typename A>
__device__ __forceinline__ void load_four(A* to, const A* from) {
  constexpr int kVec = kVec16<A>;
#pragma unroll
  for (int i = 0; i < 4; i += kVec) {
    const Vec<A, kVec> in = *reinterpret_cast<const Vec<A, kVec>*>(from + i);
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[i + v] = in.v[v];
  }
}

// One row of the image. `taps` is row j of the filter and meets the first row of results, the rows before it meet the
// next; those in [0, rows) exist (kAll: all of them do).
template <int kKeep, bool kAll, typename A>
__device__ __forceinline__ void walk_row(A (&sums)[kKeep * kLargeColumns], const A* pixels, const A* taps, int pitch,
                                         int columns, int j, int rows) {
  const auto exists = [&](int i) { return kAll || static_cast<unsigned>(j - i) < static_cast<unsigned>(rows); };
  A window[kLargeColumns + 4];
  load_four(window, pixels);
  load_four(window + 4, pixels + 4);
  int s = 0;
#pragma unroll(kAll ? 2 : 1)
  for (; s + 4 <= columns; s += 4) {
    load_four(window + 8, pixels + s + 8);
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      if (!exists(i)) continue;
      A tap[4];
      load_four(tap, taps - i * pitch + s);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < kLargeColumns; ++c) sums[i * kLargeColumns + c] += window[c + k] * tap[k];
      }
    }
#pragma unroll
    for (int c = 0; c < kLargeColumns; ++c) window[c] = window[c + 4];
  }
  if (s == columns) return;
  load_four(window + 8, pixels + s + 8);
#pragma unroll 1
  for (; s < columns; ++s) {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      if (!exists(i)) continue;
      const A tap = taps[s - i * pitch];
#pragma unroll
      for (int c = 0; c < kLargeColumns; ++c) sums[i * kLargeColumns + c] += window[c] * tap;
    }
#pragma unroll
    for (int c = 0; c < kLargeColumns + 1; ++c) window[c] = window[c + 1];
  }
}

// Adds what a thread's results meet of `filter_rows` rows and `columns` columns of a filter. Its first row of results
// meets the first of these rows at row `top` of the tile, of which rows [0, rows) exist.
template <int kKeep, typename A>
__device__ __forceinline__ void correlate(const LargeArgs& a, A (&sums)[kKeep * kLargeColumns], const A* tile, int top,
                                          int rows, const A* zeros, const A* filter, int columns, int filter_rows) {
  int lowest = top, highest = top;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    lowest = min(lowest, __shfl_xor_sync(kFullWarp, lowest, i));
    highest = max(highest, __shfl_xor_sync(kFullWarp, highest, i));
  }
  const int first = max(0, -highest), last = min(filter_rows + kKeep - 1, rows - lowest);
  const int pitch = a.block.filter_columns;
  const A* taps = filter + first * pitch;
#pragma unroll 1
  for (int j = first; j < last; ++j, taps += pitch) {
    const int row = top + j;
    const A* const pixels =
        static_cast<unsigned>(row) < static_cast<unsigned>(rows) ? tile + row * a.block.pitch : zeros;
    if (j >= kKeep - 1 && j < filter_rows) {
      walk_row<kKeep, true>(sums, pixels, taps, pitch, columns, j, filter_rows);
    } else {
      walk_row<kKeep, false>(sums, pixels, taps, pitch, columns, j, filter_rows);
    }
  }
}

// The block's row of zeros, at the beginning of its shared memory.
template <typename A>
__device__ __forceinline__ void clear(A* zeros, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) zeros[i] = A(0);
}

// Calls f(type, keep) with the two as types.
template <typename F>
cudaError_t dispatch(DType dtype, int keep, F&& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    switch (keep) {
      case 1: return f(tag, Int<1>{});
      case 4: return f(tag, Int<4>{});
      default:
        if constexpr (sizeof(typename decltype(tag)::type) == 8)
          return cudaErrorInvalidValue;
        else
          return f(tag, Int<7>{});
    }
  });
}

}  // namespace sepconv::cuda::large
