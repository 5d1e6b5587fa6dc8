// Causal sequences whose channels are dense ([N, L, C], or channels of a wider tensor): up to kCausalTaps taps.
//
//   y[n, c, q] = sum over s of  w[c, s] * z[n, c, q - (S - 1 - s) * dilation],  z: the input behind its states
//
// Thread-to-data map. A thread has one vector of 16 bytes of channels, and walks down a strip of a.rows positions that
// lie a dilation apart; neighbouring threads have neighbouring vectors, then the next phase of the dilation, the next
// strip, the next sequence. What comes next is copied to shared memory ahead of the walk: a ring of kAhead vectors,
// which belongs to its thread alone, so that no thread waits for another. The last kTaps vectors stand in registers as
// sums. So an element is read once, but for the kTaps - 1 before each strip.
#include "cuda/device/ptx.cuh"
#include "cuda/sequences/cut.h"
#include "cuda/sequences/numbers.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = kCausalThreads;
constexpr int kTaps = kCausalTaps;
constexpr int kAhead = 8;
static_assert(kAhead % kTaps == 0);

struct NlcArgs {
  SequenceStrides x, states, y;
  int64_t w_c, w_s;
  WholeNumbers numbers;
  int L, S, dilation, rows, threads;
  bool dense_weight;                      // of four taps, on 16 bytes
  FastDiv by_vector, by_phase, by_strip;  // thread -> (vector, phase, strip, n)
};

// taps[k] is of the element k dilations before the output's own.
template <typename T, int kVec>
__device__ __forceinline__ void load_taps(const NlcArgs& a, const T* __restrict__ w, acc_t<T> (&taps)[kTaps][kVec]) {
  if (a.dense_weight) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      acc_t<T> some[kVec];
      load_vec<kVec>(some, w + i * kVec);
#pragma unroll
      for (int v = 0; v < kVec; ++v) taps[kTaps - 1 - (i * kVec + v) % kTaps][(i * kVec + v) / kTaps] = some[v];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      taps[k][v] = k < a.S ? to_acc(w[v * a.w_c + (a.S - 1 - k) * a.w_s]) : acc_t<T>(0);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    causal_nlc_kernel(const NlcArgs a, const T* __restrict__ x, const T* __restrict__ states, const T* __restrict__ w,
                      const T* __restrict__ bias, const Activation activation, T* __restrict__ y) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  constexpr int kVec = kVec16<T>;
  using Vector = Vec<T, kVec>;
  SMEM_ARRAY(Vector, ring, [kAhead][kThreads]);
  uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= static_cast<uint32_t>(a.threads)) return;
  uint32_t phase = a.by_vector.split(vector);
  uint32_t strip = a.by_phase.split(phase);
  const int64_t n = a.by_strip.split(strip);
  const int c = static_cast<int>(vector) * kVec, reach = (a.S - 1) * a.dilation;
  // The first vector of the walk, kTaps - 1 before the first output's.
  const int first = static_cast<int>(phase) + (static_cast<int>(strip) * a.rows - (kTaps - 1)) * a.dilation;
  if (first + (kTaps - 1) * a.dilation >= a.L) return;
  x += n * a.x.n + c;
  y += n * a.y.n + c;

  const int steps = a.rows + kTaps - 1;
  const auto copy_ahead = [&](int i) {
    const int position = first + i * a.dilation;
    if (i < steps) {
      const bool inside = position >= 0 && position < a.L;
      cp_async16(&ring[i % kAhead][threadIdx.x], x + (inside ? position * a.x.l : 0), inside);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy_ahead(i);

  A taps[kTaps][kVec], start[kVec], window[kTaps][kVec];
  load_taps<T, kVec>(a, w + c * a.w_c, taps);
#pragma unroll
  for (int v = 0; v < kVec; ++v) start[v] = bias == nullptr ? A(0) : to_acc(bias[c + v]);
  const bool packed = a.numbers.data != nullptr;
  Run run(a.numbers, n, states != nullptr ? reach : 0);
  if (packed) run.begin(first + (kTaps - a.S) * a.dilation);

  int position = first;
  for (int i0 = 0; i0 < steps; i0 += kTaps) {
#pragma unroll
    for (int u = 0; u < kTaps; ++u, position += a.dilation) {
      const int i = i0 + u;
      cp_async_wait<kAhead - 1>();
      load_vec<kVec>(window[u], ring[i % kAhead][threadIdx.x].v);
      if (states != nullptr && position < 0 && position >= -reach) {
        const T* from = states + n * a.states.n + c * a.states.c + (reach + position) * a.states.l;
#pragma unroll
        for (int v = 0; v < kVec; ++v) window[u][v] = to_acc(from[v * a.states.c]);
      }
      copy_ahead(i + kAhead);
      if (i < kTaps - 1 || position >= a.L) continue;
      int seen = reach;  // how far back the taps see
      bool padding = false;
      if (packed) {
        run.advance(position);
        seen = min(run.age, reach);
        padding = run.number < 0;
      }
      A sums[kVec];
#pragma unroll
      for (int v = 0; v < kVec; ++v) sums[v] = start[v];
#pragma unroll
      for (int k = kTaps - 1; k >= 0; --k) {
        if (k * a.dilation > seen) continue;
#pragma unroll
        for (int v = 0; v < kVec; ++v) sums[v] += window[(u + kTaps - k) % kTaps][v] * taps[k][v];
      }
      activate_all<T>(activation, sums);
#pragma unroll
      for (int v = 0; v < kVec; ++v) sums[v] = padding ? A(0) : sums[v];
      store_vec<kVec>(y + position * a.y.l, sums);
    }
  }
}

template <typename T>
cudaError_t start(const CausalShape& s, const CausalMemory& m, const CausalCut& cut, cudaStream_t stream) {
  constexpr int kVec = kVec16<T>;
  const CausalWalk walk = causal_walk(s, kVec, cut.rows);
  const auto* w = static_cast<const T*>(m.w);
  const bool dense_weight =
      s.S == kTaps && s.w_s == 1 && s.w_c == kTaps && reinterpret_cast<uintptr_t>(m.w) % sizeof(Vec<T, kVec>) == 0;
  const NlcArgs a{s.x,
                  s.states,
                  s.y,
                  s.w_c,
                  s.w_s,
                  m.numbers,
                  static_cast<int>(s.L),
                  static_cast<int>(s.S),
                  static_cast<int>(s.dilation),
                  cut.rows,
                  static_cast<int>(walk.threads),
                  dense_weight,
                  FastDiv(s.C / kVec),
                  FastDiv(walk.phases),
                  FastDiv(walk.strips)};
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(walk.threads, kThreads))), dim3(kThreads), 0,
                            stream};
  return launch(causal_nlc_kernel<T>, config, a, static_cast<const T*>(m.x), static_cast<const T*>(m.states), w,
                static_cast<const T*>(m.epilogue.bias), m.epilogue.activation, static_cast<T*>(m.y));
}

}  // namespace

cudaError_t launch_causal_nlc(const CausalShape& s, DType dtype, const CausalMemory& m, const CausalCut& cut,
                              cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto tag) { return start<typename decltype(tag)::type>(s, m, cut, stream); });
}

}  // namespace sepconv::cuda
