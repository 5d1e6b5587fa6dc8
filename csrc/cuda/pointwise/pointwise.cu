// The 1x1 convolution and its gradients as matrix products (pointwise.cuh) in plain arithmetic, for every element type.
//
// Threads to data: a block of 128 threads computes a tile of 64 x 64 of the result, 16 columns of threads times 8 rows
// of threads, each thread 8 rows x 4 neighbouring columns in registers. The sum goes in steps of 16 along k: while a
// step is multiplied out of shared memory, where both tiles lie as [k][64] in the accumulation type, the next step is
// on its way from global memory into registers; two buffers in shared memory, so that one barrier a step is enough.
#include "cuda/device/ptx.cuh"
#include "cuda/pointwise/pointwise.cuh"

namespace sepconv::cuda {
namespace {

using namespace pointwise;

constexpr int kThreads = 128;
constexpr int kTile = 64;               // rows and columns of the result
constexpr int kDepth = 16;              // of a step along k
constexpr int kRows = 8, kColumns = 4;  // of a thread
constexpr int kPitch = kTile + 4;       // of a row in shared memory: rows of a vector store fall on different banks

// One thread's share of one operand's tile: global memory -> registers -> shared memory.
template <typename T, bool kAlongK>
struct Loader : TileShare<T, kAlongK, kTile, kDepth, kThreads> {
  using Share = TileShare<T, kAlongK, kTile, kDepth, kThreads>;
  using Share::Share, Share::kVec, Share::kVectors, Share::kElements;
  T held[kElements];

  __device__ __forceinline__ void load(const Operand<T>& operand, uint32_t k0, uint32_t k_end) {
    if (operand.vectors) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const T* const p = this->address(operand, i, k0, k_end);
        Vec<T, kVec> v{};
        if (p != nullptr) v = *reinterpret_cast<const Vec<T, kVec>*>(p);
#pragma unroll
        for (int j = 0; j < kVec; ++j) held[i * kVec + j] = v.v[j];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) held[e] = this->element(operand, e, k0, k_end);
    }
  }

  __device__ __forceinline__ void store(const Operand<T>& operand, acc_t<T> (&tile)[kDepth][kPitch]) const {
    if (kAlongK || operand.vectors) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int outer = Share::outer(e / kVec), depth = Share::depth(e / kVec), j = e % kVec;
        tile[kAlongK ? depth + j : depth][kAlongK ? outer : outer + j] = to_acc(held[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) tile[Share::element_depth(e)][Share::element_outer(e)] = to_acc(held[e]);
    }
  }
};

template <int kN, typename A>
__device__ __forceinline__ void read(A (&out)[kN], const A* p) {
  constexpr int kVec = kVec16<A>;
#pragma unroll
  for (int i = 0; i < kN; i += kVec) {
    const Vec<A, kVec> v = *reinterpret_cast<const Vec<A, kVec>*>(p + i);
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[i + j] = v.v[j];
  }
}

