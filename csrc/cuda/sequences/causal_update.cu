// Decoding: the next token or tokens of every sequence, and its state moved on in place, in one launch.
//
//   y[n, c, t] = sum over s of  w[c, s] * z[n, c, t - (S - 1 - s) * dilation]
//
// where z is the tokens, and before them the state of n: its last inputs, the latest last, or all of them in a ring.
//
// Thread-to-data map. A thread has one channel of one sequence, and is alone in reading and writing that channel's
// state; neighbouring threads have neighbouring channels, a block kThreads of them. The last kHeld inputs stand in
// registers, the latest last, and all loads are on their way before the first is used: a call waits for memory twice,
// for the state's row and for what lies there. With kHeld of 0 every tap is loaded where it is needed.
#include <cmath>

#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/sequences/cut.h"
#include "cuda/sequences/numbers.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = kCausalThreads;

// Along a sequence offsets have 32 bits: cut.h sends others elsewhere.
struct Steps {
  int64_t n, c;
  int l;
  explicit Steps(const SequenceStrides& s) : n(s.n), c(s.c), l(static_cast<int>(s.l)) {}
};

struct UpdateArgs {
  Steps x, state, y;
  int64_t w_c, states;
  int w_s;
  WholeNumbers lengths, rows;
  int C, T, S, dilation, length;
  FastDiv by_chunk, by_length;  // block -> (chunk of channels, n); token -> its place in a ring
};

// One channel of one sequence.
template <typename T, typename W>
struct Channel {
  using A = acc_t<T>;
  const UpdateArgs& a;
  const T* x;
  const W* w;
  A start;  // of every sum: the bias
  Activation activation;
  T *state, *y;
  bool ring;
  int place;  // where the next token goes in the ring; the length of a state that is shifted

  // Where the input lies that came so many tokens before the next one, at most the state's length.
  __device__ __forceinline__ T* before(int back) const {
    const int at = place - back;
    return state + (at < 0 ? at + a.length : at) * a.state.l;
  }

  // Token t goes to the ring if none comes later that takes its place.
  __device__ __forceinline__ void keep(int t, A token) {
    if (!ring) return;
    if (t >= a.T - a.length) state[place * a.state.l] = from_acc<T>(token);
    if (++place == a.length) place = 0;
  }

  __device__ __forceinline__ void write(int t, A sum) const {
    y[t * a.y.l] = from_acc<T>(activate_as<T>(activation, sum));
  }

  template <int kHeld>
  __device__ __forceinline__ void in_registers() {
    const int kept = ring ? a.S - 1 : a.length;
    A held[kHeld], taps[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int back = kHeld - i;
      held[i] = back <= kept ? to_acc(*before(back)) : A(0);
      taps[i] = back < a.S ? to_acc(w[(a.S - 1 - back) * a.w_s]) : A(0);
    }
    const A last = to_acc(w[(a.S - 1) * a.w_s]);
    for (int t = 0; t < a.T; ++t) {
      const A token = to_acc(x[t * a.x.l]);
      A sum = start;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (kHeld - i < a.S) sum += held[i] * taps[i];  // what no tap sees may be infinite
      }
      write(t, sum + token * last);
      keep(t, token);
#pragma unroll
      for (int i = 0; i + 1 < kHeld; ++i) held[i] = held[i + 1];
      held[kHeld - 1] = token;
    }
    if (ring) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int back = kHeld - i;
      if (back <= kept) *before(back) = from_acc<T>(held[i]);
    }
  }

  __device__ __forceinline__ void from_memory() {
    for (int t = 0; t < a.T; ++t) {
      A sum = start;
      for (int s = 0; s < a.S; ++s) {
        const int at = t - (a.S - 1 - s) * a.dilation;
        sum += to_acc(at < 0 ? *before(-at) : x[at * a.x.l]) * to_acc(w[s * a.w_s]);
      }
      write(t, sum);
    }
    if (ring) {
      for (int t = 0; t < a.T; ++t) keep(t, to_acc(x[t * a.x.l]));
      return;
    }
    for (int i = 0; i < a.length; ++i) {
      const int from = i + a.T;
      state[i * a.state.l] = from < a.length ? state[from * a.state.l] : x[(from - a.length) * a.x.l];
    }
  }
};

template <typename T, typename W, int kHeld>
__global__ void __launch_bounds__(kThreads)
    causal_update_kernel(const UpdateArgs a, const T* __restrict__ x, const W* __restrict__ w,
                         const W* __restrict__ bias, const Activation activation, T* state, T* __restrict__ y) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  uint32_t chunk = blockIdx.x;
  const int64_t n = a.by_chunk.split(chunk);
  const int64_t c = static_cast<int64_t>(chunk) * kThreads + threadIdx.x;
  if (c >= a.C) return;
  y += n * a.y.n + c * a.y.c;
  const int64_t row = a.rows.data == nullptr ? n : number_at(a.rows, n * a.rows.n);
  if (row < 0 || row >= a.states) {
    // Skipped. A row that there is not names no memory: its outputs say so, and nothing else is touched.
    const T none = from_acc<T>(row < 0 ? A(0) : A(NAN));
    for (int t = 0; t < a.T; ++t) y[t * a.y.l] = none;
    return;
  }
  Channel<T, W> channel{a,
                        x + n * a.x.n + c * a.x.c,
                        w + c * a.w_c,
                        bias == nullptr ? A(0) : to_acc(bias[c]),
                        activation,
                        state + row * a.state.n + c * a.state.c,
                        y,
                        a.lengths.data != nullptr,
                        a.length};
  if (channel.ring) channel.place = static_cast<int>(remainder_of(number_at(a.lengths, n * a.lengths.n), a.by_length));
  if constexpr (kHeld > 0) {
    channel.template in_registers<kHeld>();
  } else {
    channel.from_memory();
  }
}

template <typename T, typename W>
cudaError_t start(const CausalUpdateShape& s, const CausalUpdateMemory& m, cudaStream_t stream) {
  const CausalUpdateCut cut = causal_update_cut(s, m.lengths.data != nullptr);
  const UpdateArgs a{Steps(s.x),
                     Steps(s.state),
                     Steps(s.y),
                     s.w_c,
                     s.states,
                     static_cast<int>(s.w_s),
                     m.lengths,
                     m.rows,
                     static_cast<int>(s.C),
                     static_cast<int>(s.T),
                     static_cast<int>(s.S),
                     static_cast<int>(s.dilation),
                     static_cast<int>(s.length),
                     FastDiv(ceil_div(s.C, kThreads)),
                     FastDiv(std::max<int64_t>(s.length, 1))};
  const LaunchConfig config{dim3(static_cast<unsigned>(cut.blocks)), dim3(kThreads), 0, stream};
  const auto go = [&](auto kernel) {
    return launch(kernel, config, a, static_cast<const T*>(m.x), static_cast<const W*>(m.w),
                  static_cast<const W*>(m.epilogue.bias), m.epilogue.activation, static_cast<T*>(m.state),
                  static_cast<T*>(m.y));
  };
  if (cut.held > kUpdateHeld) return go(causal_update_kernel<T, W, 0>);
  return cut.held > kUpdateHeld / 2 ? go(causal_update_kernel<T, W, kUpdateHeld>)
                                    : go(causal_update_kernel<T, W, kUpdateHeld / 2>);
}

}  // namespace

cudaError_t launch_causal_update(const CausalUpdateShape& s, DType dtype, const CausalUpdateMemory& m,
                                 cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (s.float_weight) return start<T, float>(s, m, stream);
    }
    return start<T, T>(s, m, stream);
  });
}

}  // namespace sepconv::cuda
