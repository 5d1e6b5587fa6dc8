// Depthwise grad_weight of stride 1 with large kernels, in plain arithmetic: any layout, any multiplier, any dtype
// (half types in NCHW from 7x7 on have depthwise_toeplitz.cu), up to 64 taps a side.
//
// The gradient of a filter is the correlation of x with grad_y, added up over the images: the loop is that of forward
// (depthwise_large.cuh), with grad_y in the place of the filter and the taps in the place of the results.
//
// Thread-to-data map. A block owns some channels and a part (split) of the places: a place is a strip of rows and a
// tile of columns of grad_y, in `images` images. It lays those, and the pixels of x that they meet, into shared memory.
// A thread keeps kKeep x 8 taps of one channel in registers, to the end, and takes one of the images and one part of
// the strip's rows. At the end the sums of a tap are added up in the order of parts and images, and launch_sum_partials
// adds up the splits: nothing is added atomically.
#include "cuda/depthwise/large/depthwise_large.cuh"

namespace sepconv::cuda {
namespace {

using large::Lane;
using large::LargeArgs;

template <typename T, int kKeep>
__global__ void __launch_bounds__(kLargeThreads, sizeof(T) == 8 ? 1 : 2)
    large_grad_weight_kernel(const LargeArgs a, const uint32_t splits, const FastDiv keep_one,
                             const T* __restrict__ grad_y, const T* __restrict__ x, acc_t<T>* __restrict__ partials) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  constexpr int kSums = kKeep * kLargeColumns;
  DYN_SMEM(smem);
  A* const zeros = reinterpret_cast<A*>(smem);
  A* const grads = zeros + kLargeColumns + a.block.filter_columns;
  A* const tiles = grads + a.block.filter_planes * a.block.filter_plane;
  const Lane lane(a);
  uint32_t channel_block = blockIdx.x;
  const uint32_t split = a.by_channel_blocks.split(channel_block);
  const int first_channel = static_cast<int>(channel_block) * a.block.channels;
  const int part_row = lane.part * a.block.part_rows;
  const A* const pixels = tiles + lane.plane * a.block.plane + lane.column * kLargeColumns;
  const A* const own_grads = grads + lane.plane * a.block.filter_plane + part_row * a.block.filter_columns;

  A sums[kSums] = {};
  for (uint32_t place = split; place < a.places; place += splits) {
    uint32_t column_tile = place;
    uint32_t strip = a.by_column_tiles.split(column_tile);
    const int first_image = static_cast<int>(a.by_strips.split(strip)) * a.block.images;
    const int first_row = static_cast<int>(strip) * a.block.filter_rows;
    const int first_column = static_cast<int>(column_tile) * a.block.filter_columns;
    const int above = max(first_row - a.pad_h, 0);
    const int last_row = min(first_row + a.block.filter_rows - a.pad_h + a.result_h - 1, a.image.rows);
    const int rows = max(last_row - above, 0);
    large::clear(zeros, kLargeColumns + a.block.filter_columns);
    large::stage<T>(a, a.filter, a.by_filter_rows, keep_one,
                    {first_image, first_channel, first_row, a.block.filter_rows, first_column, a.block.filter_columns},
                    a.block.filter_columns, a.block.filter_plane, grad_y, grads);
    large::stage<T>(a, a.image, a.by_image_rows, a.by_multiplier,
                    {first_image, first_channel, above, rows, first_column - a.pad_w, a.block.pitch}, a.block.pitch,
                    a.block.plane, x, tiles);
    large::finish_stage();
    large::correlate<kKeep>(a, sums, pixels, first_row + part_row + lane.row * kKeep - a.pad_h - above, rows, zeros,
                            own_grads, min(a.block.filter_columns, a.filter_w - first_column), a.block.part_rows);
    __syncthreads();  // what was laid out has no readers left
  }

  // [kSums][threads], threads as large::Lane has them.
  A* const total = reinterpret_cast<A*>(smem);
#pragma unroll
  for (int i = 0; i < kSums; ++i) total[i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)] = sums[i];
  __syncthreads();
  const uint32_t taps = a.result_h * a.result_w;
  for (uint32_t i = threadIdx.x; i < taps * a.block.channels; i += blockDim.x) {
    const uint32_t channel = i / taps, tap = i - channel * taps, r = tap / a.result_w, s = tap - r * a.result_w;
    const int k = first_channel + static_cast<int>(channel);
    if (k >= a.channels) continue;
    const int value = static_cast<int>(r % kKeep * kLargeColumns + s % kLargeColumns);
    A sum = 0;
    for (int part = 0; part < a.block.parts; ++part) {
      for (int image = 0; image < a.block.images; ++image) {
        const int plane = image * a.block.channels + static_cast<int>(channel);
        const int row = part * a.block.row_threads + static_cast<int>(r) / kKeep;
        const int owner = (row * a.block.images * a.block.channels + plane) * a.block.column_threads +
                          static_cast<int>(s) / kLargeColumns;
        sum += total[value * static_cast<int>(blockDim.x) + owner];
      }
    }
    partials[(static_cast<int64_t>(split) * a.channels + k) * taps + tap] = sum;
  }
}

}  // namespace

cudaError_t launch_depthwise_large_grad_weight(const Launch& call, const LargeCut& cut) {
  const ConvShape& s = call.shape;
  const Correlation c = correlation(Map::grad_weight, s);
  const cudaError_t error = large::dispatch(call.dtype, cut.keep, [&](auto tag, auto keep) {
    using T = typename decltype(tag)::type;
    LargeArgs a = large::make_args(s, c, large_block(c, cut, sizeof(acc_t<T>)));
    a.image = large::make_planes(s.x, s.H, s.W, s.N, s.C);
    a.image.quads = a.image.quads && c.pad_w % 4 == 0 && large::aligned16(call.second);
    a.filter = large::make_planes(s.y, s.P, s.Q, s.N, s.K);
    a.filter.quads = a.filter.quads && large::aligned16(call.first);
    const LaunchConfig config{dim3(a.by_channel_blocks.divisor * cut.splits), dim3(a.block.threads),
                              static_cast<size_t>(a.block.smem_bytes), call.stream};
    return launch(large_grad_weight_kernel<T, decltype(keep)::value>, config, a, cut.splits, FastDiv(1),
                  call.first_as<T>(), call.second_as<T>(), call.workspace_as<acc_t<T>>());
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
