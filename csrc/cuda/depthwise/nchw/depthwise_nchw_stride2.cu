// Depthwise grad_input of stride 2, of dense rows (contiguous, or channels cut out of it), kernels 3x3, 5x5 and 7x7.
// depthwise_nchw.cuh has the tiles and their copies.
//
// With v = h + pad_h and u = w + pad_w, grad_y[p, q] * w[r, s] goes to grad_x[v = 2 p + r, u = 2 q + s]: each parity of
// (v, u) has a filter of its own, the taps of that parity, and all four read the same values of grad_y.
//
// Thread-to-data map. A block's planes of grad_y stand in shared memory. A thread owns kPairs neighbouring pairs of
// columns (u even, u + 1) of one plane of grad_x, and walks down `rows` pairs of rows (v even, v + 1); neighbouring
// threads take neighbouring runs of columns, then the next strip of rows, then the next plane. The filter is in
// registers, and so are the last rows of grad_y: a step reads one more and finishes one pair of rows.
#include "cuda/depthwise/nchw/depthwise_nchw.cuh"

namespace sepconv::cuda {
namespace {

// Copies what begins at tile + elements_off(to) to to[0 .. count).
template <typename T>
__device__ __forceinline__ void write_range(T* __restrict__ to, const T* tile, int count) {
  const Pieces<T> pieces(to, count);
  T* const base = to - pieces.begin;
#pragma unroll 1
  for (int i = pieces.whole + static_cast<int>(threadIdx.x); i < pieces.whole_end; i += static_cast<int>(blockDim.x)) {
    reinterpret_cast<uint4*>(base)[i] = reinterpret_cast<const uint4*>(tile)[i];
  }
  if (pieces.single >= 0) base[pieces.single] = tile[pieces.single];
}

template <typename T, int kKernel, int kPairs>
__global__ void __launch_bounds__(kNchwThreads, 2)
    grad_input_stride2_kernel(const PlaneArgs a, const int pairs_of_rows, const T* __restrict__ grad_y,
                              const T* __restrict__ w, T* __restrict__ grad_x) {
  wait_for_earlier_kernels();
  constexpr int kReach = (kKernel - 1) / 2, kWindow = kPairs + kReach, kRing = kReach + 1, kRun = 2 * kPairs;
  constexpr int kTaps = kKernel * kKernel;
  DYN_SMEM(smem);
  T* const in = reinterpret_cast<T*>(smem);
  T* const out = reinterpret_cast<T*>(smem + a.in_bytes);
  T* const filters = reinterpret_cast<T*>(smem + a.in_bytes + a.out_bytes);
  const PlaneBlock block(a);
  // A pair has the number of the row of grad_y that the first tap meets.
  const int first_pair = a.pad_h / 2 + block.band_row;
  const int end_pair = min(first_pair + a.band, a.pad_h / 2 + pairs_of_rows);
  const int out_row = max(2 * first_pair - a.pad_h, 0), end_row = min(2 * end_pair - a.pad_h, a.out_rows);
  const int in_row = max(first_pair - kReach, 0), in_rows = max(min(end_pair, a.in_rows) - in_row, 0);
  const T* const from = grad_y + block.n * a.in_n + block.first * a.in_c + static_cast<int64_t>(in_row) * a.in_columns;
  T* const to = grad_x + block.n * a.out_n + block.first * a.out_c + static_cast<int64_t>(out_row) * a.out_columns;
  const T* const filter = w + static_cast<int64_t>(block.first) * kTaps;
  const int in_plane = a.in_rows * a.in_columns, out_plane = a.out_rows * a.out_columns;  // apart, where several

  StagedRange<T> image(in, from, (block.planes - 1) * in_plane + in_rows * a.in_columns);
  StagedRange<T> weights(filters, filter, block.planes * kTaps);
  image.begin(), weights.begin();
  cp_async_commit();
  image.load(), weights.load();
  image.store(), weights.store();
  cp_async_wait<0>();
  __syncthreads();

  const int items = block.planes * static_cast<int>(a.by_strips.divisor * a.by_runs.divisor);
  for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
    const PlaneThread own(a, item);
    const int pair = first_pair + own.strip * a.rows, first_q = a.pad_w / 2 + own.run * kPairs - kReach;
    const int column = 2 * (first_q + kReach) - a.pad_w;
    uint32_t masks = columns_inside<kWindow>(first_q, a.in_columns) | columns_inside<kRun>(column, a.out_columns) << 16;
    const uint32_t rows_read = opaque(in_rows), rows_written = opaque(end_row - out_row);
    float taps[kKernel][kKernel];
    load_filter(taps, filters + elements_off(filter) + own.plane * kTaps, false);
    int p = pair - kReach - in_row;  // in the tile
    const T* row = in + elements_off(from) + own.plane * in_plane + p * a.in_columns + first_q;
    int h = 2 * pair - a.pad_h - out_row;  // in the tile
    T* result = out + elements_off(to) + own.plane * out_plane + h * a.out_columns + column;

    float ring[kRing][kWindow] = {};  // the columns outside stay zero
    for (int turn = 0; turn < a.rows + kReach; turn += kRing) {
#pragma unroll
      for (int phase = 0; phase < kRing; ++phase) {
        const int step = turn + phase;
        if (step >= a.rows + kReach) break;
        masks = opaque(masks);  // else its bits would be kept in as many registers
        if (static_cast<uint32_t>(p) < rows_read) {
          load_run(ring[phase], row, masks);
        } else {
#pragma unroll
          for (float& value : ring[phase]) value = 0.f;
        }
        ++p, row += a.in_columns;
        if (step < kReach) continue;  // all threads alike
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          float sums[kRun] = {};
#pragma unroll
          for (int r = odd; r < kKernel; r += 2) {
#pragma unroll
            for (int s = 0; s < kKernel; ++s) {
#pragma unroll
              for (int i = 0; i < kPairs; ++i) {
                sums[2 * i + s % 2] += ring[(phase - r / 2 + kRing) % kRing][i + kReach - s / 2] * taps[r][s];
              }
            }
          }
          if (static_cast<uint32_t>(h) < rows_written) store_run(result, sums, masks >> 16);
          ++h, result += a.out_columns;
        }
      }
    }
  }
  __syncthreads();
  const int rows = end_row - out_row;
  write_range(to, out, (block.planes - 1) * out_plane + rows * a.out_columns);
}

}  // namespace

cudaError_t launch_depthwise_nchw_grad_input_stride2(const Launch& call, const NchwCut& cut) {
  const PlaneArgs a = make_plane_args(Map::grad_input, call, cut);
  const LaunchConfig config = plane_config(Map::grad_input, call, a);
  const int pairs = static_cast<int>(nchw_work(Map::grad_input, call.shape).steps);
  return dispatch_nchw(call.dtype, call.shape.R, [&](auto tag, auto kernel) {
    using T = typename decltype(tag)::type;
    constexpr int kKernel = decltype(kernel)::value;
    return launch(grad_input_stride2_kernel<T, kKernel, nchw_pairs(kKernel)>, config, a, pairs, call.first_as<T>(),
                  call.second_as<T>(), call.out_as<T>());
  });
}

}  // namespace sepconv::cuda
