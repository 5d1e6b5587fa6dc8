// Depthwise forward, and grad_input of stride 1 (forward with the filter turned around), of dense rows (contiguous, or
// channels cut out of it), kernels 3x3, 5x5 and 7x7. depthwise_nchw.cuh has the tiles and their copies.
//
// Thread-to-data map. A block's planes stand in shared memory. A thread owns a run of kRun neighbouring output columns
// of one plane, and walks down `rows` rows; neighbouring threads take neighbouring runs, then the next strip of rows,
// then the next plane. The filter is in registers. An image row is read once on the way down and added at once to all
// output rows that it meets: these are a ring of registers, whose oldest is complete after each step.
#include "cuda/depthwise/nchw/depthwise_nchw.cuh"

#include <cstring>

namespace sepconv::cuda {
namespace {

// Copies the sums that begin at tile + elements_off(to) to to[0 .. count), through the activation: four at a time, so
// that neighbouring threads read neighbouring vectors.
template <typename T>
__device__ __forceinline__ void write_sums(T* __restrict__ to, const float* tile, int count, Activation activation) {
  using Words = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  const Pieces<T, 4> pieces(to, count);
  T* const base = to - pieces.begin;
#pragma unroll 1
  for (int i = pieces.whole + static_cast<int>(threadIdx.x); i < pieces.whole_end; i += static_cast<int>(blockDim.x)) {
    float values[4];
    load_vec<4>(values, tile + i * 4);
    if (activation != Activation::identity) activate_all<T>(activation, values);
    Vec<T, 4> piece;
#pragma unroll
    for (int j = 0; j < 4; ++j) piece.v[j] = from_acc<T>(values[j]);
    Words words;  // one store: the compiler splits that of a Vec here
    memcpy(&words, &piece, sizeof words);
    reinterpret_cast<Words*>(base)[i] = words;
  }
  if (pieces.single >= 0) {
    float value[1] = {tile[pieces.single]};
    activate_all<T>(activation, value);
    base[pieces.single] = from_acc<T>(value[0]);
  }
}

// Step j adds the padded rows kStride * j ... to the output rows j, j - 1, ...; row j lives in ring[j % kRing].
template <typename T, int kKernel, int kStride, int kRun>
__global__ void __launch_bounds__(kNchwThreads, 2)
    forward_kernel(const PlaneArgs a, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                   const Activation activation, T* __restrict__ y) {
  wait_for_earlier_kernels();
  constexpr int kWindow = (kRun - 1) * kStride + kKernel, kRing = (kKernel - 1) / kStride + 1;
  constexpr int kTaps = kKernel * kKernel;
  DYN_SMEM(smem);
  T* const in = reinterpret_cast<T*>(smem);
  float* const out = reinterpret_cast<float*>(smem + a.in_bytes);
  T* const filters = reinterpret_cast<T*>(smem + a.in_bytes + a.out_bytes);
  float* const biases = reinterpret_cast<float*>(smem + a.in_bytes + a.out_bytes + a.filter_bytes);
  const PlaneBlock block(a);
  const int end_row = min(block.band_row + a.band, a.out_rows);
  const int in_row = max(block.band_row * kStride - a.pad_h, 0);
  const int in_rows = max(min((end_row - 1) * kStride - a.pad_h + kKernel, a.in_rows) - in_row, 0);
  const int first_in = static_cast<int>(a.by_multiplier.div(block.first));
  const int last_in = static_cast<int>(a.by_multiplier.div(block.first + block.planes - 1));
  const T* const from = x + block.n * a.in_n + first_in * a.in_c + static_cast<int64_t>(in_row) * a.in_columns;
  T* const to = y + block.n * a.out_n + block.first * a.out_c + static_cast<int64_t>(block.band_row) * a.out_columns;
  const T* const filter = w + static_cast<int64_t>(block.first) * kTaps;
  const int in_plane = a.in_rows * a.in_columns, out_plane = a.out_rows * a.out_columns;  // apart, where several

  StagedRange<T> image(in, from, (last_in - first_in) * in_plane + in_rows * a.in_columns);
  StagedRange<T> weights(filters, filter, block.planes * kTaps);
  image.begin(), weights.begin();
  cp_async_commit();
  image.load(), weights.load();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < block.planes; i += static_cast<int>(blockDim.x)) {
    biases[i] = bias != nullptr ? to_acc(bias[block.first + i]) : 0.f;
  }
  image.store(), weights.store();
  cp_async_wait<0>();
  __syncthreads();

