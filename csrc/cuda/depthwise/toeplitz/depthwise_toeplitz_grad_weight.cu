// Depthwise grad_weight with large kernels, stride 1, of contiguous images (NCHW) in half types, on tensor cores. For
// one output row p
//     grad_w[r, s0 + i] += sum over j of  x[p - pad_h + r, q0 - pad_w + s0 + j] * T[j, i],   T[j, i] = grad_y[p, q0 + j
//     - i]
// which is one product of 16 kernel rows by a window of columns with a Toeplitz matrix (depthwise_toeplitz.cuh).
//
// Thread-to-data map. depthwise_toeplitz.cuh has the blocks and their places. A warp takes every fourth output row; its
// sums are 16 kM x 8 kN taps, and stay in registers to the end. Blocks beside each other take other taps. The warps'
// sums are added in order, then launch_sum_partials adds the parts.
//
// A window reaches up to seven columns beyond a tap's own: an infinite x there meets a zero and makes a NaN.
#include "cuda/depthwise/toeplitz/depthwise_toeplitz.cuh"

#include <algorithm>

namespace sepconv::cuda {
namespace {

// Floats from row to row of a warp's sums in shared memory: rows of eight taps beside each other have different banks.
template <int kN>
constexpr int kSumPitch = 8 * kN + 8;

template <typename T, int kM, int kN, int kSteps>
__global__ void __launch_bounds__(kToeplitzThreads, 4)
    toeplitz_grad_weight_kernel(const ToeplitzArgs a, const T* __restrict__ grad_y, const T* __restrict__ x,
                                float* __restrict__ partials) {
  wait_for_earlier_kernels();
  using Row = ToeplitzRow<kSteps>;
  constexpr int kColumns = 16 * kSteps - 8, kTapRows = 16 * kM, kTapColumns = 8 * kN;
  constexpr int kHalves = kN - 1 + 2 * kSteps, kPitch = toeplitz_pitch(kHalves);
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
    const ToeplitzPlace place(a, i);
    const int first_column = place.column_tile * kColumns;
    stage_images<kPitch>(a, tile, x_channel, place.first_image, tile_rows, place.strip * a.rows - a.pad_h + first_r,
                         first_column - a.pad_w + first_s);
#pragma unroll 2
    for (int m = warp; m < output_rows; m += kToeplitzWarps) {
      const int image = static_cast<int>(a.by_rows.div(m));
      const int n = place.first_image + image, p = place.strip * a.rows + m - image * a.rows;
      const T* const row = y_channel + n * a.y_n + p * a.y_h + first_column;
      const int count = n < a.N && p < a.P ? min(kColumns, a.Q - first_column) : 0;
      Row::stage(grads + m * Row::kElements, count, lane, [&](int q) { return row[q]; });
    }
    __syncthreads();
#pragma unroll 1
    for (int m = warp; m < output_rows; m += kToeplitzWarps) {
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
  float* const total = reinterpret_cast<float*>(smem);  // [kToeplitzWarps, kTapRows, kSumPitch]
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int s = 0; s < kN; ++s) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int row = 16 * r + lane / 4 + v / 2 * 8, column = 8 * s + lane % 4 * 2 + v % 2;
        total[(warp * kTapRows + row) * kSumPitch<kN> + column] = sums[r][s][v];
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTapRows * kTapColumns; i += kToeplitzThreads) {
    const int r = first_r + i / kTapColumns, s = first_s + i % kTapColumns;
    if (r >= a.R || s >= a.S) continue;
    const float* const own = total + i / kTapColumns * kSumPitch<kN> + i % kTapColumns;
    float sum = own[0];
#pragma unroll
    for (int other = 1; other < kToeplitzWarps; ++other) sum += own[other * kTapRows * kSumPitch<kN>];
    partials[((static_cast<int64_t>(part) * a.K + k) * a.R + r) * a.S + s] = sum;
  }
}

template <typename T, int kM, int kN, int kSteps>
cudaError_t start_grad_weight(const Launch& call, ToeplitzArgs a) {
  static_assert(toeplitz_grad_columns(kSteps) == 16 * kSteps - 8);  // as the kernel has it
  cut_toeplitz(a, toeplitz_grad_columns(kSteps));
  const int sections = ceil_div(a.R, 16 * kM) * ceil_div(a.S, 8 * kN);
  a.by_sections = FastDiv(sections);
  const size_t elements = a.images * ((a.rows + 16 * kM - 1) * toeplitz_pitch(kN - 1 + 2 * kSteps) +
                                      a.rows * ToeplitzRow<kSteps>::kElements);
  const LaunchConfig config{dim3(a.K * sections * a.parts), dim3(kToeplitzThreads),
                            std::max(elements * sizeof(T), sizeof(float) * kToeplitzWarps * 16 * kM * kSumPitch<kN>),
                            call.stream};
  return launch(toeplitz_grad_weight_kernel<T, kM, kN, kSteps>, config, a, call.first_as<T>(), call.second_as<T>(),
                call.workspace_as<float>());
}

}  // namespace

cudaError_t launch_depthwise_toeplitz_grad_weight(const Launch& call, const ToeplitzCut& cut) {
  const ToeplitzArgs a = make_toeplitz_args(Map::grad_weight, call.shape, cut);
  const cudaError_t error = dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_steps = [&](auto m, auto n) {
      constexpr int kM = decltype(m)::value, kN = decltype(n)::value;
      switch (toeplitz_grad_steps(a.Q)) {
        case 1: return start_grad_weight<T, kM, kN, 1>(call, a);
        case 2: return start_grad_weight<T, kM, kN, 2>(call, a);
        case 3: return start_grad_weight<T, kM, kN, 3>(call, a);
        default: return start_grad_weight<T, kM, kN, 4>(call, a);
      }
    };
    return toeplitz_few_taps(a.R, a.S) ? with_steps(Int<1>{}, Int<2>{}) : with_steps(Int<2>{}, Int<4>{});
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
