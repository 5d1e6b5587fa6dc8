// The 1x1 convolution and its gradients as matrix products (pointwise.cuh) on tensor cores, for float16 and bfloat16.
//
// Threads to data: a block of 256 threads computes a tile of 128 x 64 of the result; its eight warps lie 4 x 2 on it,
// each with 32 x 32 in registers (2 x 4 fragments of m16n8k16). The sum goes in steps of 32 along k through a ring of
// three stages in shared memory: while one is multiplied, the next two are on their way (cp.async). A tile lies in
// shared memory the way it is dense in global memory, as [outer][k] or [k][outer]; ldmatrix turns the second kind over.
// Rows are padded by 16 bytes, so that the eight rows of an ldmatrix fall on different banks.
//
// The result goes through shared memory once more, in fp32, so that bias, activation and stores see whole rows of 8.
#include "cuda/device/ptx.cuh"
#include "cuda/pointwise/pointwise.cuh"

namespace sepconv::cuda {
namespace {

using namespace pointwise;

constexpr int kThreads = 256;
constexpr int kRows = 128, kColumns = 64;  // of a block's tile of the result
constexpr int kDepth = 32;                 // of a step along k
constexpr int kStages = 3;
constexpr int kWarpRows = 32, kWarpColumns = 32;
constexpr int kPad = 8;                     // elements: 16 bytes
constexpr int kResultPitch = kColumns + 8;  // floats
constexpr int kVec = 8;                     // elements of 16 bits in 16 bytes

// Where a column of the result lies in its row: four floats after each 32, so that eight lanes that read 32 bytes each
// find them on different banks.
__device__ __forceinline__ int result_column(int column) { return column + column / 32 * 4; }

// A tile of one operand in shared memory, and the thread's share of filling it.
template <typename T, bool kAlongK, int kOuter>
struct OperandTile : TileShare<T, kAlongK, kOuter, kDepth, kThreads> {
  using Share = TileShare<T, kAlongK, kOuter, kDepth, kThreads>;
  using Share::Share, Share::kVectors;
  static constexpr int kPitch = (kAlongK ? kDepth : kOuter) + kPad;
  static constexpr int kTileElements = (kAlongK ? kOuter : kDepth) * kPitch;

  static __device__ __forceinline__ int position(int outer, int depth) {
    return kAlongK ? outer * kPitch + depth : depth * kPitch + outer;
  }

  // Elements of an operand without whole vectors are held in registers from begin() to finish(), so that they too are
  // on their way while the tensor cores are at work.
  T held[Share::kElements];

  __device__ __forceinline__ void begin(T* tile, const Operand<T>& operand, uint32_t k0, uint32_t k_end) {
    if (operand.vectors) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const T* const from = this->address(operand, i, k0, k_end);
        cp_async16(tile + position(Share::outer(i), Share::depth(i)), from != nullptr ? from : operand.data,
                   from != nullptr);
      }
    } else {
#pragma unroll
      for (int e = 0; e < Share::kElements; ++e) held[e] = this->element(operand, e, k0, k_end);
    }
  }

  __device__ __forceinline__ void finish(T* tile, const Operand<T>& operand) const {
    if (operand.vectors) return;
    if constexpr (kAlongK) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        Vec<T, kVec> v;
#pragma unroll
        for (int j = 0; j < kVec; ++j) v.v[j] = held[i * kVec + j];
        *reinterpret_cast<Vec<T, kVec>*>(tile + position(Share::outer(i), Share::depth(i))) = v;
      }
    } else {
#pragma unroll
      for (int e = 0; e < Share::kElements; ++e) {
        tile[position(Share::element_outer(e), Share::element_depth(e))] = held[e];
      }
    }
  }
};

