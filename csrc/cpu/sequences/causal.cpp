// Causal depthwise convolution forward, and its gradient by the input, which is the same the other way round in time.
//
//   channels dense   a task has some positions of one run and all channels; a thread goes down the positions, four at a
//                    time where no tap leaves the run, and along the channels in vectors: memory is read in its order
//   else             a task has some channels of one sequence; a stretch of positions is copied to scratch with what
//                    its taps see beside it, and vectors hold positions
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/sequences/causal.cpp"
#include "cpu/sequences/causal.h"

#include "core/activation.h"
#include "core/arithmetic.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void causal_forward(const CausalShape& s, const Packing& packing, DType dtype, const void* x, const void* states,
                    const void* w, const Epilogue& epilogue, void* y) {
  SEPCONV_BEST_ISA(causal_forward)(s, packing, dtype, x, states, w, epilogue, y);
}

void causal_grad_input(const CausalShape& s, const Packing& packing, DType dtype, const void* grad_y, const void* w,
                       void* grad_x, void* grad_states) {
  SEPCONV_BEST_ISA(causal_grad_input)(s, packing, dtype, grad_y, w, grad_x, grad_states);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/sequences/causal_simd.h"

// ---- vectors of channels ----

// Weights and bias as [S + 1, padded C] sums: the last row is the bias.
template <typename T>
struct PackedTaps {
  using A = accumulate_t<T>;
  int64_t row;
  std::unique_ptr<A[]> memory;

  PackedTaps(const CausalShape& s, const T* w, const T* bias)
      : row(ceil_div(s.C, kLanes<A>) * kLanes<A>), memory(new A[(s.S + 1) * row]()) {
    for (int64_t c = 0; c < s.C; ++c) {
      for (int64_t tap = 0; tap < s.S; ++tap) memory[tap * row + c] = load_one(w + c * s.w_c + tap * s.w_s);
      if (bias != nullptr) memory[s.S * row + c] = load_one(bias + c);
    }
  }
  const A* tap(int64_t i) const { return memory.get() + i * row; }
};

// Four outputs whose taps are all in the run; x is where the first of the first lies.
template <typename T, int kTaps>
void four_positions(int64_t C, int64_t taps, int64_t tap_step, const T* x, int64_t x_step, const PackedTaps<T>& weights,
                    Activation activation, T* y, int64_t y_step) {
  using A = accumulate_t<T>;
  constexpr int kRows = 4;
  const int64_t count = kTaps > 0 ? kTaps : taps;
  for (int64_t c = 0; c < C; c += kLanes<A>) {
    const int64_t left = C - c;
    Vector<A> sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = load(weights.tap(count) + c);
    if constexpr (kTaps > 0) {  // dilation 1: neighbours share what they see
      Vector<A> seen[kRows + kTaps - 1];
      for (int i = 0; i < kRows + kTaps - 1; ++i) seen[i] = load_up_to(x + i * x_step + c, left);
      for (int tap = 0; tap < kTaps; ++tap) {
        const Vector<A> w = load(weights.tap(tap) + c);
        for (int r = 0; r < kRows; ++r) sums[r] = seen[tap + r] * w + sums[r];
      }
    } else {
      for (int64_t tap = 0; tap < count; ++tap) {
        const Vector<A> w = load(weights.tap(tap) + c);
        const T* const from = x + tap * tap_step + c;
        for (int r = 0; r < kRows; ++r) sums[r] = load_up_to(from + r * x_step, left) * w + sums[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store_up_to(y + r * y_step + c, activate_lanes<A>(activation, sums[r]), left);
    }
  }
}

// One output, of the taps in [first, last).
template <typename T>
void one_position(const CausalShape& s, const Sequence<T>& x, int64_t position, int64_t first, int64_t last,
                  const PackedTaps<T>& weights, Activation activation, T* y) {
  using A = accumulate_t<T>;
  for (int64_t c = 0; c < s.C; c += kLanes<A>) {
    const int64_t left = s.C - c;
    Vector<A> sum = load(weights.tap(s.S) + c);
    for (int64_t tap = first; tap < last; ++tap) {
      const T* const from = x.at(position - s.reach() + tap * s.dilation) + c;
      sum = load_up_to(from, left) * load(weights.tap(tap) + c) + sum;
    }
    store_up_to(y + c, activate_lanes<A>(activation, sum), left);
  }
}

// A task's positions [begin, end) of one run, whose taps may read [low, high).
struct Stretch {
  int64_t n, begin, end, low, high;
  bool padding;
};

template <typename T>
struct ByChannels {
  const CausalShape& s;
  const std::vector<Stretch>& stretches;
  const T *x, *states;  // reversed in time for the gradient
  const PackedTaps<T>& weights;
  Activation activation;
  T *y, *after;  // `after`: where positions from L on go, backwards; the gradient of the states
  SequenceStrides after_strides;

  void operator()(int64_t task) const {
    const Stretch& r = stretches[task];
    const Sequence<T> from{x + r.n * s.x.n, s.x.l, states == nullptr ? nullptr : states + r.n * s.states.n, s.states.l,
                           s.reach()};
    T* const to = y + r.n * s.y.n;
    const int64_t reach = s.reach(), D = s.dilation;
    for (int64_t q = r.begin; q < r.end;) {
      T* const out = q < s.L ? to + q * s.y.l : after + r.n * after_strides.n + (reach - 1 - q + s.L) * after_strides.l;
      if (r.padding) {
        zeros(out);
        ++q;
        continue;
      }
      if (q - reach >= std::max<int64_t>(r.low, 0) && q + 4 <= std::min(r.end, r.high)) {
        const T* const first = from.at(q - reach);
        if (D == 1 && s.S == 4) {
          four_positions<T, 4>(s.C, 4, 0, first, s.x.l, weights, activation, out, s.y.l);
        } else if (D == 1 && s.S == 3) {
          four_positions<T, 3>(s.C, 3, 0, first, s.x.l, weights, activation, out, s.y.l);
        } else {
          four_positions<T, 0>(s.C, s.S, D * s.x.l, first, s.x.l, weights, activation, out, s.y.l);
        }
        q += 4;
        continue;
      }
      const int64_t origin = q - reach;
      const int64_t least = origin >= r.low ? 0 : ceil_div(r.low - origin, D);
      const int64_t most = origin >= r.high ? 0 : std::min(s.S, ceil_div(r.high - origin, D));
      one_position(s, from, q, std::min(least, most), most, weights, activation, out);
      ++q;
    }
  }

  void zeros(T* out) const {
    for (int64_t c = 0; c < s.C; ++c) out[c] = T{};
  }
};

// ---- vectors of positions ----

template <typename T>
struct ByPositions {
  using A = accumulate_t<T>;
  const CausalShape& s;
  const Packing& packing;
  bool backwards;
  const T *x, *states, *w, *bias;
  Activation activation;
  T *y, *after;  // `after`: the gradient of the states
  SequenceStrides after_strides;
  int64_t rows_per_task;

  void operator()(int64_t task) const {
    const int64_t reach = s.reach();
    std::unique_ptr<A[]> memory(new A[kStretch + reach + 2 * kLanes<A> + s.S]);
    A* const window = memory.get();
    A* const taps = window + kStretch + reach + 2 * kLanes<A>;
    const int64_t rows = std::min(s.N * s.C, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < rows; ++row) {
      const int64_t n = row / s.C, c = row % s.C;
      for (int64_t i = 0; i < s.S; ++i) taps[backwards ? s.S - 1 - i : i] = load_one(w + c * s.w_c + i * s.w_s);
      const A start = bias == nullptr ? A(0) : load_one(bias + c);
      const Sequence<T> from{x + n * s.x.n + c * s.x.c, s.x.l,
                             states == nullptr ? nullptr : states + n * s.states.n + c * s.states.c, s.states.l, reach};
      T* const to = y + n * s.y.n + c * s.y.c;
      for (int64_t i = packing.first[n]; i < packing.first[n + 1]; ++i) {
        const Run& run = packing.runs[i];
        if (run.padding) {
          for (int64_t q = run.begin; q < run.end; ++q) to[q * s.y.l] = T{};
          continue;
        }
        const int64_t low = run.begin == 0 && states != nullptr ? -reach : run.begin;
        if (run.begin == 0 && after != nullptr) {
          T* const out = after + n * after_strides.n + c * after_strides.c;
          stretches(from, -reach, 0, run.begin, run.end, window, taps, start, out + reach * after_strides.l,
                    after_strides.l);
        }
        stretches(from, run.begin, run.end, low, run.end, window, taps, start, to, s.y.l);
      }
    }
  }

  // Outputs [begin, end), which go to `out` from position 0 on; taps read [low, high).
  void stretches(const Sequence<T>& from, int64_t begin, int64_t end, int64_t low, int64_t high, A* window,
                 const A* taps, A start, T* out, int64_t step) const {
    const int64_t reach = s.reach();
    for (int64_t q = begin; q < end; q += kStretch) {
      const int64_t count = std::min(kStretch, end - q);
      fill_window(from, backwards ? q : q - reach, count + reach, low, high, window);
      convolve(window, count, taps, start, out + q * step, step);
    }
  }

  void convolve(const A* window, int64_t count, const A* taps, A start, T* out, int64_t step) const {
    constexpr int kMost = 4;
    for (int64_t i = 0; i < count; i += kMost * kLanes<A>) {
      Vector<A> sums[kMost];
      const int vectors = static_cast<int>(std::min<int64_t>(kMost, ceil_div(count - i, kLanes<A>)));
      if (vectors == kMost) {
        for (int v = 0; v < kMost; ++v) sums[v] = broadcast<A>(start);
        for (int64_t tap = 0; tap < s.S; ++tap) {
          const A* const seen = window + i + tap * s.dilation;
          for (int v = 0; v < kMost; ++v) sums[v] = load(seen + v * kLanes<A>) * taps[tap] + sums[v];
        }
      } else {
        for (int v = 0; v < vectors; ++v) {
          sums[v] = broadcast<A>(start);
          for (int64_t tap = 0; tap < s.S; ++tap) {
            sums[v] = load(window + i + v * kLanes<A> + tap * s.dilation) * taps[tap] + sums[v];
          }
        }
      }
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = i + v * kLanes<A>, left = count - at;
        const Vector<A> result = activate_lanes<A>(activation, sums[v]);
        if (step == 1) {
          store_up_to(out + at, result, left);
          continue;
        }
        A lanes[kLanes<A>];
        store(lanes, result);
        for (int lane = 0; lane < std::min<int64_t>(left, kLanes<A>); ++lane) {
          store_one(out + (at + lane) * step, lanes[lane]);
        }
      }
    }
  }
};

inline constexpr int64_t kPositionsPerTask = 64, kElementsPerTask = 16 * 1024;

inline bool dense_channels(const CausalShape& s) { return s.C > 1 && s.x.c == 1 && s.y.c == 1; }

// The runs in pieces: [begin, end) of each, and `more` positions behind the end of the sequence. In the gradient time
// runs backwards.
inline std::vector<Stretch> pieces(const CausalShape& s, const Packing& packing, bool states, bool backwards,
                                   bool more) {
  std::vector<Stretch> all;
  const int64_t reach = s.reach();
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t i = packing.first[n]; i < packing.first[n + 1]; ++i) {
      const Run& run = packing.runs[i];
      const int64_t begin = backwards ? s.L - run.end : run.begin, high = backwards ? s.L - run.begin : run.end;
      const int64_t low = !backwards && run.begin == 0 && states ? -reach : begin;
      const int64_t end = backwards && more && run.begin == 0 && !run.padding ? high + reach : high;
      for (int64_t q = begin; q < end;) {  // a piece is before L or behind it
        const int64_t to = std::min({q + kPositionsPerTask, end, q < s.L ? s.L : end});
        all.push_back({n, q, to, low, high, run.padding});
        q = to;
      }
    }
  }
  return all;
}

