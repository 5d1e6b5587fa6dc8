// grad_weight for any groups, strides, kernel, dilation and padding. Two stages, no atomics: each block sums its part
// of the output pixels for its weights and writes one partial sum a weight; sum_partials.cu adds the parts up in a
// fixed order.
//
//   partials[split, k, c, r, s] = sum over pixels (n, p, q) of the split of
//                                 grad_y[n, k, p, q] * x[n, c, p * stride + r * dilation - pad, q * stride + ...]
//
// Threads to data: a thread sums a tile of kTile x kTile (output, input) channels of one group at one tap (r, s), so
// that a value that it loads is used kTile times; the channels of a tile are interleaved, so that neighbouring tiles
// read neighbours.
//   kChannelLanes (grad_y channels_last): the lanes of a warp own 32 neighbouring tiles and walk the same pixels; the
//   eight warps of a block own the same tiles and take turns at the pixels of the split. otherwise: the whole block
//   owns one tile, and its 256 threads take turns at the pixels, which are neighbours in memory.
// A thread walks its pixels by adding a fixed step to (n, p, q) with carries: the loop does not divide.
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/grouped/cut.h"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename Index>
struct GroupedGradWeightArgs {
  using I = std::make_signed_t<Index>;
  I H, W, P, Q, R, S;
  I stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  I k_per_group, c_per_group, k_tiles, c_tiles;  // tiles of one group
  Index tiles;                                   // [R, S, c_tiles, groups, k_tiles]
  Index pixels, pixels_a_split;
  I step_n, step_p, step_q;  // the workers of a block, as a step in (n, p, q)
  int64_t weights;           // K * C / groups * R * S
  Divider<Index> by_q, by_p, by_k_tile, by_group, by_c_tile, by_s;
  Offsets<Index> x, y;
};

template <typename T, typename Index, int kTile, bool kChannelLanes>
__global__ void __launch_bounds__(kThreads)
    grad_weight_kernel(const GroupedGradWeightArgs<Index> a, const T* __restrict__ grad_y, const T* __restrict__ x,
                       acc_t<T>* __restrict__ partials) {
  wait_for_earlier_kernels();
  using I = std::make_signed_t<Index>;
  using A = acc_t<T>;
  constexpr int kSums = kTile * kTile;
  constexpr int kWorkers = kChannelLanes ? kWarps : kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Which weights. Lanes beyond the last tile work on tile 0 and write nothing: every thread reaches every barrier.
  Index tile = kChannelLanes ? static_cast<Index>(blockIdx.x) * 32 + lane : static_cast<Index>(blockIdx.x);
  const bool owns = tile < a.tiles;
  if (!owns) tile = 0;
  Index k_tile = tile;
  Index group = a.by_k_tile.split(k_tile);
  Index c_tile = a.by_group.split(group);
  Index s = a.by_c_tile.split(c_tile);
  const Index r = a.by_s.split(s);
  Index k_at[kTile], c_at[kTile];
#pragma unroll
  for (int j = 0; j < kTile; ++j) {  // a tile that reaches beyond the group reads the last channel there
    const I k = min(static_cast<I>(k_tile) + j * a.k_tiles, a.k_per_group - 1);
    const I c = min(static_cast<I>(c_tile) + j * a.c_tiles, a.c_per_group - 1);
    k_at[j] = (group * a.k_per_group + k) * a.y.c;
    c_at[j] = (group * a.c_per_group + c) * a.x.c;
  }
  const I tap_row = static_cast<I>(r) * a.dilation_h - a.pad_h, tap_column = static_cast<I>(s) * a.dilation_w - a.pad_w;

  const Index begin = static_cast<Index>(blockIdx.y) * a.pixels_a_split;
  const Index end = min(begin + a.pixels_a_split, a.pixels);
  Index pixel = begin + static_cast<Index>(kChannelLanes ? warp : threadIdx.x);
  Index column = pixel;
  Index row = a.by_q.split(column);
  I n = static_cast<I>(a.by_p.split(row)), p = static_cast<I>(row), q = static_cast<I>(column);

  A sums[kSums] = {};
  for (; pixel < end; pixel += kWorkers) {
    const I h = p * a.stride_h + tap_row, w = q * a.stride_w + tap_column;
    if (h >= 0 && h < a.H && w >= 0 && w < a.W) {
      const Index y_pixel = n * a.y.n + p * a.y.h + q * a.y.w, x_pixel = n * a.x.n + h * a.x.h + w * a.x.w;
      A g[kTile], v[kTile];
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        g[j] = to_acc(grad_y[y_pixel + k_at[j]]);
        v[j] = to_acc(x[x_pixel + c_at[j]]);
      }
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) sums[j * kTile + i] += g[j] * v[i];
      }
    }
    q += a.step_q;
    p += a.step_p;
    n += a.step_n;
    if (q >= a.Q) {
      q -= a.Q;
      ++p;
    }
    if (p >= a.P) {
      p -= a.P;
      ++n;
    }
  }

  // Add up the workers of the block in a fixed order and store.
  const auto store = [&](int slot, A sum) {
    const I k = static_cast<I>(k_tile) + slot / kTile * a.k_tiles,
            c = static_cast<I>(c_tile) + slot % kTile * a.c_tiles;
    if (!owns || k >= a.k_per_group || c >= a.c_per_group) return;
    const Index weight = (((group * a.k_per_group + k) * a.c_per_group + c) * a.R + r) * a.S + s;
    partials[static_cast<int64_t>(blockIdx.y) * a.weights + weight] = sum;
  };
  if constexpr (kChannelLanes) {
    SMEM_ARRAY(A, shared, [kWarps][kSums][32]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared[warp][i][lane] = sums[i];
    __syncthreads();
    for (int i = warp; i < kSums; i += kWarps) {
      A sum = 0;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += shared[j][i][lane];
      store(i, sum);
    }
  } else {
    SMEM_ARRAY(A, shared, [kWarps][kSums]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      }
      if (lane == 0) shared[warp][i] = sums[i];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kSums) {
      A sum = 0;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += shared[j][threadIdx.x];
      store(static_cast<int>(threadIdx.x), sum);
    }
  }
}

