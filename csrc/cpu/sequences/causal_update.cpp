// Decoding: a token or several, and the state of what came before.
//
// A task has some channels of one sequence. A thread takes a vector of them at a time: it gathers what the taps see,
// the last `reach` inputs and the tokens, into vectors of channels in scratch, sums, and writes outputs and state back.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/sequences/causal_update.cpp"
#include "core/activation.h"
#include "core/arithmetic.h"
#include "cpu/sequences/causal.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void causal_update(const CausalUpdateShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                   const int64_t* lengths, const int64_t* rows, void* state, void* y) {
  SEPCONV_BEST_ISA(causal_update)(s, dtype, x, w, epilogue, lengths, rows, state, y);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

// `count` channels, at most a vector of them.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load_channels(const T* p, int64_t step, int count) {
  using A = accumulate_t<T>;
  if (step == 1) return count == kLanes<A> ? load(p) : load_first(p, count);
  A lanes[kLanes<A>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = load_one(p + i * step);
  return load(lanes);
}

template <typename T>
SEPCONV_INLINE void store_channels(T* p, int64_t step, Vector<accumulate_t<T>> v, int count) {
  using A = accumulate_t<T>;
  if (step == 1) return count == kLanes<A> ? store(p, v) : store_first(p, v, count);
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) store_one(p + i * step, lanes[i]);
}

inline constexpr int64_t kChannelsPerTask = 2048;

template <typename T, typename W>
struct Update {
  using A = accumulate_t<T>;
  const CausalUpdateShape& s;
  const T* x;
  const W *w, *bias;
  Activation activation;
  const int64_t *lengths, *rows;
  T *state, *y;

  void operator()(int64_t task) const {
    const int64_t parts = ceil_div(s.C, kChannelsPerTask), n = task / parts, begin = task % parts * kChannelsPerTask;
    const int64_t end = std::min(s.C, begin + kChannelsPerTask), row = rows == nullptr ? n : rows[n];
    if (row < 0) {
      for (int64_t t = 0; t < s.T; ++t) {
        for (int64_t c = begin; c < end; ++c) y[n * s.y.n + c * s.y.c + t * s.y.l] = T{};
      }
      return;
    }
    constexpr int64_t kInPlace = 16;  // vectors on the stack: the usual widths, one token
    A few[kInPlace * kLanes<A>];
    const int64_t all = (lengths == nullptr ? s.length : s.reach()) + s.T;
    std::unique_ptr<A[]> many(all > kInPlace ? new A[all * kLanes<A>] : nullptr);
    A* const seen = all > kInPlace ? many.get() : few;
    for (int64_t c = begin; c < end; c += kLanes<A>) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, end - c));
      T* const own = state + row * s.state.n + c * s.state.c;
      if (lengths == nullptr) {
        shift(n, c, count, own, seen);
      } else {
        turn(n, c, count, own, seen);
      }
    }
  }

  // The whole state and the tokens are gathered, and the state is what stands last.
  void shift(int64_t n, int64_t c, int count, T* own, A* seen) const {
    for (int64_t i = 0; i < s.length; ++i) {
      store(seen + i * kLanes<A>, load_channels(own + i * s.state.l, s.state.c, count));
    }
    tokens(n, c, count, seen + s.length * kLanes<A>);
    for (int64_t i = 0; i < s.length; ++i) {
      store_channels(own + i * s.state.l, s.state.c, load(seen + (i + s.T) * kLanes<A>), count);
    }
    convolve(n, c, count, seen + (s.length - s.reach()) * kLanes<A>);
  }

  // The state is a ring: what the taps see is read before the tokens take the places of the oldest.
  void turn(int64_t n, int64_t c, int count, T* own, A* seen) const {
    const int64_t reach = s.reach(), start = (lengths[n] % s.length + s.length) % s.length;
    for (int64_t i = 0; i < reach; ++i) {
      const int64_t at = (start + s.length - reach + i) % s.length;
      store(seen + i * kLanes<A>, load_channels(own + at * s.state.l, s.state.c, count));
    }
    tokens(n, c, count, seen + reach * kLanes<A>);
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t at = (start + t) % s.length;
      store_channels(own + at * s.state.l, s.state.c, load(seen + (reach + t) * kLanes<A>), count);
    }
    convolve(n, c, count, seen);
  }

  SEPCONV_INLINE void tokens(int64_t n, int64_t c, int count, A* to) const {
    const T* const from = x + n * s.x.n + c * s.x.c;
    for (int64_t t = 0; t < s.T; ++t) store(to + t * kLanes<A>, load_channels(from + t * s.x.l, s.x.c, count));
  }

  SEPCONV_INLINE void convolve(int64_t n, int64_t c, int count, const A* seen) const {
    const Vector<A> start = bias == nullptr ? Vector<A>{} : as_sums(bias + c, 1, count);
    T* const to = y + n * s.y.n + c * s.y.c;
    for (int64_t t = 0; t < s.T; ++t) {
      Vector<A> sum = start;
      for (int64_t tap = 0; tap < s.S; ++tap) {
        sum =
            load(seen + (t + tap * s.dilation) * kLanes<A>) * as_sums(w + c * s.w_c + tap * s.w_s, s.w_c, count) + sum;
      }
      store_channels(to + t * s.y.l, s.y.c, activate_lanes<A>(activation, sum), count);
    }
  }

  static SEPCONV_INLINE Vector<A> as_sums(const W* p, int64_t step, int count) { return load_channels(p, step, count); }
};

struct UpdateOf {
  const CausalUpdateShape& s;
  const void *x, *w;
  const Epilogue& epilogue;
  const int64_t *lengths, *rows;
  void *state, *y;

  template <typename T>
  void operator()(T) const {
    if (s.float_weight && !std::is_same_v<T, double>) {
      start<T, float>();
    } else {
      start<T, T>();
    }
  }

  template <typename T, typename W>
  void start() const {
    if constexpr (!std::is_same_v<T, double> || std::is_same_v<W, double>) {
      const int64_t tasks = s.N * ceil_div(s.C, kChannelsPerTask);
      const Update<T, W> body{s,
                              static_cast<const T*>(x),
                              static_cast<const W*>(w),
                              static_cast<const W*>(epilogue.bias),
                              epilogue.activation,
                              lengths,
                              rows,
                              static_cast<T*>(state),
                              static_cast<T*>(y)};
      parallel(tasks, body);
    }
  }
};

void causal_update(const CausalUpdateShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                   const int64_t* lengths, const int64_t* rows, void* state, void* y) {
  with_dtype(dtype, UpdateOf{s, x, w, epilogue, lengths, rows, state, y});
}

#endif
