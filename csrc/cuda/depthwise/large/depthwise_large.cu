// Depthwise forward and grad_input of stride 1 with large kernels, in plain arithmetic: any layout, any dtype (half
// types in NCHW from 7x7 on have depthwise_toeplitz.cu), up to 64 taps a side.
//
// A block lays planes (images, channels or both) of a strip of rows and a tile of columns into shared memory, with
// zeros for the columns of the padding, and the filters of its channels, turned around for grad_input. Its threads then
// keep tiles of kKeep x 8 results each in registers (depthwise_large.cuh has the map and the loop), which are bound by
// the multiply-adds: shared memory gives each of 32 kKeep of them kKeep + 1 loads.
#include "cuda/depthwise/large/depthwise_large.cuh"

namespace sepconv::cuda {
namespace {

using large::Lane;
using large::LargeArgs;

struct Weights {
  int64_t n, h, w;
  bool turned;  // read from the last tap to the first
};
struct Results {
  int64_t n, c, h, w;
  bool quads;  // four neighbouring columns can be stored as one
};

// The filters of the block's channels, [channels][R][filter_columns]. A warp takes a row.
template <typename T>
__device__ __forceinline__ void stage_filters(const LargeArgs& a, const Weights& from, int first_channel,
                                              const T* __restrict__ w, acc_t<T>* filters) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < a.block.channels * a.filter_h; i += warps) {
    uint32_t r = i;
    const int c = static_cast<int>(a.by_filter_rows.split(r)), k = first_channel + c;
    const T* const line = w + k * from.n + (from.turned ? a.filter_h - 1 - static_cast<int>(r) : r) * from.h;
    acc_t<T>* const to = filters + c * a.block.filter_plane + static_cast<int>(r) * a.block.filter_columns;
    for (int s = lane; s < a.filter_w; s += 32) {
      large::put<T>(to + s, line + (from.turned ? a.filter_w - 1 - s : s) * from.w, k < a.channels);
    }
  }
}

// 7 rows: the compiler needs less than 128 registers, as two blocks have them, on 8.0 and 9.0, but 177 on 10.0
// and 12.0.
template <typename T, int kKeep>
__global__ void __launch_bounds__(kLargeThreads, sizeof(T) == 8 || kKeep == 7 ? 1 : 2)
    large_kernel(const LargeArgs a, const Weights weights, const Results results, const T* __restrict__ image,
                 const T* __restrict__ w, const T* __restrict__ bias, const Activation activation,
                 T* __restrict__ out) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  DYN_SMEM(smem);
  A* const zeros = reinterpret_cast<A*>(smem);
  A* const filters = zeros + kLargeColumns + a.block.filter_columns;
  A* const tiles = filters + a.block.channels * a.block.filter_plane;
  const Lane lane(a);

  uint32_t channel_block = blockIdx.x;
  uint32_t column_tile = a.by_channel_blocks.split(channel_block);
  uint32_t strip = a.by_column_tiles.split(column_tile);
  const int first_image = static_cast<int>(a.by_strips.split(strip)) * a.block.images;
  const int first_channel = static_cast<int>(channel_block) * a.block.channels;
  const int first_row = static_cast<int>(strip) * a.block.result_rows;
  const int first_column = static_cast<int>(column_tile) * a.block.result_columns;
  // Of the image, the rows that the strip meets and that exist.
  const int last_row = min(first_row + a.block.result_rows, a.result_h);
  const int above = max(first_row - a.pad_h, 0);
  const int rows = max(min(last_row - a.pad_h + a.filter_h - 1, a.image.rows) - above, 0);

  large::clear(zeros, kLargeColumns + a.block.filter_columns);
  stage_filters<T>(a, weights, first_channel, w, filters);
  large::stage<T>(a, a.image, a.by_image_rows, a.by_multiplier,
                  {first_image, first_channel, above, rows, first_column - a.pad_w, a.block.pitch}, a.block.pitch,
                  a.block.plane, image, tiles);
  large::finish_stage();

  uint32_t channel = lane.plane;
  const int n = first_image + static_cast<int>(a.by_channels.split(channel));
  const int k = first_channel + static_cast<int>(channel);
  const int p = first_row + lane.row * kKeep, q = first_column + lane.column * kLargeColumns;
  A sums[kKeep * kLargeColumns] = {};
  large::correlate<kKeep>(a, sums, tiles + lane.plane * a.block.plane + lane.column * kLargeColumns,
                          p - a.pad_h - above, rows, zeros, filters + channel * a.block.filter_plane, a.filter_w,
                          a.filter_h);
  if (threadIdx.x >= a.block.used || n >= a.N || k >= a.channels) return;
  const A add = bias != nullptr ? to_acc(bias[k]) : A(0);
#pragma unroll
  for (int i = 0; i < kKeep * kLargeColumns; ++i) sums[i] += add;
  activate_all<T>(activation, sums);
  T* const to = out + n * results.n + k * results.c + p * results.h + q * results.w;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) {
    if (p + i >= a.result_h) continue;
#pragma unroll
    for (int c = 0; c < kLargeColumns; c += 4) {
      const A four[4] = {sums[i * kLargeColumns + c], sums[i * kLargeColumns + c + 1], sums[i * kLargeColumns + c + 2],
                         sums[i * kLargeColumns + c + 3]};
      if (results.quads) {
        if constexpr (sizeof(T) < 8) {
          if (q + c < a.result_w) store_vec<4>(to + i * results.h + c, four);
        }
        continue;
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (q + c + v < a.result_w) to[i * results.h + (c + v) * results.w] = from_acc<T>(four[v]);
      }
    }
  }
}

cudaError_t run(Map map, const Launch& call, const LargeCut& cut) {
  const ConvShape& s = call.shape;
  const Correlation c = correlation(map, s);
  return large::dispatch(call.dtype, cut.keep, [&](auto tag, auto keep) {
    using T = typename decltype(tag)::type;
    constexpr int kKeep = decltype(keep)::value;
    LargeArgs a = large::make_args(s, c, large_block(c, cut, sizeof(acc_t<T>)));
    a.image = large::make_planes(c.image, c.image_h, c.image_w, c.N, map == Map::forward ? s.C : s.K);
    a.image.quads = a.image.quads && c.pad_w % 4 == 0 && large::aligned16(call.first);
    const bool quads = large::make_planes(c.result, c.result_h, c.result_w, c.N, c.channels).quads && sizeof(T) < 8 &&
                       large::aligned16(call.out);
    const Results results{c.result.n, c.result.c, c.result.h, c.result.w, quads};
    const LaunchConfig config{dim3(static_cast<unsigned>(a.by_channel_blocks.divisor * a.places)),
                              dim3(a.block.threads), static_cast<size_t>(a.block.smem_bytes), call.stream};
    return launch(large_kernel<T, kKeep>, config, a, Weights{s.w.n, s.w.h, s.w.w, c.turned}, results,
                  call.first_as<T>(), call.second_as<T>(), call.bias_as<T>(), call.epilogue.activation,
                  call.out_as<T>());
  });
}

}  // namespace

cudaError_t launch_depthwise_large_forward(const Launch& call, const LargeCut& cut) {
  return run(Map::forward, call, cut);
}

cudaError_t launch_depthwise_large_grad_input(const Launch& call, const LargeCut& cut) {
  return run(Map::grad_input, call, cut);
}

}  // namespace sepconv::cuda
