// The fused depthwise and 1x1 convolution (separable.cuh) with the product on tensor cores, for float16 and bfloat16.
//
// Threads to data: a block of 256 threads computes 64 pixels x kColumns output channels; its eight warps lie 2 x 4 on
// the tile, each with 32 pixels x kColumns / 4 channels in registers. Chunk by chunk the threads lay down h as
// [pixel][channel] and v as [output][channel], both padded by 16 bytes a row so that the eight rows of an ldmatrix fall
// on different banks. h is rounded to T there, as it would be in memory. Two blocks share a multiprocessor, so that one
// may read x while the other multiplies.
//
// The result goes through shared memory once more, behind bias and activation, in the order in which y is dense.
#include "cuda/device/ptx.cuh"
#include "cuda/separable/separable.cuh"

namespace sepconv::cuda {
namespace {

using namespace separable;

constexpr int kPitch = kDepth + 8;  // elements of a row of a tile
constexpr int kVec = 8;             // elements of 16 bits in 16 bytes

template <typename T, int kColumns>
__device__ __forceinline__ void stage_outputs(const SeparableArgs<T>& a, T* tile, int first_output, int first_channel) {
  constexpr int kRowVectors = kDepth / kVec;
  if (a.v_vectors) {
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * kRowVectors; i += kThreads) {
      const int row = i / kRowVectors, column = i % kRowVectors * kVec;
      const int k = first_output + row, c = first_channel + column;
      Vec<T, kVec> piece;
      if (k < a.outputs && c < a.channels) {
        piece = *reinterpret_cast<const Vec<T, kVec>*>(a.v + k * a.v_n + c);
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) piece.v[j] = from_acc<T>(0.f);
      }
      *reinterpret_cast<Vec<T, kVec>*>(tile + row * kPitch + column) = piece;
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * kDepth; i += kThreads) {
      const int row = i / kDepth, column = i % kDepth;
      const int k = first_output + row, c = first_channel + column;
      tile[row * kPitch + column] = k < a.outputs && c < a.channels ? a.v[k * a.v_n + c * a.v_c] : from_acc<T>(0.f);
    }
  }
}

// From 10.0 on nvcc 13.0 would have to keep sums of 256 columns in memory for two.
constexpr int blocks_a_multiprocessor(int columns) { return columns == 256 && kArch >= 1000 ? 1 : 2; }

template <typename T, int kColumns, Deal kDeal>
__global__ void __launch_bounds__(kThreads, blocks_a_multiprocessor(kColumns))
    separable_mma_kernel(const SeparableArgs<T> a) {
  wait_for_earlier_kernels();
  constexpr int kWarpColumns = kColumns / 4, kFragments = kWarpColumns / 8;
  DYN_SMEM(smem);
  PixelTable& table = *reinterpret_cast<PixelTable*>(smem);
  float* const filters = reinterpret_cast<float*>(smem + sizeof(PixelTable));
  T* const h_tile = reinterpret_cast<T*>(smem + head_bytes<T>(a.taps));  // [kPixels, kPitch]
  T* const v_tile = h_tile + kPixels * kPitch;                           // [kColumns, kPitch]
  uint32_t column_tile = blockIdx.x;
  const uint32_t pixel_tile = a.by_columns.split(column_tile);
  const int first_output = static_cast<int>(column_tile) * kColumns;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp % 2 * 32, column = warp / 2 * kWarpColumns;

  table.fill(a, pixel_tile * kPixels);
  float sums[2][kFragments][4] = {};
  for (int c0 = 0; c0 < a.channels; c0 += kDepth) {
    stage_filters(a, filters, c0);
    stage_outputs<T, kColumns>(a, v_tile, first_output, c0);
    __syncthreads();
    depthwise_stage<T, kDeal>(a, table, filters, c0, [&](int pixel, int channel, const auto& values) {
      store_vec<sizeof(values) / sizeof(float)>(h_tile + pixel * kPitch + channel, values);
    });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(left[i], h_tile + (row + i * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kFragments; j += 2) {  // 16 columns: two fragments
        uint32_t right[4];
        ldmatrix_x4(right, v_tile + (column + j * 8 + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16<T>(sums[i][j], left[i], {right[0], right[1]});
          mma_m16n8k16<T>(sums[i][j + 1], left[i], {right[2], right[3]});
        }
      }
    }
    __syncthreads();  // the tiles and filters have no readers left
  }

  // Bias and activation, then [pixel][output] or [output][pixel] in the memory of the tiles, and from there to y.
  const bool channels_dense = a.y_strides.c == 1;
  T* const result = h_tile;
  const int pitch = channels_dense ? kColumns + 8 : kPixels + 8;
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = column + j * 8 + lane % 4 * 2 + e;
      const bool add = a.v_bias != nullptr && first_output + k < a.outputs;
      const float bias = add ? to_acc(a.v_bias[first_output + k]) : 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i][j][e] += bias, sums[i][j][e + 2] += bias;
    }
  }
  activate_all<T>(a.y_activation, reinterpret_cast<float (&)[2 * kFragments * 4]>(sums));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pixel = row + i * 16 + lane / 4 + e / 2 * 8, k = column + j * 8 + lane % 4 * 2 + e % 2;
        result[channels_dense ? pixel * pitch + k : k * pitch + pixel] = from_acc<T>(sums[i][j][e]);
      }
    }
  }
  __syncthreads();
  if (a.y_vectors) {
    for (int i = static_cast<int>(threadIdx.x); i < kPixels * kColumns / kVec; i += kThreads) {
      const int pixel = i / (kColumns / kVec), k = i % (kColumns / kVec) * kVec;
      const int64_t out = table.out[pixel];
      if (out < 0 || first_output + k >= a.outputs) continue;
      *reinterpret_cast<Vec<T, kVec>*>(a.y + out + first_output + k) =
          *reinterpret_cast<const Vec<T, kVec>*>(result + pixel * pitch + k);
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kPixels * kColumns; i += kThreads) {
    const int pixel = channels_dense ? i / kColumns : i % kPixels, k = channels_dense ? i % kColumns : i / kPixels;
    const int64_t out = table.out[pixel];
    if (out < 0 || first_output + k >= a.outputs) continue;
    a.y[out + (first_output + k) * a.y_strides.c] = result[channels_dense ? pixel * pitch + k : k * pitch + pixel];
  }
}

template <typename T, int kColumns>
cudaError_t start(const SeparableShape& shape, const SeparableMemory& memory, cudaStream_t stream) {
  const SeparableArgs<T> a = make_args<T>(shape, memory, kColumns);
  constexpr size_t kTiles = (kPixels + kColumns) * kPitch,
                   kResult = std::max(kPixels * (kColumns + 8), kColumns * (kPixels + 8));
  const LaunchConfig config{dim3(ceil_div<uint32_t>(a.pixels, kPixels) * a.by_columns.divisor), dim3(kThreads),
                            head_bytes<T>(a.taps) + std::max(kTiles, kResult) * sizeof(T), stream};
  return dispatch_deal(choose_deal<T>(shape, memory.x), [&](auto deal) {
    return launch(separable_mma_kernel<T, kColumns, decltype(deal)::value>, config, a);
  });
}

}  // namespace

cudaError_t launch_separable_mma(const SeparableShape& shape, DType dtype, const SeparableMemory& memory,
                                 const SeparableCut& cut, cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (cut.columns) {
      case 64: return start<T, 64>(shape, memory, stream);
      case 128: return start<T, 128>(shape, memory, stream);
      case 256: return start<T, 256>(shape, memory, stream);
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace sepconv::cuda
