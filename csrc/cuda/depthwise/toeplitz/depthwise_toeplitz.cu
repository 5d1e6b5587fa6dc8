// Depthwise forward, and grad_input (forward with the filter turned around), with large kernels, stride 1, of
// contiguous images (NCHW) in half types, on tensor cores. For one channel and kernel row r
//     y[p, q0 + i] += sum over j of  x[p - pad_h + r, q0 - pad_w + j] * T[j, i],   T[j, i] = w[r, j - i]
// which is one product of 16 output rows by a window of columns with a Toeplitz matrix (depthwise_toeplitz.cuh).
//
// Thread-to-data map. depthwise_toeplitz.cuh has the blocks and their places. A warp takes 16 output rows at a time,
// and kTiles * 8 columns; the sums stay in registers over all kernel rows.
//
// A window reaches up to seven columns beyond a tap's own: an infinite x there meets a zero and makes a NaN. So results
// that are NaN are computed again, tap by tap.
#include "cuda/depthwise/depthwise_single_output.cuh"
#include "cuda/depthwise/toeplitz/depthwise_toeplitz.cuh"

#include <utility>

namespace sepconv::cuda {
namespace {

// One of a place's output rows, which are counted through its images.
struct OutputRow {
  int n, p;
  bool exists;
  __device__ __forceinline__ OutputRow(const ToeplitzArgs& a, const ToeplitzPlace& place, uint32_t row) {
    const uint32_t image = a.by_rows.div(row);
    n = place.first_image + static_cast<int>(image), p = place.strip * a.rows + static_cast<int>(row - image * a.rows);
    exists = image < static_cast<uint32_t>(a.images) && n < a.N && p < a.P;
  }
};

template <typename T, int kTiles, int kSteps>
__global__ void __launch_bounds__(kToeplitzThreads, 4)
    toeplitz_kernel(const ToeplitzArgs a, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                    const Activation activation, T* __restrict__ y) {
  wait_for_earlier_kernels();
  using Row = ToeplitzRow<kSteps>;
  constexpr int kHalves = kTiles - 1 + 2 * kSteps, kPitch = toeplitz_pitch(kHalves);
  DYN_SMEM(smem);
  T* const filter = reinterpret_cast<T*>(smem);  // [R, Row::kElements]
  T* const tile = filter + a.R * Row::kElements;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t part = blockIdx.x;
  const int k = static_cast<int>(a.by_parts.split(part));
  const T* const x_channel = x + a.by_multiplier.div(k) * a.x_c;
  for (int r = warp; r < a.R; r += kToeplitzWarps) {
    const T* const row = w + k * a.w_n + (a.turned ? a.R - 1 - r : r) * a.w_h;
    const auto tap = [&](int s) { return row[(a.turned ? a.S - 1 - s : s) * a.w_w]; };
    Row::stage(filter + r * Row::kElements, a.S, lane, tap);
  }
  const float add = bias != nullptr ? to_acc(bias[k]) : 0.f;
  const int tile_rows = a.rows + a.R - 1, output_rows = a.images * a.rows;

  for (uint32_t i = part; i < a.places; i += a.parts) {
    const ToeplitzPlace place(a, i);
    const int first_column = place.column_tile * kTiles * 8;
    stage_images<kPitch>(a, tile, x_channel, place.first_image, tile_rows, place.strip * a.rows - a.pad_h,
                         first_column - a.pad_w);
    __syncthreads();
    for (int m0 = warp * 16; m0 < output_rows; m0 += kToeplitzWarps * 16) {
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
      activate_all<T>(activation, sums);
      bool again = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const OutputRow own(a, place, m0 + lane / 4 + 8 * half);
        if (!own.exists) continue;
        T* const out = y + own.n * a.y_n + k * a.y_c + own.p * a.y_h;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int q = first_column + t * 8 + lane % 4 * 2;
          const float values[2] = {sums[t * 4 + 2 * half], sums[t * 4 + 2 * half + 1]};
          if (q >= a.Q) continue;
          again |= values[0] != values[0] || values[1] != values[1];
          if (a.whole_pairs) {
            store_vec<2>(out + q, values);
          } else {
            out[q] = from_acc<T>(values[0]);
            if (q + 1 < a.Q) out[q + 1] = from_acc<T>(values[1]);
          }
        }
      }
      if (again) {
        const SingleOutput single{a.x_h, a.w_h, a.w_w, a.H, a.W, a.R, a.S, a.pad_h, a.pad_w, a.turned};
#pragma unroll 1
        for (int i = 0; i < 4 * kTiles; ++i) {
          const OutputRow own(a, place, m0 + lane / 4 + 8 * (i % 2));
          const int q = first_column + i / 4 * 8 + lane % 4 * 2 + i / 2 % 2;
          if (!own.exists || q >= a.Q) continue;
          T* const out = y + own.n * a.y_n + k * a.y_c + own.p * a.y_h + q;
          const float result = to_acc(*out);
          if (result == result) continue;
          *out = single.compute(x_channel + own.n * a.x_n, w + k * a.w_n, add, activation, own.p, q);
        }
      }
    }
    __syncthreads();  // the images have no readers left
  }
}

template <typename T, int kTiles, int kSteps>
cudaError_t start(const Launch& call, ToeplitzArgs a) {
  cut_toeplitz(a, 8 * kTiles);
  const size_t elements =
      a.R * ToeplitzRow<kSteps>::kElements + a.images * (a.rows + a.R - 1) * toeplitz_pitch(kTiles - 1 + 2 * kSteps);
  const LaunchConfig config{dim3(a.K * a.parts), dim3(kToeplitzThreads), elements * sizeof(T), call.stream};
  return launch(toeplitz_kernel<T, kTiles, kSteps>, config, a, call.first_as<T>(), call.second_as<T>(),
                call.bias_as<T>(), call.epilogue.activation, call.out_as<T>());
}

cudaError_t run(Map map, const Launch& call, const ToeplitzCut& cut) {
  const ToeplitzArgs a = make_toeplitz_args(map, call.shape, cut);
  return dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_steps = [&](auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      switch (toeplitz_steps(a.S)) {
        case 1: return start<T, kTiles, 1>(call, a);
        case 2: return start<T, kTiles, 2>(call, a);
        case 3: return start<T, kTiles, 3>(call, a);
        default: return start<T, kTiles, 5>(call, a);
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

cudaError_t launch_depthwise_toeplitz_forward(const Launch& call, const ToeplitzCut& cut) {
  return run(Map::forward, call, cut);
}

cudaError_t launch_depthwise_toeplitz_grad_input(const Launch& call, const ToeplitzCut& cut) {
  return run(Map::grad_input, call, cut);
}

}  // namespace sepconv::cuda
