// The gradient of a causal depthwise convolution by the weight: sums over all positions, in stretches, so that no sum
// is as long as the batch.
//
//   channels dense   a task has a range of channels; a thread goes down all positions, four at a time where no tap
//                    leaves the run, with the sums of all taps in scratch: memory is read in its order
//   else             a task has some channels; a stretch of positions is copied to scratch with what its taps see
//                    beside it, vectors hold positions, and four taps are summed at a time
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/sequences/causal_grad_weight.cpp"
#include "core/arithmetic.h"
#include "cpu/sequences/causal.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void causal_grad_weight(const CausalShape& s, const Packing& packing, DType dtype, const void* grad_y, const void* x,
                        const void* states, void* grad_w) {
  SEPCONV_BEST_ISA(causal_grad_weight)(s, packing, dtype, grad_y, x, states, grad_w);
}

}  // namespace sepconv::cpu
#else

#include "cpu/sequences/causal_simd.h"

inline constexpr int64_t kSummedApart = 256;  // positions after which the sums of channels join the totals
inline constexpr int64_t kMostChannels = 512;

template <typename T>
struct GradWeightByChannels {
  using A = accumulate_t<T>;
  const CausalShape& s;
  const Packing& packing;
  const T *g, *x, *states;
  T* grad_w;
  int64_t channels;  // of a task

  void operator()(int64_t task) const {
    const int64_t begin = task * channels, count = std::min(channels, s.C - begin);
    const int64_t row = ceil_div(count, kLanes<A>) * kLanes<A>;
    std::unique_ptr<A[]> memory(new A[2 * s.S * row]());
    A *const sums = memory.get(), *const totals = sums + s.S * row;
    for (int64_t n = 0; n < s.N; ++n) {
      const T* const from = g + n * s.y.n + begin;
      const Sequence<T> seen{x + n * s.x.n + begin, s.x.l,
                             states == nullptr ? nullptr : states + n * s.states.n + begin, s.states.l, s.reach()};
      for (int64_t i = packing.first[n]; i < packing.first[n + 1]; ++i) {
        const Run& run = packing.runs[i];
        if (run.padding) continue;
        const int64_t low = run.begin == 0 && states != nullptr ? -s.reach() : run.begin;
        for (int64_t q = run.begin; q < run.end; q += kSummedApart) {
          add(seen, from, q, std::min(run.end, q + kSummedApart), low, count, row, sums);
          join(s.S * row, sums, totals);
        }
      }
    }
    for (int64_t tap = 0; tap < s.S; ++tap) {
      for (int64_t c = 0; c < count; ++c) store_one(grad_w + (begin + c) * s.w_c + tap * s.w_s, totals[tap * row + c]);
    }
  }

  static void join(int64_t count, A* sums, A* totals) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      store(totals + i, load(totals + i) + load(sums + i));
      store(sums + i, Vector<A>{});
    }
  }

  void add(const Sequence<T>& seen, const T* from, int64_t q, int64_t end, int64_t low, int64_t count, int64_t row,
           A* sums) const {
    constexpr int kRows = 4;
    const int64_t reach = s.reach();
    while (q < end) {
      const int64_t origin = q - reach;
      if (origin >= std::max<int64_t>(low, 0) && q + kRows <= end) {
        four_positions(seen.at(origin), from + q * s.y.l, count, row, sums);
        q += kRows;
        continue;
      }
      for (int64_t tap = origin >= low ? 0 : ceil_div(low - origin, s.dilation); tap < s.S; ++tap) {
        const T* const xs = seen.at(origin + tap * s.dilation);
        for (int64_t c = 0; c < count; c += kLanes<A>) {
          A* const sum = sums + tap * row + c;
          store(sum, load_up_to(xs + c, count - c) * load_up_to(from + q * s.y.l + c, count - c) + load(sum));
        }
      }
      ++q;
    }
  }

  void four_positions(const T* xs, const T* gs, int64_t count, int64_t row, A* sums) const {
    constexpr int kRows = 4;
    for (int64_t c = 0; c < count; c += kLanes<A>) {
      const int64_t left = count - c;
      Vector<A> grads[kRows];
      for (int r = 0; r < kRows; ++r) grads[r] = load_up_to(gs + r * s.y.l + c, left);
      for (int64_t tap = 0; tap < s.S; ++tap) {
        const T* const at = xs + tap * s.dilation * s.x.l + c;
        Vector<A> sum = load(sums + tap * row + c);
        for (int r = 0; r < kRows; ++r) sum = grads[r] * load_up_to(at + r * s.x.l, left) + sum;
        store(sums + tap * row + c, sum);
      }
    }
  }
};

