// Causal sequences whose positions are dense ([N, C, L]): up to kCausalTaps taps without dilation, not float64.
//
// Thread-to-data map. A thread has 16 bytes of positions of kChannels channels, one below the other;
// neighbouring threads have neighbouring vectors, then the next channels, the next sequence. It loads its vectors and,
// of each, the kBefore positions before it, which its neighbour loads too and the cache has: all loads are on their way
// before the first is used. Which taps an output of packed sequences has follows from the numbers of its positions,
// read once for all channels. kWhole: the 16 bytes are aligned, one load and one store; else elements move one by one,
// and the last thread of a row has fewer.
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/sequences/cut.h"
#include "cuda/sequences/numbers.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = kCausalThreads;
constexpr int kTaps = kCausalTaps;
constexpr int kChannels = kCausalChannels;
constexpr int kBefore = 4;
static_assert(kBefore >= kTaps - 1);

struct NclArgs {
  SequenceStrides x, states, y;
  int64_t w_c, w_s;
  WholeNumbers numbers;
  int C, L, S, threads;
  bool dense_weight;            // of four taps, on vectors of four
  FastDiv by_vector, by_group;  // thread -> (vector, group of channels, n)
};

// kN elements; one by one the first `left`, and the last of them again in the place of what there is no more.
template <bool kWhole, typename T, int kN>
__device__ __forceinline__ void load(T (&to)[kN], const T* __restrict__ from, int left) {
  if constexpr (kWhole) {
    const auto all = *reinterpret_cast<const Vec<T, kN>*>(from);
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = all.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i] = from[min(i, left - 1)];
  }
}

// Bit 4 j + k: output j of the vector at q has a tap on the position k before its own; bit 4 j: it is no padding.
template <int kVec>
__device__ __forceinline__ uint32_t taps_in_runs(const WholeNumbers& numbers, int64_t n, int q, int L,
                                                 bool has_states) {
  int64_t seen[kTaps - 1 + kVec];
#pragma unroll
  for (int i = 0; i < kTaps - 1 + kVec; ++i) {
    seen[i] = number_at(numbers, n * numbers.n + min(max(q + i - (kTaps - 1), 0), L - 1) * numbers.l);
  }
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    bool inside = seen[j + kTaps - 1] >= 0;
    bits |= static_cast<uint32_t>(inside) << (4 * j);
#pragma unroll
    for (int k = 1; k < kTaps; ++k) {
      // The run goes on from k before the output to k - 1 before it; at position 0 a run of its own begins, or what the
      // states belong to goes on.
      const int at = q + j - k + 1;
      const bool begins = at > 0 ? seen[j + kTaps - k] != seen[j + kTaps - 1 - k] : at == 0 && !has_states;
      inside = inside && !begins;
      bits |= static_cast<uint32_t>(inside) << (4 * j + k);
    }
  }
  return bits;
}