struct ForwardOf {
  const CausalShape& s;
  const Packing& packing;
  const void *x, *states, *w;
  const Epilogue& epilogue;
  void* y;

  template <typename T>
  void operator()(T) const {
    const T *xs = static_cast<const T*>(x), *ss = static_cast<const T*>(states), *ws = static_cast<const T*>(w),
            *bias = static_cast<const T*>(epilogue.bias);
    T* const ys = static_cast<T*>(y);
    if (dense_channels(s) && (ss == nullptr || s.states.c == 1)) {
      const PackedTaps<T> weights(s, ws, bias);
      const std::vector<Stretch> all = pieces(s, packing, ss != nullptr, false, false);
      parallel(static_cast<int64_t>(all.size()),
               ByChannels<T>{s, all, xs, ss, weights, epilogue.activation, ys, nullptr, {}});
      return;
    }
    const int64_t rows = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(s.L, 1));
    parallel(ceil_div(s.N * s.C, rows),
             ByPositions<T>{s, packing, false, xs, ss, ws, bias, epilogue.activation, ys, nullptr, {}, rows});
  }
};

struct GradInputOf {
  const CausalShape& s;
  const Packing& packing;
  const void *grad_y, *w;
  void *grad_x, *grad_states;

  template <typename T>
  void operator()(T) const {
    const T *gs = static_cast<const T*>(grad_y), *ws = static_cast<const T*>(w);
    T *const xs = static_cast<T*>(grad_x), *const ss = static_cast<T*>(grad_states);
    CausalShape turned = s;  // what is read is grad_y
    turned.x = s.y, turned.y = s.x;
    if (dense_channels(s) && (ss == nullptr || s.states.c == 1)) {
      const int64_t last = s.L - 1;
      gs += last * s.y.l;
      turned.x.l = -s.y.l, turned.y.l = -s.x.l;
      const PackedTaps<T> weights(s, ws, nullptr);
      const std::vector<Stretch> all = pieces(s, packing, false, true, ss != nullptr);
      parallel(static_cast<int64_t>(all.size()),
               ByChannels<T>{turned, all, gs, nullptr, weights, Activation::identity, xs + last * s.x.l, ss, s.states});
      return;
    }
    const int64_t rows = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(s.L, 1));
    parallel(ceil_div(s.N * s.C, rows), ByPositions<T>{turned, packing, true, gs, nullptr, ws, nullptr,
                                                       Activation::identity, xs, ss, s.states, rows});
  }
};

void causal_forward(const CausalShape& s, const Packing& packing, DType dtype, const void* x, const void* states,
                    const void* w, const Epilogue& epilogue, void* y) {
  with_dtype(dtype, ForwardOf{s, packing, x, states, w, epilogue, y});
}

void causal_grad_input(const CausalShape& s, const Packing& packing, DType dtype, const void* grad_y, const void* w,
                       void* grad_x, void* grad_states) {
  with_dtype(dtype, GradInputOf{s, packing, grad_y, w, grad_x, grad_states});
}

#endif
