// The fused depthwise and 1x1 convolution (separable.cuh) in plain arithmetic, for every dtype.
//
// Threads to data: a block of 256 threads computes 64 pixels x kColumns output channels; thread (i, j) of 16 x 16 sums
// 4 neighbouring pixels x kColumns / 16 channels (in groups of 4, 64 apart) in registers. Chunk by chunk the threads
// lay down h as [channel][pixel] and v as [channel][output], so that the product reads both in vectors of four.
#include "cuda/device/ptx.cuh"
#include "cuda/separable/separable.cuh"

namespace sepconv::cuda {
namespace {

using namespace separable;

template <typename T, int kColumns, Deal kDeal>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 1 : 2) separable_kernel(const SeparableArgs<T> a) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  constexpr int kPart = 16 / static_cast<int>(sizeof(A));  // sums in a vector of 16 bytes
  constexpr int kGroups = kColumns / 64;
  constexpr int kHPitch = kPixels + 4, kVPitch = kColumns + 4;
  DYN_SMEM(smem);
  PixelTable& table = *reinterpret_cast<PixelTable*>(smem);
  A* const filters = reinterpret_cast<A*>(smem + sizeof(PixelTable));
  A* const h_tile = filters + a.taps * kDepth;  // [kDepth, kHPitch]
  A* const v_tile = h_tile + kDepth * kHPitch;  // [kDepth, kVPitch]
  uint32_t column_tile = blockIdx.x;
  const uint32_t pixel_tile = a.by_columns.split(column_tile);
  const int first_output = static_cast<int>(column_tile) * kColumns;
  const int pixel0 = static_cast<int>(threadIdx.x) / 16 * 4, column0 = static_cast<int>(threadIdx.x) % 16 * 4;

  table.fill(a, pixel_tile * kPixels);
  A sums[4][4 * kGroups] = {};
  for (int c0 = 0; c0 < a.channels; c0 += kDepth) {
    stage_filters(a, filters, c0);
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * kDepth; i += kThreads) {
      const int row = i / kDepth, c = i % kDepth, k = first_output + row;
      const bool exists = k < a.outputs && c0 + c < a.channels;
      v_tile[c * kVPitch + row] = exists ? to_acc(a.v[k * a.v_n + (c0 + c) * a.v_c]) : A(0);
    }
    __syncthreads();
    depthwise_stage<T, kDeal>(a, table, filters, c0, [&](int pixel, int channel, const auto& values) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(values) / sizeof(A)); ++i) {
        h_tile[(channel + i) * kHPitch + pixel] = values[i];
      }
    });
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < kDepth; ++c) {
      A left[4], right[4 * kGroups];
#pragma unroll
      for (int i = 0; i < 4; i += kPart) {
        load_vec<kPart>(reinterpret_cast<A(&)[kPart]>(left[i]), h_tile + c * kHPitch + pixel0 + i);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          load_vec<kPart>(reinterpret_cast<A(&)[kPart]>(right[4 * g + i]), v_tile + c * kVPitch + column0 + 64 * g + i);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4 * kGroups; ++j) sums[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();  // the tiles and filters have no readers left
  }

#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int k = first_output + column0 + 64 * g;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool add = a.v_bias != nullptr && k + j < a.outputs;
        values[j] = sums[i][4 * g + j] + (add ? to_acc(a.v_bias[k + j]) : A(0));
      }
      activate_all<T>(a.y_activation, values);
      const int64_t out = table.out[pixel0 + i];
      if (out < 0) continue;
      if (a.y_vectors && k + 4 <= a.outputs) {
        constexpr int kStore = sizeof(T) == 8 ? 2 : 4;
#pragma unroll
        for (int j = 0; j < 4; j += kStore) {
          store_vec<kStore>(a.y + out + k + j, reinterpret_cast<const A(&)[kStore]>(values[j]));
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (k + j < a.outputs) a.y[out + (k + j) * a.y_strides.c] = from_acc<T>(values[j]);
        }
      }
    }
  }
}

template <typename T, int kColumns>
cudaError_t start(const SeparableShape& shape, const SeparableMemory& memory, cudaStream_t stream) {
  const SeparableArgs<T> a = make_args<T>(shape, memory, kColumns);
  constexpr size_t kTiles = kDepth * (kPixels + 4 + kColumns + 4) * sizeof(acc_t<T>);
  const LaunchConfig config{dim3(ceil_div<uint32_t>(a.pixels, kPixels) * a.by_columns.divisor), dim3(kThreads),
                            head_bytes<T>(a.taps) + kTiles, stream};
  return dispatch_deal(choose_deal<T>(shape, memory.x), [&](auto deal) {
    return launch(separable_kernel<T, kColumns, decltype(deal)::value>, config, a);
  });
}

}  // namespace

cudaError_t launch_separable(const SeparableShape& shape, DType dtype, const SeparableMemory& memory,
                             const SeparableCut& cut, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (cut.columns == 64) return start<T, 64>(shape, memory, stream);
    if constexpr (!std::is_same_v<T, double>) {
      if (cut.columns == 128) return start<T, 128>(shape, memory, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace sepconv::cuda