template <typename T, bool kAAlongK, bool kBAlongK>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 4 ? 4 : 2)
    product_kernel(const Product<T> p, const TileGrid grid) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  SMEM_ARRAY(A, a_tile, [2][kDepth][kPitch]);
  SMEM_ARRAY(A, b_tile, [2][kDepth][kPitch]);

  uint32_t m_tile, n_tile;
  grid.split(blockIdx.x, m_tile, n_tile);
  const uint32_t k_begin = blockIdx.y * p.k_a_split;
  const uint32_t k_end = min(k_begin + p.k_a_split, p.a.k.size);
  Loader<T, kAAlongK> a(p.a, m_tile * kTile);
  Loader<T, kBAlongK> b(p.b, n_tile * kTile);
  const int row = static_cast<int>(threadIdx.x) / (kTile / kColumns) * kRows;
  const int column = static_cast<int>(threadIdx.x) % (kTile / kColumns) * kColumns;

  A sums[kRows * kColumns] = {};
  a.load(p.a, k_begin, k_end);
  b.load(p.b, k_begin, k_end);
  int buffer = 0;
  for (uint32_t k0 = k_begin; k0 < k_end; k0 += kDepth, buffer ^= 1) {
    a.store(p.a, a_tile[buffer]);
    b.store(p.b, b_tile[buffer]);
    __syncthreads();  // also keeps the other buffer's readers, one step behind, before its next writers
    if (k0 + kDepth < k_end) {
      a.load(p.a, k0 + kDepth, k_end);
      b.load(p.b, k0 + kDepth, k_end);
    }
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      A left[kRows], right[kColumns];
      read(left, &a_tile[buffer][k][row]);
      read(right, &b_tile[buffer][k][column]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i * kColumns + j] += left[i] * right[j];
      }
    }
  }

  const uint32_t m0 = m_tile * kTile + row, n0 = n_tile * kTile + column;
  const uint32_t m_size = p.a.outer.size, n_size = p.b.outer.size;
  if (p.partials != nullptr) {
    A* const partials = p.partials + static_cast<int64_t>(blockIdx.y) * m_size * n_size;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (m0 + i < m_size && n0 + j < n_size) {
          partials[static_cast<int64_t>(m0 + i) * n_size + n0 + j] = sums[i * kColumns + j];
        }
      }
    }
  } else {
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const uint32_t channel = p.bias_along_n ? n0 + j : m0 + i, channels = p.bias_along_n ? n_size : m_size;
          if (channel < channels) sums[i * kColumns + j] += to_acc(p.bias[channel]);
        }
      }
    }
    activate_all<T>(p.activation, sums);
    constexpr int kOut = kVec16<T> < kColumns ? kVec16<T> : kColumns;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (m0 + i >= m_size) break;
      T* const out = p.out + p.out_m.offset(m0 + i);
#pragma unroll
      for (int j = 0; j < kColumns; j += kOut) {
        if (p.out_vectors) {
          A values[kOut];
#pragma unroll
          for (int l = 0; l < kOut; ++l) values[l] = sums[i * kColumns + j + l];
          if (n0 + j < n_size) store_vec<kOut>(out + p.out_n.offset(n0 + j), values);
        } else {
#pragma unroll
          for (int l = 0; l < kOut; ++l) {
            if (n0 + j + l < n_size) out[p.out_n.offset(n0 + j + l)] = from_acc<T>(sums[i * kColumns + j + l]);
          }
        }
      }
    }
  }
}

template <typename T>
cudaError_t start(const Product<T>& p, int splits, cudaStream_t stream) {
  const int64_t m_tiles = ceil_div<int64_t>(p.a.outer.size, kTile), n_tiles = ceil_div<int64_t>(p.b.outer.size, kTile);
  const TileGrid grid(m_tiles, n_tiles, p.m_tiles_first);
  const LaunchConfig config{dim3(static_cast<unsigned>(m_tiles * n_tiles), static_cast<unsigned>(splits)),
                            dim3(kThreads), 0, stream};
  const auto go = [&](auto a_along_k, auto b_along_k) {
    return launch(product_kernel<T, decltype(a_along_k)::value, decltype(b_along_k)::value>, config, p, grid);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (p.a.along_k) return p.b.along_k ? go(yes, yes) : go(yes, no);
  return p.b.along_k ? go(no, yes) : go(no, no);
}

}  // namespace

cudaError_t launch_pointwise_forward(const Launch& call, const SplitsCut&) {
  return dispatch_dtype(
      call.dtype, [&](auto tag) { return start(forward_product<typename decltype(tag)::type>(call), 1, call.stream); });
}

cudaError_t launch_pointwise_grad_input(const Launch& call, const SplitsCut&) {
  return dispatch_dtype(call.dtype, [&](auto tag) {
    return start(grad_input_product<typename decltype(tag)::type>(call), 1, call.stream);
  });
}

cudaError_t launch_pointwise_grad_weight(const Launch& call, const SplitsCut& cut) {
  const cudaError_t error = dispatch_dtype(call.dtype, [&](auto tag) {
    return start(grad_weight_product<typename decltype(tag)::type>(call, cut.splits), cut.splits, call.stream);
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