template <typename T>
struct GradWeightByPositions {
  using A = accumulate_t<T>;
  const CausalShape& s;
  const Packing& packing;
  const T *g, *x, *states;
  T* grad_w;
  int64_t channels;  // of a task

  void operator()(int64_t task) const {
    const int64_t reach = s.reach(), room = kStretch + 2 * kLanes<A>;
    std::unique_ptr<A[]> memory(new A[2 * room + reach + s.S]);
    A *const grads = memory.get(), *const window = grads + room, *const totals = window + room + reach;
    for (int64_t c = task * channels; c < std::min(s.C, (task + 1) * channels); ++c) {
      std::fill_n(totals, s.S, A(0));
      for (int64_t n = 0; n < s.N; ++n) {
        const Sequence<T> from{x + n * s.x.n + c * s.x.c, s.x.l,
                               states == nullptr ? nullptr : states + n * s.states.n + c * s.states.c, s.states.l,
                               reach};
        for (int64_t i = packing.first[n]; i < packing.first[n + 1]; ++i) {
          const Run& run = packing.runs[i];
          if (run.padding) continue;
          const int64_t low = run.begin == 0 && states != nullptr ? -reach : run.begin;
          for (int64_t q = run.begin; q < run.end; q += kStretch) {
            const int64_t count = std::min(kStretch, run.end - q), whole = ceil_div(count, kLanes<A>) * kLanes<A>;
            widen_all(g + n * s.y.n + c * s.y.c + q * s.y.l, s.y.l, count, grads);
            fill_window(from, q - reach, count + reach, low, run.end, window);
            // What stands behind both counts as zero: 0 times what memory held could be NaN.
            std::fill(grads + count, grads + whole, A(0)), std::fill_n(window + count + reach, kLanes<A>, A(0));
            add(grads, window, whole, totals);
          }
        }
      }
      for (int64_t tap = 0; tap < s.S; ++tap) store_one(grad_w + c * s.w_c + tap * s.w_s, totals[tap]);
    }
  }

  void add(const A* grads, const A* window, int64_t whole, A* totals) const {
    constexpr int kTaps = 4;
    for (int64_t tap = 0; tap < s.S; tap += kTaps) {
      const int taps = static_cast<int>(std::min<int64_t>(kTaps, s.S - tap));
      Vector<A> sums[kTaps] = {};
      if (taps == kTaps) {
        for (int64_t i = 0; i < whole; i += kLanes<A>) {
          const Vector<A> grad = load(grads + i);
          for (int t = 0; t < kTaps; ++t) sums[t] = grad * load(window + i + (tap + t) * s.dilation) + sums[t];
        }
      } else {
        for (int t = 0; t < taps; ++t) {
          for (int64_t i = 0; i < whole; i += kLanes<A>) {
            sums[t] = load(grads + i) * load(window + i + (tap + t) * s.dilation) + sums[t];
          }
        }
      }
      for (int t = 0; t < taps; ++t) totals[tap + t] += sum_lanes<A>(sums[t]);
    }
  }
};

struct GradWeightOf {
  const CausalShape& s;
  const Packing& packing;
  const void *grad_y, *x, *states;
  void* grad_w;

  template <typename T>
  void operator()(T) const {
    const T *g = static_cast<const T*>(grad_y), *xs = static_cast<const T*>(x), *ss = static_cast<const T*>(states);
    T* const gw = static_cast<T*>(grad_w);
    if (s.C > 1 && s.x.c == 1 && s.y.c == 1 && (ss == nullptr || s.states.c == 1)) {
      constexpr int64_t lanes = kLanes<accumulate_t<T>>;
      const int64_t each = ceil_div(ceil_div(s.C, num_threads()), lanes) * lanes;
      const int64_t channels = std::min(each, kMostChannels);
      parallel(ceil_div(s.C, channels), GradWeightByChannels<T>{s, packing, g, xs, ss, gw, channels});
      return;
    }
    const int64_t channels = std::max<int64_t>(1, 16 * 1024 / std::max<int64_t>(s.N * s.L, 1));
    parallel(ceil_div(s.C, channels), GradWeightByPositions<T>{s, packing, g, xs, ss, gw, channels});
  }
};

void causal_grad_weight(const CausalShape& s, const Packing& packing, DType dtype, const void* grad_y, const void* x,
                        const void* states, void* grad_w) {
  with_dtype(dtype, GradWeightOf{s, packing, grad_y, x, states, grad_w});
}

#endif