  const int items = block.planes * static_cast<int>(a.by_strips.divisor * a.by_runs.divisor);
  for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
    const PlaneThread own(a, item);
    const int p = own.strip * a.rows, q = own.run * kRun, column = q * kStride - a.pad_w;  // p counts in the band
    const int c = static_cast<int>(a.by_multiplier.div(block.first + own.plane)) - first_in;
    int h = (block.band_row + p) * kStride - a.pad_h - in_row;  // in the tile
    const T* row = in + elements_off(from) + c * in_plane + h * a.in_columns + column;
    float* result = out + elements_off(to) + own.plane * out_plane + p * a.out_columns + q;
    uint32_t masks = columns_inside<kWindow>(column, a.in_columns) | columns_inside<kRun>(q, a.out_columns) << 16;
    const uint32_t rows_read = opaque(in_rows),
                   rows_written = opaque(max(min(a.rows, end_row - block.band_row - p), 0));
    const float add = biases[own.plane];
    float taps[kKernel][kKernel];
    load_filter(taps, filters + elements_off(filter) + own.plane * kTaps, a.turned);

    float ring[kRing][kRun], values[kWindow] = {};  // the columns outside stay zero
    for (int turn = 0; turn < a.rows + kRing - 1; turn += kRing) {
#pragma unroll
      for (int phase = 0; phase < kRing; ++phase) {
        const int step = turn + phase;
        if (step >= a.rows + kRing - 1) break;
        masks = opaque(masks);  // else its bits would be kept in as many registers
#pragma unroll
        for (int sub = 0; sub < kStride; ++sub) {
          if (static_cast<uint32_t>(h) < rows_read) {
            load_run(values, row, masks);
            // Output rows step - back; from the second on they are left out by twos where they are not of this strip,
            // all threads alike.
#pragma unroll
            for (int pair = 0; pair <= kRing / 2; ++pair) {
              if (pair > 0 && static_cast<uint32_t>(step - 2 * pair + 1) > static_cast<uint32_t>(a.rows)) continue;
#pragma unroll
              for (int back = max(2 * pair - 1, 0); back <= 2 * pair; ++back) {
                const int r = back * kStride + sub;
                if (r >= kKernel) continue;
#pragma unroll
                for (int s = 0; s < kKernel; ++s) {
#pragma unroll
                  for (int i = 0; i < kRun; ++i) {
                    float& sum = ring[(phase - back + kRing) % kRing][i];
                    sum = (r == 0 && s == 0 ? add : sum) + values[i * kStride + s] * taps[r][s];
                  }
                }
              }
            }
          } else if (sub == 0) {
#pragma unroll
            for (int i = 0; i < kRun; ++i) ring[phase][i] = add;
          }
          ++h, row += a.in_columns;
        }
        if (static_cast<uint32_t>(step - (kRing - 1)) < rows_written) {
          store_run(result, ring[(phase + 1) % kRing], masks >> 16);
          result += a.out_columns;
        }
      }
    }
  }
  __syncthreads();
  const int rows = end_row - block.band_row;
  write_sums(to, out, (block.planes - 1) * out_plane + rows * a.out_columns, activation);
}

cudaError_t run_forward(const Launch& call, const PlaneArgs& a, const LaunchConfig& config, int64_t stride) {
  return dispatch_nchw(call.dtype, call.shape.R, [&](auto tag, auto kernel) {
    using T = typename decltype(tag)::type;
    constexpr int kKernel = decltype(kernel)::value;
    const auto start = [&](auto function) {
      return launch(function, config, a, call.first_as<T>(), call.second_as<T>(), call.bias_as<T>(),
                    call.epilogue.activation, call.out_as<T>());
    };
    return stride == 1 ? start(forward_kernel<T, kKernel, 1, nchw_run(kKernel, 1)>)
                       : start(forward_kernel<T, kKernel, 2, nchw_run(kKernel, 2)>);
  });
}

}  // namespace

cudaError_t launch_depthwise_nchw_forward(const Launch& call, const NchwCut& cut) {
  const PlaneArgs a = make_plane_args(Map::forward, call, cut);
  return run_forward(call, a, plane_config(Map::forward, call, a), call.shape.stride_h);
}

cudaError_t launch_depthwise_nchw_grad_input(const Launch& call, const NchwCut& cut) {
  if (call.shape.stride_h == 2) return launch_depthwise_nchw_grad_input_stride2(call, cut);
  const Correlation c = correlation(Map::grad_input, call.shape);
  PlaneArgs a = make_plane_args(Map::grad_input, call, cut);
  a.turned = true;
  a.pad_h = static_cast<int>(c.pad_h), a.pad_w = static_cast<int>(c.pad_w);
  return run_forward(call, a, plane_config(Map::grad_input, call, a), 1);
}

}  // namespace sepconv::cuda