template <typename T, bool kPacked, bool kWhole>
__global__ void __launch_bounds__(kThreads, kPacked && !kWhole   ? 3
                                            : kPacked || !kWhole ? 4
                                                                 : 5)
    causal_ncl_kernel(const NclArgs a, const T* __restrict__ x, const T* __restrict__ states, const T* __restrict__ w,
                      const T* __restrict__ bias, const Activation activation, T* __restrict__ y) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  constexpr int kVec = kVec16<T>;
  uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= static_cast<uint32_t>(a.threads)) return;
  uint32_t group = a.by_vector.split(vector);
  const int64_t n = a.by_group.split(group);
  const int q = static_cast<int>(vector) * kVec, c0 = static_cast<int>(group) * kChannels;
  T own[kChannels][kVec], before[kChannels][kBefore];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const T* from = x + n * a.x.n + min(c0 + i, a.C - 1) * a.x.c + q;
    load<kWhole>(own[i], from, a.L - q);
    load<kWhole>(before[i], q > 0 ? from - kBefore : from, q > 0 ? kBefore : a.L);
  }
  uint32_t bits = 0;
  bool whole_run = true;  // no run begins or ends here: most threads of long sequences
  if constexpr (kPacked) {
    bits = taps_in_runs<kVec>(a.numbers, n, q, a.L, states != nullptr);
    const uint32_t needed = (0x11111111u >> (32 - 4 * kVec)) * ((1u << a.S) - 1);
    whole_run = (bits & needed) == needed;
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int c = c0 + i;
    if (c >= a.C) break;
    A in[kBefore + kVec], taps[kBefore], sums[kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) in[kBefore + v] = to_acc(own[i][v]);
#pragma unroll
    for (int v = 0; v < kBefore; ++v) in[v] = to_acc(before[i][v]);
    if (q == 0) {
#pragma unroll
      for (int k = 1; k < kTaps; ++k) {
        const int64_t at = n * a.states.n + c * a.states.c + (a.S - 1 - k) * a.states.l;
        in[kBefore - k] = states != nullptr && k < a.S ? to_acc(states[at]) : A(0);
      }
    }
    if (a.dense_weight) {
      load_vec<kBefore>(taps, w + c * a.w_c);
    } else {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        taps[kTaps - 1 - k] = k < a.S ? to_acc(w[c * a.w_c + (a.S - 1 - k) * a.w_s]) : A(0);
      }
    }
    const A start = bias == nullptr ? A(0) : to_acc(bias[c]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sums[j] = start;
#pragma unroll
    for (int k = kTaps - 1; k >= 0; --k) {
      if (k >= a.S) continue;
      if (whole_run) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) sums[j] += in[kBefore + j - k] * taps[kTaps - 1 - k];
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if (bits & 1u << (4 * j + k)) sums[j] += in[kBefore + j - k] * taps[kTaps - 1 - k];
        }
      }
    }
    activate_all<T>(activation, sums);
    if constexpr (kPacked) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums[j] = bits & 1u << (4 * j) ? sums[j] : A(0);
    }
    T* to = y + n * a.y.n + c * a.y.c + q;
    if constexpr (kWhole) {
      store_vec<kVec>(to, sums);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (q + j < a.L) to[j] = from_acc<T>(sums[j]);
      }
    }
  }
}

template <typename T, bool kWhole>
cudaError_t start(const CausalShape& s, const CausalMemory& m, cudaStream_t stream) {
  constexpr int kVec = kVec16<T>;
  const int64_t vectors = ceil_div(s.L, kVec), groups = ceil_div(s.C, kChannels), threads = s.N * groups * vectors;
  const bool dense_weight =
      s.S == kTaps && s.w_s == 1 && s.w_c == kTaps && reinterpret_cast<uintptr_t>(m.w) % sizeof(Vec<T, kBefore>) == 0;
  const NclArgs a{s.x,
                  s.states,
                  s.y,
                  s.w_c,
                  s.w_s,
                  m.numbers,
                  static_cast<int>(s.C),
                  static_cast<int>(s.L),
                  static_cast<int>(s.S),
                  static_cast<int>(threads),
                  dense_weight,
                  FastDiv(vectors),
                  FastDiv(groups)};
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads))), dim3(kThreads), 0,
                            stream};
  const auto go = [&](auto kernel) {
    return launch(kernel, config, a, static_cast<const T*>(m.x), static_cast<const T*>(m.states),
                  static_cast<const T*>(m.w), static_cast<const T*>(m.epilogue.bias), m.epilogue.activation,
                  static_cast<T*>(m.y));
  };
  return m.numbers.data != nullptr ? go(causal_ncl_kernel<T, true, kWhole>) : go(causal_ncl_kernel<T, false, kWhole>);
}

}  // namespace

cudaError_t launch_causal_ncl(const CausalShape& s, DType dtype, const CausalMemory& m, const CausalCut& cut,
                              cudaStream_t stream) {
  const auto go = [&](auto tag) {
    using T = typename decltype(tag)::type;
    return cut.vec > 1 ? start<T, true>(s, m, stream) : start<T, false>(s, m, stream);
  };
  return dtype == DType::float32 ? go(TypeTag<float>{}) : dispatch_half(dtype, go);
}

}  // namespace sepconv::cuda