template <typename T, typename Index, int kTile, bool kChannelLanes>
cudaError_t start(const Launch& call, int splits) {
  const ConvShape& s = call.shape;
  using I = std::make_signed_t<Index>;
  const auto i = [](int64_t v) { return static_cast<I>(v); };
  const int64_t workers = kChannelLanes ? kWarps : kThreads;
  const int64_t pixels = s.N * s.P * s.Q, tiles = grouped_grad_weight_tiles(s);
  const int64_t k_tiles = ceil_div<int64_t>(s.outputs_per_group(), kTile);
  const int64_t c_tiles = ceil_div<int64_t>(s.channels_per_group(), kTile);
  const GroupedGradWeightArgs<Index> args{i(s.H),
                                          i(s.W),
                                          i(s.P),
                                          i(s.Q),
                                          i(s.R),
                                          i(s.S),
                                          i(s.stride_h),
                                          i(s.stride_w),
                                          i(s.pad_h),
                                          i(s.pad_w),
                                          i(s.dilation_h),
                                          i(s.dilation_w),
                                          i(s.outputs_per_group()),
                                          i(s.channels_per_group()),
                                          i(k_tiles),
                                          i(c_tiles),
                                          static_cast<Index>(tiles),
                                          static_cast<Index>(pixels),
                                          static_cast<Index>(ceil_div<int64_t>(pixels, splits)),
                                          i(workers / s.Q / s.P),
                                          i(workers / s.Q % s.P),
                                          i(workers % s.Q),
                                          s.weight_elements(),
                                          Divider<Index>(s.Q),
                                          Divider<Index>(s.P),
                                          Divider<Index>(k_tiles),
                                          Divider<Index>(s.groups),
                                          Divider<Index>(c_tiles),
                                          Divider<Index>(s.S),
                                          Offsets<Index>(s.x),
                                          Offsets<Index>(s.y)};
  const int64_t blocks = kChannelLanes ? ceil_div<int64_t>(tiles, 32) : tiles;
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), dim3(kThreads), 0,
                            call.stream};
  return launch(grad_weight_kernel<T, Index, kTile, kChannelLanes>, config, args, call.first_as<T>(),
                call.second_as<T>(), call.workspace_as<acc_t<T>>());
}

}  // namespace

cudaError_t launch_grouped_grad_weight(const Launch& call, const SplitsCut& cut) {
  const ConvShape& s = call.shape;
  const cudaError_t error = dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto choose = [&](auto index, auto tile) {
      using Index = decltype(index);
      constexpr int kTile = decltype(tile)::value;
      return grouped_grad_weight_lanes_are_channels(s) ? start<T, Index, kTile, true>(call, cut.splits)
                                                       : start<T, Index, kTile, false>(call, cut.splits);
    };
    const auto choose_tile = [&](auto index) {
      return grouped_grad_weight_tile(s) == 1 ? choose(index, std::integral_constant<int, 1>{})
                                              : choose(index, std::integral_constant<int, kGroupedGradWeightTile>{});
    };
    return grouped_is_narrow(s) ? choose_tile(uint32_t{}) : choose_tile(int64_t{});
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
