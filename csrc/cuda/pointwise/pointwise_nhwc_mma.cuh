// What pointwise_nhwc_mma.cu and pointwise_nhwc_mma_grad_weight.cu share: pixels of dense channels as rows of 128 bytes
// in shared memory.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/pointwise/pointwise.cuh"

namespace sepconv::cuda::pointwise {

inline constexpr int kProductThreads = 256;
inline constexpr int kRow = 128;             // bytes of a row in shared memory: 64 channels
inline constexpr int kPieces = 8, kVec = 8;  // of a row, 16 bytes each; elements of a piece

// Piece p of row r lies at p ^ (r % 8): the eight rows of an ldmatrix fall on different banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * kRow + ((piece ^ (row & 7)) << 4); }

// Where a pixel begins. In most images all pixels follow each other by one step, which costs a multiplication.
struct Pixels {
  PointwiseAxis axis;
  uint32_t step = 0;  // 0: not so

  explicit Pixels(const PointwiseAxis& pixels) : axis(pixels) {
    if (axis.run == axis.size && axis.step < kNarrowLimit) step = static_cast<uint32_t>(axis.step);
  }
  __device__ __forceinline__ int64_t offset(uint32_t i) const {
    return step != 0 ? static_cast<int64_t>(static_cast<uint64_t>(i) * step) : axis.offset(i);
  }
};

}  // namespace sepconv::cuda::pointwise
