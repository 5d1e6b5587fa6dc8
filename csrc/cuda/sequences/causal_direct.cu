// Causal sequences of any width, dilation and strides, one element at a time.
//
// Thread-to-data map. A thread computes kOutputs outputs: of one channel at neighbouring positions where channels are
// the denser ones in memory, else of one position in neighbouring channels. Neighbouring threads have neighbouring
// channels, or positions; then the next outputs, the next sequence. Every tap is loaded from memory or the cache.
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/sequences/cut.h"
#include "cuda/sequences/numbers.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = kCausalThreads;
constexpr int kOutputs = kCausalChannels;

// Strides as 32-bit numbers, but for a sequence's: the plan sends larger sequences elsewhere.
struct NarrowStrides {
  int64_t n;
  int c, l;
  explicit NarrowStrides(const SequenceStrides& s) : n(s.n), c(static_cast<int>(s.c)), l(static_cast<int>(s.l)) {}
};

struct DirectArgs {
  NarrowStrides x, states, y;
  int w_c, w_s;
  WholeNumbers numbers;
  int C, L, S, dilation, threads;
  bool channels_fastest;
  FastDiv by_fastest, by_group;  // thread -> (channel or position, group of the others, n)
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    causal_direct_kernel(const DirectArgs a, const T* __restrict__ x, const T* __restrict__ states,
                         const T* __restrict__ w, const T* __restrict__ bias, const Activation activation,
                         T* __restrict__ y) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  uint32_t fastest = blockIdx.x * kThreads + threadIdx.x;
  if (fastest >= static_cast<uint32_t>(a.threads)) return;
  uint32_t group = a.by_fastest.split(fastest);
  const int64_t n = a.by_group.split(group);
  const int reach = (a.S - 1) * a.dilation, others = a.channels_fastest ? a.L : a.C;
  int c[kOutputs], q[kOutputs], seen[kOutputs];  // `seen`: how far back the taps see, -1 for no output
  bool padding[kOutputs];
  A sums[kOutputs];
  const bool packed = a.numbers.data != nullptr;
  Run run(a.numbers, n, states != nullptr ? reach : 0);
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    const int other = static_cast<int>(group) * kOutputs + j;
    c[j] = a.channels_fastest ? static_cast<int>(fastest) : other;
    q[j] = a.channels_fastest ? other : static_cast<int>(fastest);
    padding[j] = false;
    seen[j] = other < others ? (states != nullptr ? reach : min(q[j], reach)) : -1;
    if (packed && j == 0) run.begin(q[j] - reach);
    if (packed && seen[j] >= 0) {
      run.advance(q[j]);
      seen[j] = min(run.age, reach);
      padding[j] = run.number < 0;
    }
    sums[j] = bias == nullptr || seen[j] < 0 ? A(0) : to_acc(bias[c[j]]);
  }
  x += n * a.x.n;
  y += n * a.y.n;
  for (int s = 0, back = reach; s < a.S; ++s, back -= a.dilation) {
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      if (back > seen[j]) continue;
      const int at = q[j] - back;
      const T* from = at >= 0 ? x + (c[j] * a.x.c + at * a.x.l)
                              : states + n * a.states.n + (c[j] * a.states.c + (reach + at) * a.states.l);
      sums[j] += to_acc(*from) * to_acc(w[c[j] * a.w_c + s * a.w_s]);
    }
  }
  activate_all<T>(activation, sums);
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    if (seen[j] < 0) continue;
    y[c[j] * a.y.c + q[j] * a.y.l] = from_acc<T>(padding[j] ? A(0) : sums[j]);
  }
}

template <typename T>
cudaError_t start(const CausalShape& s, const CausalMemory& m, cudaStream_t stream) {
  const bool channels_fastest = causal_channels_dense(s);
  const int64_t fastest = channels_fastest ? s.C : s.L, groups = ceil_div(channels_fastest ? s.L : s.C, kOutputs);
  const int64_t threads = s.N * groups * fastest;
  const DirectArgs a{NarrowStrides(s.x),        NarrowStrides(s.states),
                     NarrowStrides(s.y),        static_cast<int>(s.w_c),
                     static_cast<int>(s.w_s),   m.numbers,
                     static_cast<int>(s.C),     static_cast<int>(s.L),
                     static_cast<int>(s.S),     static_cast<int>(s.dilation),
                     static_cast<int>(threads), channels_fastest,
                     FastDiv(fastest),          FastDiv(groups)};
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads))), dim3(kThreads), 0,
                            stream};
  return launch(causal_direct_kernel<T>, config, a, static_cast<const T*>(m.x), static_cast<const T*>(m.states),
                static_cast<const T*>(m.w), static_cast<const T*>(m.epilogue.bias), m.epilogue.activation,
                static_cast<T*>(m.y));
}

}  // namespace

cudaError_t launch_causal_direct(const CausalShape& s, DType dtype, const CausalMemory& m, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto tag) { return start<typename decltype(tag)::type>(s, m, stream); });
}

}  // namespace sepconv::cuda