template <typename T, bool kAAlongK, bool kBAlongK>
__global__ void __launch_bounds__(kThreads, 2) product_mma_kernel(const Product<T> p, const TileGrid grid) {
  wait_for_earlier_kernels();
  using ATile = OperandTile<T, kAAlongK, kRows>;
  using BTile = OperandTile<T, kBAlongK, kColumns>;
  DYN_SMEM(smem);
  T* const a_tiles = reinterpret_cast<T*>(smem);
  T* const b_tiles = a_tiles + kStages * ATile::kTileElements;

  uint32_t m_tile, n_tile;
  grid.split(blockIdx.x, m_tile, n_tile);
  const uint32_t k_begin = blockIdx.y * p.k_a_split;
  const uint32_t k_end = min(k_begin + p.k_a_split, p.a.k.size);
  const int steps = k_begin < k_end ? static_cast<int>(ceil_div<uint32_t>(k_end - k_begin, kDepth)) : 0;
  ATile a(p.a, m_tile * kRows);
  BTile b(p.b, n_tile * kColumns);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp % (kRows / kWarpRows) * kWarpRows, column = warp / (kRows / kWarpRows) * kWarpColumns;

  // Every step commits one group, also where nothing is left to copy, so that the wait below counts steps.
  const auto begin = [&](int step) {
    if (step < steps) {
      const uint32_t k0 = k_begin + step * kDepth;
      a.begin(a_tiles + step % kStages * ATile::kTileElements, p.a, k0, k_end);
      b.begin(b_tiles + step % kStages * BTile::kTileElements, p.b, k0, k_end);
    }
    cp_async_commit();
  };
  const auto finish = [&](int step) {
    if (step < steps) {
      a.finish(a_tiles + step % kStages * ATile::kTileElements, p.a);
      b.finish(b_tiles + step % kStages * BTile::kTileElements, p.b);
    }
  };

  float sums[2][4][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    begin(step);
    finish(step);
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step's tiles are there for all, and the stage that is filled next has no readers left
    begin(step + kStages - 1);
    const T* const a_tile = a_tiles + step % kStages * ATile::kTileElements;
    const T* const b_tile = b_tiles + step % kStages * BTile::kTileElements;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kAAlongK) {
          ldmatrix_x4(left[i], a_tile + ATile::position(row + i * 16 + lane % 16, k + lane / 16 * 8));
        } else {
          ldmatrix_x4_trans(left[i],
                            a_tile + ATile::position(row + i * 16 + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // 16 columns: two fragments
        if constexpr (kBAlongK) {
          ldmatrix_x4(right[j],
                      b_tile + BTile::position(column + j * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        } else {
          ldmatrix_x4_trans(right[j], b_tile + BTile::position(column + j * 16 + lane / 16 * 8, k + lane % 16));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t fragment[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16<T>(sums[i][j], left[i], fragment);
        }
      }
    }
    finish(step + kStages - 1);
  }

  // The sums pass through the memory of the stages.
  cp_async_wait<0>();
  __syncthreads();
  float* const result = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* const to =
          result + (row + i * 16 + lane / 4) * kResultPitch + result_column(column) + j * 8 + lane % 4 * 2;
      *reinterpret_cast<Vec<float, 2>*>(to) = {sums[i][j][0], sums[i][j][1]};
      *reinterpret_cast<Vec<float, 2>*>(to + 8 * kResultPitch) = {sums[i][j][2], sums[i][j][3]};
    }
  }
  __syncthreads();

  const uint32_t m_size = p.a.outer.size, n_size = p.b.outer.size;
  const uint32_t m0 = m_tile * kRows, n0 = n_tile * kColumns;
  if (p.partials != nullptr) {
    float* const partials = p.partials + static_cast<int64_t>(blockIdx.y) * m_size * n_size;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
      const uint32_t m = m0 + i / kColumns, n = n0 + i % kColumns;
      if (m < m_size && n < n_size) {
        partials[static_cast<int64_t>(m) * n_size + n] =
            result[i / kColumns * kResultPitch + result_column(i % kColumns)];
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns / kVec; i += kThreads) {
    const int local_m = i / (kColumns / kVec), local_n = i % (kColumns / kVec) * kVec;
    const uint32_t m = m0 + local_m, n = n0 + local_n;
    if (m >= m_size || n >= n_size) continue;
    float values[kVec];
#pragma unroll
    for (int j = 0; j < kVec; j += 4) {
      const float* const from = result + local_m * kResultPitch + result_column(local_n) + j;
      const Vec<float, 4> v = *reinterpret_cast<const Vec<float, 4>*>(from);
#pragma unroll
      for (int l = 0; l < 4; ++l) values[j + l] = v.v[l];
    }
    if (p.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (n + j < n_size) values[j] += to_acc(p.bias[p.bias_along_n ? n + j : m]);
      }
    }
    activate_all<T>(p.activation, values);
    T* const out = p.out + p.out_m.offset(m);
    if (p.out_vectors) {
      store_vec<kVec>(out + p.out_n.offset(n), values);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (n + j < n_size) out[p.out_n.offset(n + j)] = from_acc<T>(values[j]);
      }
    }
  }
}

template <typename T>
cudaError_t start(const Product<T>& p, int splits, cudaStream_t stream) {
  const int64_t m_tiles = ceil_div<int64_t>(p.a.outer.size, kRows),
                n_tiles = ceil_div<int64_t>(p.b.outer.size, kColumns);
  const TileGrid grid(m_tiles, n_tiles, p.m_tiles_first);
  const auto go = [&](auto a_along_k, auto b_along_k) {
    constexpr bool kA = decltype(a_along_k)::value, kB = decltype(b_along_k)::value;
    constexpr size_t kTiles =
        kStages * (OperandTile<T, kA, kRows>::kTileElements + OperandTile<T, kB, kColumns>::kTileElements) * sizeof(T);
    constexpr size_t kSmem = std::max(kTiles, kRows * kResultPitch * sizeof(float));
    const LaunchConfig config{dim3(static_cast<unsigned>(m_tiles * n_tiles), static_cast<unsigned>(splits)),
                              dim3(kThreads), kSmem, stream};
    return launch(product_mma_kernel<T, kA, kB>, config, p, grid);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (p.a.along_k) return p.b.along_k ? go(yes, yes) : go(yes, no);
  return p.b.along_k ? go(no, yes) : go(no, no);
}

}  // namespace

cudaError_t launch_pointwise_mma_forward(const Launch& call, const SplitsCut&) {
  return dispatch_half(
      call.dtype, [&](auto tag) { return start(forward_product<typename decltype(tag)::type>(call), 1, call.stream); });
}

cudaError_t launch_pointwise_mma_grad_input(const Launch& call, const SplitsCut&) {
  return dispatch_half(call.dtype, [&](auto tag) {
    return start(grad_input_product<typename decltype(tag)::type>(call), 1, call.stream);
  });
}

cudaError_t launch_pointwise_mma_grad_weight(const Launch& call, const SplitsCut& cut) {
  const cudaError_t error = dispatch_half(call.dtype, [&](auto tag) {
    return start(grad_weight_product<typename decltype(tag)::type>(call, cut.splits), cut.splits, call.stream);
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
